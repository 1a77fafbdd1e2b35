"""A worker: a process with a resident engine that brings one shard after the other to its record."""

from __future__ import annotations

import os
import resource
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from stylemill import __version__
from stylemill.execution.attempt import Attempt, Progress, Run
from stylemill.store.records import Record

if TYPE_CHECKING:
    from stylemill.engine import Engine

# stylemill.execution.shard imports torch. It is imported inside the methods, because the driver imports this module too
# and needs no torch.


@dataclass(frozen=True)
class WorkerLocation:
    """Where a worker runs, and with which stylemill."""

    host: str
    pid: int
    version: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True)
class Loaded:
    """What is known once the model is there."""

    numerics: dict[str, str | int]
    resident: int  # bytes of memory


class Worker:
    """Runs as a Ray actor whose methods are called from several threads; knows nothing of Ray itself."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._engine: Engine | None = None
        self._device = threading.Lock()
        self._stopping = threading.Event()
        self._progress: dict[str, Progress] = {}
        threading.Thread(target=_warm_up, daemon=True).start()

    def hello(self) -> WorkerLocation:
        return WorkerLocation(socket.gethostname(), os.getpid(), __version__)

    def load(self, micro_batch: int | None) -> Loaded:
        """Load the model. Raises ModelError when it cannot be, ImportError where stylemill is not whole."""
        from stylemill.execution.worker_engine import load_engine, numerics

        self._engine = load_engine(self._run, micro_batch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        return Loaded(numerics(self._engine), peak * 1024)

    def work(self, attempt: Attempt) -> Record | None:
        """Bring a shard to its record; None once `stop` was called. Raises what `process_shard` raises."""
        from stylemill.execution.shard import process_shard

        if self._engine is None:
            raise RuntimeError("a attempt came before the model was loaded")
        try:
            return process_shard(self._run, attempt, self._engine, self._device, self._watch, self._stopping.is_set)
        finally:
            self._progress.pop(attempt.id, None)

    def probe(self, attempt: Attempt) -> bool:
        """Try the pairs of `attempt.probe`; False when `stop` was called first. Raises what `process_shard` raises."""
        from stylemill.execution.shard import probe_shard

        if self._engine is None:
            raise RuntimeError("a attempt came before the model was loaded")
        try:
            return probe_shard(self._run, attempt, self._engine, self._device, self._watch, self._stopping.is_set)
        finally:
            self._progress.pop(attempt.id, None)

    def beat(self) -> list[Progress]:
        """A sign of life: the latest of each shard in work."""
        return list(self._progress.copy().values())

    def stop(self) -> None:
        """Shards in work end with a checkpoint after their current step."""
        self._stopping.set()

    def _watch(self, progress: Progress) -> None:
        self._progress[progress.attempt_id] = progress


def _warm_up() -> None:
    """Import torch and all that while the first worker still loads its model."""
    with suppress(ImportError):  # `load` meets it again, where it can be reported
        import_module("stylemill.execution.shard")
