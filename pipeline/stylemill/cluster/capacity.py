"""What a worker asks of a cluster, and how many workers a cluster has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stylemill.config.job import ClusterSettings

Resources = Mapping[str, float]  # as Ray names them: CPU, GPU, memory (bytes)
SAMPLING_MEMORY = 2  # a CPU worker at work, in units of what it takes once loaded


@dataclass(frozen=True)
class WorkerResources:
    """What one worker reserves."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for amount, name in ((self.gpus, "GPU"), (self.cpus, "CPU")) if amount]
        return " and ".join(parts) or "nothing"

    def fits(self, machine: Resources) -> bool:
        return machine.get("CPU", 0) >= self.cpus and machine.get("GPU", 0) >= self.gpus


def worker_resources(cluster: ClusterSettings, machines: Sequence[Resources]) -> WorkerResources:
    """One GPU a worker where there are any, else its CPU threads. A GPU worker's threads mostly wait for the GPU."""
    gpus = cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if any(machine.get("GPU", 0) >= 1 for machine in machines) else 0
    return WorkerResources(cpus=0 if gpus else cluster.threads, gpus=gpus)


def worker_capacity(
    cluster: ClusterSettings, asked: WorkerResources, machines: Sequence[Resources], resident: int = 0
) -> int:
    """Workers to have: the job's own number, or as many as the machines hold, at least one.

    On CPUs memory counts too: `resident` bytes is what a worker takes once loaded, 0 when not known yet.
    """
    if cluster.workers != "auto":
        return cluster.workers
    name, amount = ("GPU", asked.gpus) if asked.gpus else ("CPU", asked.cpus)
    workers = 0
    for machine in machines:
        fitting = machine.get(name, 0) // amount
        if resident and not asked.gpus:
            fitting = min(fitting, machine.get("memory", 0) // (SAMPLING_MEMORY * resident))
        workers += int(fitting)
    return max(workers, 1)
