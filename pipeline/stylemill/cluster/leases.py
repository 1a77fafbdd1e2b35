"""Who works on which shard, and how often it is tried. Policy only: it knows neither Ray nor files."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stylemill.cluster.patience import backoff
from stylemill.lease import Lease, Progress

LEASES = 2  # a worker holds: one samples while the other is read ahead or written


@dataclass
class Holding:
    """A lease in the hands of a worker, and how far it is known to be."""

    worker: int
    lease: Lease
    stage: str = "read"
    share: float = 0.0  # of the steps done


class LeaseBook:
    """Every open shard is waiting, held or given up; `attempts` failures give it up.

    A shard whose worker died is a suspect: it is tried again alone in its worker, so that the next death can be blamed
    on the right one.
    """

    def __init__(self, shards: Sequence[int], attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempts = attempts
        self._clock = clock
        self._fresh = deque(shards)
        self._again: dict[int, float] = {}  # shard to try again -> not before
        self._held: dict[str, Holding] = {}  # by attempt, oldest first
        self._failures: Counter[int] = Counter()
        self._why: dict[int, str] = {}
        self._suspects: set[int] = set()
        self._given_up: set[int] = set()

    @property
    def open(self) -> int:
        """Shards that are neither done nor given up."""
        return self.waiting + self.held

    @property
    def waiting(self) -> int:
        return len(self._fresh) + len(self._again)

    @property
    def held(self) -> int:
        return len(self._held)

    def held_by(self, worker: int) -> list[Lease]:
        """Oldest first."""
        return [holding.lease for holding in self._of(worker)]

    def choose(self, workers: Iterable[int], coming: int = 0) -> tuple[int, int] | None:
        """The next (worker, shard) to bring together, or None for now. `coming` workers will be ready soon.

        Breadth first: a worker gets a second lease only when no worker is without one and none that is coming will
        want the shard. Near the end the second one is also withheld from a worker not half through its first:
        another may be free sooner.
        """
        held = {worker: self._of(worker) for worker in workers}
        due = [shard for shard, when in self._again.items() if when <= self._clock()]
        for worker, holdings in held.items():
            if not holdings:
                shard = self._next(due)
                return None if shard is None else (worker, shard)
        if self._suspects.intersection(due):
            return None  # it needs a worker of its own, and there will be one only if nobody reads ahead now
        ahead = {
            worker: holdings[0].share
            for worker, holdings in held.items()
            if len(holdings) < LEASES and holdings[0].lease.shard not in self._suspects
        }
        shard, spare = self._next(due), self.waiting - coming
        if not ahead or shard is None or spare <= 0:
            return None
        furthest = max(ahead, key=lambda worker: ahead[worker])
        if spare < len(held) and ahead[furthest] < 0.5:
            return None
        return furthest, shard

    def grant(self, worker: int, lease: Lease) -> None:
        if lease.shard in self._again:
            del self._again[lease.shard]
        else:
            self._fresh.remove(lease.shard)
        self._held[lease.attempt] = Holding(worker, lease)

    def note(self, progress: Progress) -> None:
        if holding := self._held.get(progress.attempt):
            holding.stage = progress.stage
            holding.share = progress.step / progress.steps

    def done(self, lease: Lease) -> None:
        del self._held[lease.attempt]
        self._suspects.discard(lease.shard)

    def returned(self, lease: Lease) -> None:
        """The worker left the shard because it was asked to."""
        self._release(lease, "stopped before it was finished", charged=False)

    def failed(self, lease: Lease, why: str, charged: bool = True) -> bool:
        """The attempt failed and its worker lives. Whether the shard will be tried again."""
        self._release(lease, why, charged)
        return lease.shard not in self._given_up

    def lost(self, worker: int, why: str) -> None:
        """The worker died. Charged are the shards it had begun to sample, or else the oldest; not one read ahead."""
        holdings = self._of(worker)
        guilty = [holding for holding in holdings if holding.stage != "read"] or holdings[:1]
        for holding in holdings:
            self._suspects.add(holding.lease.shard)
            self._release(holding.lease, why, charged=holding in guilty)

    def unfinished(self) -> dict[int, str]:
        """Why each shard that is not done is open."""
        left = {*self._fresh, *self._again, *self._given_up, *(held.lease.shard for held in self._held.values())}
        return {shard: self._why.get(shard, "stopped before it was begun") for shard in sorted(left)}

    def _of(self, worker: int) -> list[Holding]:
        return [holding for holding in self._held.values() if holding.worker == worker]

    def _next(self, due: list[int]) -> int | None:
        return due[0] if due else self._fresh[0] if self._fresh else None

    def _release(self, lease: Lease, why: str, charged: bool) -> None:
        del self._held[lease.attempt]
        shard = lease.shard
        self._failures[shard] += charged
        self._why[shard] = why
        if charged and self._failures[shard] >= self._attempts:
            self._why[shard] = f"{self._attempts} attempts failed, the last one: {why}"
            self._given_up.add(shard)
        else:
            self._again[shard] = self._clock() + (backoff(self._failures[shard]) if charged else 0)
