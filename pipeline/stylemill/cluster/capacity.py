"""The resources that a worker reserves, and the number of workers that a cluster can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stylemill.config.job import ClusterSettings

Resources = Mapping[str, float]  # of a machine, under Ray's names: CPU, GPU, memory (bytes)
SAMPLING_MEMORY = 2  # memory of a CPU worker while it samples, as a multiple of its memory after loading the model


@dataclass(frozen=True)
class WorkerResources:
    """The CPUs and GPUs that one worker reserves."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for amount, name in ((self.gpus, "GPU"), (self.cpus, "CPU")) if amount]
        return " and ".join(parts) or "nothing"

    def fit_on(self, machine: Resources) -> bool:
        return machine.get("CPU", 0) >= self.cpus and machine.get("GPU", 0) >= self.gpus


def worker_resources(cluster: ClusterSettings, machines: Sequence[Resources]) -> WorkerResources:
    """One GPU per worker if any machine has one, else `cluster.threads` CPUs.

    A GPU worker reserves no CPU: its threads mostly wait for the GPU.
    """
    gpus = cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if any(machine.get("GPU", 0) >= 1 for machine in machines) else 0
    return WorkerResources(cpus=0 if gpus else cluster.threads, gpus=gpus)


def worker_capacity(
    cluster: ClusterSettings, resources: WorkerResources, machines: Sequence[Resources], resident_bytes: int = 0
) -> int:
    """The number of workers to run: `cluster.workers`, or for "auto" as many as the machines can hold, at least one.

    For CPU workers memory is a limit too. `resident_bytes` is the memory of a worker that has loaded the model, 0 if it
    is not known yet.
    """
    if cluster.workers != "auto":
        return cluster.workers
    name, amount = ("GPU", resources.gpus) if resources.gpus else ("CPU", resources.cpus)
    workers = 0
    for machine in machines:
        fitting = machine.get(name, 0) // amount
        if resident_bytes and not resources.gpus:
            fitting = min(fitting, machine.get("memory", 0) // (SAMPLING_MEMORY * resident_bytes))
        workers += int(fitting)
    return max(workers, 1)
