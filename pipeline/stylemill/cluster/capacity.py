"""The resources that a worker reserves, and the number of workers that a cluster can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stylemill.config.job import ClusterSettings

Resources = Mapping[str, float]  # of a machine, under Ray's names: CPU, GPU, memory (bytes)
SAMPLING_MEMORY = 2  # memory of a CPU worker while it samples, as a multiple of its memory after loading the model
UNITS = 10_000  # Ray counts CPUs and GPUs in units of 1/10000; in floats, 1.0 // 0.1 is 9


@dataclass(frozen=True)
class WorkerResources:
    """The CPUs and GPUs that one worker reserves."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for amount, name in ((self.gpus, "GPU"), (self.cpus, "CPU")) if amount]
        return " and ".join(parts) or "nothing"

    def number_on(self, machine: Resources) -> int:
        """How many workers fit on a machine on which nothing else runs. A part of a GPU is always of a single GPU."""
        numbers = []
        if cpus := _units(self.cpus):
            numbers.append(_units(machine.get("CPU", 0)) // cpus)
        if gpus := _units(self.gpus):
            available = _units(machine.get("GPU", 0))
            numbers.append(available // gpus if gpus >= UNITS else available // UNITS * (UNITS // gpus))
        return min(numbers)


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
    workers = 0
    for machine in machines:
        fitting = resources.number_on(machine)
        if resident_bytes and not resources.gpus:
            fitting = min(fitting, int(machine.get("memory", 0)) // (SAMPLING_MEMORY * resident_bytes))
        workers += fitting
    return max(workers, 1)


def _units(amount: float) -> int:
    """CPUs or GPUs in Ray's units, rounded as Ray rounds them."""
    return int(amount * UNITS + 0.5)
