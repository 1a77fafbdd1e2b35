"""The Ray calls: workers are hired, asked and dismissed, and their answers collected."""

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

THREADS = ATTEMPTS_PER_WORKER + 2  # of an actor: its attempts, and two short calls beside them


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver sees it: asked for, placed (`location`), loading, ready."""

    number: int
    actor: Any
    since: float = field(default_factory=time.monotonic)
    location: WorkerLocation | None = None
    loading: bool = False
    loading_since: float = 0.0
    ready: bool = False
    retiring: bool = False  # its process can no longer be trusted: it gets no more attempts
    asked: float = 0.0  # when it was last asked for a beat
    heard: float = 0.0  # when it last answered

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" ({self.location})" if self.location else "")


@dataclass(frozen=True)
class Call:
    """A method of a worker whose answer is awaited."""

    worker: WorkerHandle
    method: str
    attempt: Attempt | None = None


@dataclass(frozen=True)
class Reply:
    """How a call ended: with an answer, with what its method raised (and the trace), or with its worker's death."""

    call: Call
    answer: Any = None
    raised: BaseException | None = None
    trace: str = ""
    died: str | None = None


class Actors:
    """All workers of a pool, by number, and the calls they have not answered yet."""

    def __init__(self, run: Run, ask: WorkerResources) -> None:
        self.workers: dict[int, WorkerHandle] = {}
        self._numbers = count(1)
        self._calls: dict[Any, Call] = {}
        self._run = run
        self._actor = ray.remote(Worker).options(
            num_cpus=ask.cpus, num_gpus=ask.gpus, max_restarts=0, max_task_retries=0, max_concurrency=THREADS
        )

    def create(self) -> None:
        """WorkerResources Ray for one more worker; where there is no room for it yet, it comes when there is."""
        worker = WorkerHandle(next(self._numbers), self._actor.remote(self._run))
        self.workers[worker.number] = worker
        self.call(worker, "hello")

    def remove(self, worker: WorkerHandle) -> None:
        """Kill a worker. Nothing that it still had to say is heard."""
        del self.workers[worker.number]
        self._calls = {reference: call for reference, call in self._calls.items() if call.worker is not worker}
        ray.kill(worker.actor, no_restart=True)

    def kill(self, worker: WorkerHandle) -> None:
        """Dismiss a worker that hangs. Ray asks a process to end itself, which a stopped one does not hear."""
        self.remove(worker)
        location = worker.location
        if location and location.host == socket.gethostname():
            _end(location.pid)
        elif location:
            for node in [
                node for node in ray.nodes() if node["Alive"] and node["NodeManagerHostname"] == location.host
            ]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ray.remote(_end).options(num_cpus=0, scheduling_strategy=there).remote(location.pid)

    def call(self, worker: WorkerHandle, method: str, *arguments: Any) -> None:
        attempt = arguments[0] if method in ("work", "probe") else None
        self._calls[getattr(worker.actor, method).remote(*arguments)] = Call(worker, method, attempt)

    def replies(self, timeout: float) -> Iterator[Reply]:
        """Every reply that is there, after waiting for the first one for at most `timeout` seconds."""
        if not self._calls:
            time.sleep(timeout)
            return
        ray.wait(list(self._calls), num_returns=1, timeout=timeout)
        there, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for reference in there:
            if call := self._calls.pop(reference, None):  # its worker may have been dismissed for an earlier reply
                yield _reply(call, reference)


def _end(pid: int) -> None:
    """Kill a worker of Ray's on this machine, if that is what has this pid."""
    try:
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended


def _reply(call: Call, reference: Any) -> Reply:
    try:
        return Reply(call, answer=ray.get(reference))
    except RayTaskError as error:
        return Reply(call, raised=error.cause, trace=re.sub(r"\x1b\[[0-9;]*m", "", str(error)))
    except RayError as error:
        return Reply(call, died=_cause_of_death(error))


def _cause_of_death(error: RayError) -> str:
    """What tells something in Ray's long message: the end of it, without guesses at common causes."""
    last = str(error).strip().splitlines()[-1].strip()
    return re.sub(r"^.*Worker exit detail: | Some common causes include.*$", "", last)


def machines() -> list[Resources]:
    """What each live machine of the cluster has in all, free or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
