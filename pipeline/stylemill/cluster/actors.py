"""The calls to Ray: create and remove workers, call their methods, and collect the replies."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stylemill.cluster.assignment import ATTEMPTS_PER_WORKER
from stylemill.cluster.capacity import Resources, WorkerResources
from stylemill.cluster.worker import Worker, WorkerLocation
from stylemill.execution.attempt import Attempt, Run

THREADS = ATTEMPTS_PER_WORKER + 2  # per actor: its attempts, and two short calls beside them


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver sees it: created, then placed (`location`), then loading the model, then ready."""

    number: int
    actor: Any
    created_at: float = field(default_factory=time.monotonic)
    location: WorkerLocation | None = None
    loading: bool = False
    loading_since: float = 0.0  # on the driver's clock
    ready: bool = False
    draining: bool = False  # it raised an unexpected error: it gets no more attempts, and is removed after the last one
    polled_at: float = 0.0  # when it was last asked for its progress
    answered_at: float = 0.0  # when it last answered

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" ({self.location})" if self.location else "")


@dataclass(frozen=True)
class Call:
    """A call of a worker's method that is not answered yet."""

    worker: WorkerHandle
    method: str
    attempt: Attempt | None = None


@dataclass(frozen=True)
class Reply:
    """The result of a call: a return value, an exception of the method with its traceback, or a worker's death."""

    call: Call
    value: Any = None
    exception: BaseException | None = None
    traceback: str = ""
    death: str | None = None  # why the worker died


class Actors:
    """The workers of a pool, by number, and their unanswered calls."""

    def __init__(self, run: Run, resources: WorkerResources) -> None:
        self.workers: dict[int, WorkerHandle] = {}
        self._numbers = count(1)
        self._calls: dict[Any, Call] = {}  # by the reference to the result
        self._run = run
        self._actor = ray.remote(Worker).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=THREADS,
        )

    def create(self) -> None:
        """Ask Ray for one more worker. Ray places it when its resources are free."""
        worker = WorkerHandle(next(self._numbers), self._actor.remote(self._run))
        self.workers[worker.number] = worker
        self.call(worker, "location")

    def remove(self, worker: WorkerHandle) -> None:
        """Kill a worker and discard its unanswered calls."""
        del self.workers[worker.number]
        self._calls = {reference: call for reference, call in self._calls.items() if call.worker is not worker}
        ray.kill(worker.actor, no_restart=True)

    def kill(self, worker: WorkerHandle) -> None:
        """Remove a worker that hangs, and kill its process by signal: a stopped process ignores Ray's request."""
        self.remove(worker)
        location = worker.location
        if location and location.host == socket.gethostname():
            _kill_process(location.pid)
        elif location:
            for node in ray.nodes():
                if node["Alive"] and node["NodeManagerHostname"] == location.host:
                    on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    ray.remote(_kill_process).options(num_cpus=0, scheduling_strategy=on_node).remote(location.pid)

    def call(self, worker: WorkerHandle, method: str, *arguments: Any) -> None:
        attempt = arguments[0] if method in ("run_attempt", "run_probe") else None
        self._calls[getattr(worker.actor, method).remote(*arguments)] = Call(worker, method, attempt)

    def replies(self, timeout: float) -> Iterator[Reply]:
        """All replies that have arrived. Waits at most `timeout` seconds for the first one."""
        if not self._calls:
            time.sleep(timeout)
            return
        ray.wait(list(self._calls), num_returns=1, timeout=timeout)
        arrived, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for reference in arrived:
            if call := self._calls.pop(reference, None):  # None: an earlier reply led to the removal of its worker
                yield _reply(call, reference)


def machine_resources() -> list[Resources]:
    """The total resources of each live machine of the cluster, free or in use."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _kill_process(pid: int) -> None:
    """Kill the process if it is a Ray worker: another process may have got its pid."""
    try:
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended


def _reply(call: Call, reference: Any) -> Reply:
    try:
        return Reply(call, value=ray.get(reference))
    except RayTaskError as error:
        return Reply(call, exception=error.cause, traceback=re.sub(r"\x1b\[[0-9;]*m", "", str(error)))
    except RayError as error:
        return Reply(call, death=_cause_of_death(error))


def _cause_of_death(error: RayError) -> str:
    """The last line of Ray's long message, without its list of common causes."""
    last = str(error).strip().splitlines()[-1].strip()
    return re.sub(r"^.*Worker exit detail: | Some common causes include.*$", "", last)
