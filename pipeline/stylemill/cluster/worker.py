"""A worker: a process that keeps an engine loaded and processes shards with it."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from stylemill import __version__
from stylemill.execution.attempt import Attempt, AutoSettings, Progress, Run
from stylemill.store.records import Record

if TYPE_CHECKING:
    from stylemill.engine import Engine

# stylemill.execution.shard imports torch. It is imported inside the methods, because the driver imports this module too
# and needs no torch.

Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerLocation:
    """The machine and process of a worker, and its version of stylemill."""

    host: str
    pid: int
    version: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True)
class LoadedModel:
    """What the driver needs to know about the model that a worker has loaded."""

    numerics: dict[str, str | int]
    resident_bytes: int  # peak memory of the process


class Worker:
    """The class of the Ray actors. Ray calls its methods from several threads; the class itself does not use Ray."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._engine: Engine | None = None
        self._device = threading.Lock()
        self._stopping = threading.Event()
        self._progress: dict[str, Progress] = {}  # by attempt id
        threading.Thread(target=self._import_engine, daemon=True).start()

    def location(self) -> WorkerLocation:
        return WorkerLocation(socket.gethostname(), os.getpid(), __version__)

    def load(self, auto: AutoSettings) -> LoadedModel:
        """Load the model. Raises ModelError if that fails, ImportError if a package is missing."""
        from stylemill.execution.worker_engine import load_engine, numerics

        self._engine = load_engine(self._run, auto)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        return LoadedModel(numerics(self._engine), peak * 1024)

    def run_attempt(self, attempt: Attempt) -> Record | None:
        """Process a shard. Returns its record, or None after `stop`. Raises what `process_shard` raises."""
        from stylemill.execution.shard import process_shard

        return self._with_engine(process_shard, attempt)

    def run_probe(self, attempt: Attempt) -> bool:
        """Process the pairs of `attempt.probe`. Returns False after `stop`. Raises what `probe_shard` raises."""
        from stylemill.execution.shard import probe_shard

        return self._with_engine(probe_shard, attempt)

    def progress(self) -> list[Progress]:
        """The latest progress of each attempt. An answer also shows that the worker is alive."""
        return list(self._progress.copy().values())

    def stop(self) -> None:
        """Make the attempts write a checkpoint and end after their current step."""
        self._stopping.set()

    def _with_engine(self, process: Callable[..., Result], attempt: Attempt) -> Result:
        if self._engine is None:
            raise RuntimeError(f"shard {attempt.shard} was assigned before the model was loaded")
        try:
            return process(self._run, attempt, self._engine, self._device, self._record_progress, self._stopping.is_set)
        finally:
            self._progress.pop(attempt.id, None)

    def _record_progress(self, progress: Progress) -> None:
        self._progress[progress.attempt_id] = progress

    def _import_engine(self) -> None:
        """Import the engine in a new worker while the first worker still loads its model."""
        with suppress(ImportError):  # `load` raises it again, and reports it
            from stylemill.execution.worker_engine import import_engine

            import_engine()
            import_module("stylemill.execution.shard")
