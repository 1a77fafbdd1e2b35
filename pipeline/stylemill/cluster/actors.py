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

from stylemill.cluster.assignment import LEASES
from stylemill.cluster.capacity import Ask, Resources
from stylemill.cluster.worker import Home, Worker
from stylemill.execution.attempt import Lease, Run

THREADS = LEASES + 2  # of an actor: its leases, and two short calls beside them


@dataclass(eq=False)
class Member:
    """A worker as the driver sees it: asked for, placed (`home`), loading, ready."""

    number: int
    actor: Any
    since: float = field(default_factory=time.monotonic)
    home: Home | None = None
    loading: bool = False
    loading_since: float = 0.0
    ready: bool = False
    retiring: bool = False  # its process can no longer be trusted: it gets no more leases
    asked: float = 0.0  # when it was last asked for a beat
    heard: float = 0.0  # when it last answered

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" ({self.home})" if self.home else "")


@dataclass(frozen=True)
class Call:
    """A method of a worker whose answer is awaited."""

    member: Member
    method: str
    lease: Lease | None = None


@dataclass(frozen=True)
class Reply:
    """How a call ended: with an answer, with what its method raised (and the trace), or with its worker's death."""

    call: Call
    answer: Any = None
    raised: BaseException | None = None
    trace: str = ""
    died: str | None = None


class Crew:
    """All workers of a pool, by number, and the calls they have not answered yet."""

    def __init__(self, run: Run, ask: Ask) -> None:
        self.members: dict[int, Member] = {}
        self._numbers = count(1)
        self._calls: dict[Any, Call] = {}
        self._run = run
        self._actor = ray.remote(Worker).options(
            num_cpus=ask.cpus, num_gpus=ask.gpus, max_restarts=0, max_task_retries=0, max_concurrency=THREADS
        )

    def hire(self) -> None:
        """Ask Ray for one more worker; where there is no room for it yet, it comes when there is."""
        member = Member(next(self._numbers), self._actor.remote(self._run))
        self.members[member.number] = member
        self.call(member, "hello")

    def dismiss(self, member: Member) -> None:
        """Kill a worker. Nothing that it still had to say is heard."""
        del self.members[member.number]
        self._calls = {reference: call for reference, call in self._calls.items() if call.member is not member}
        ray.kill(member.actor, no_restart=True)

    def kill(self, member: Member) -> None:
        """Dismiss a worker that hangs. Ray asks a process to end itself, which a stopped one does not hear."""
        self.dismiss(member)
        home = member.home
        if home and home.host == socket.gethostname():
            _end(home.pid)
        elif home:
            for node in [node for node in ray.nodes() if node["Alive"] and node["NodeManagerHostname"] == home.host]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ray.remote(_end).options(num_cpus=0, scheduling_strategy=there).remote(home.pid)

    def call(self, member: Member, method: str, *arguments: Any) -> None:
        lease = arguments[0] if method in ("work", "probe") else None
        self._calls[getattr(member.actor, method).remote(*arguments)] = Call(member, method, lease)

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
