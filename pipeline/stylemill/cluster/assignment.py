"""Who works on which shard, and how often it is tried. Policy only: it knows neither Ray nor files."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from stylemill.cluster.bisect import Hunt
from stylemill.cluster.timeouts import backoff
from stylemill.execution.attempt import Lease, Progress

STUCK = 2  # deaths of a shard's workers without a step more, until the pair that kills them is hunted
LEASES = 2  # a worker holds: one samples while the other is read ahead or written


@dataclass
class Holding:
    """A lease in the hands of a worker, and how far it is known to be."""

    worker: int
    lease: Lease
    since: float  # when it came to where it is
    stage: str = "read"
    step: int = 0
    share: float = 0.0  # of the steps done
    limit: float | None = None  # seconds it may stay there; None: as long as its worker answers

    @property
    def begun(self) -> bool:
        """Whether it had the device."""
        return self.stage not in ("read", "wait")


class LeaseBook:
    """Every open shard is waiting, held or given up; `attempts` failures give it up.

    A shard whose worker died is a suspect: it is tried again alone in its worker, so that the next death can be blamed
    on the right one. Where one death follows another and no step is made, the pair that kills is hunted and left out.

    `pairs` tells a shard's number of pairs, `saved` the step of its newest checkpoint, `every` how far apart those are.
    """

    def __init__(
        self,
        shards: Sequence[int],
        attempts: int,
        clock: Callable[[], float] = time.monotonic,
        pairs: Callable[[int], int] = lambda shard: 0,
        saved: Callable[[int], int] = lambda shard: 0,
        every: int = 1,
    ) -> None:
        self._attempts = attempts
        self._clock = clock
        self._pairs, self._saved, self._every = pairs, saved, every
        self._committed = False  # whether any shard was, since the start
        self._stuck: dict[int, tuple[int, int]] = {}  # shard -> the step it came to, and deaths since
        self._hunts: dict[int, Hunt] = {}
        self._hunted: set[int] = set()  # in vain
        self._killers: dict[int, dict[int, str]] = {}
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
        self._held[lease.attempt] = Holding(worker, lease, self._clock())

    def fit_out(self, lease: Lease) -> Lease:
        """The lease with what is known of the shard's killers, or what is to be tried to find them."""
        hunt = self._hunts.get(lease.shard)
        killers = self._killers.get(lease.shard, {})
        return replace(lease, killers=dict(killers), probe=hunt.probe if hunt else None)

    def note(self, progress: Progress) -> None:
        if holding := self._held.get(progress.attempt):
            if (progress.stage, progress.step) != (holding.stage, holding.step) or holding.limit is None:
                holding.since = self._clock()
            holding.stage, holding.step, holding.limit = progress.stage, progress.step, progress.limit
            holding.share = progress.step / progress.steps

    def overdue(self, longest: float) -> Iterator[tuple[int, str]]:
        """Workers that hang, and where. While nothing is heard of how long it may take, that is `longest` seconds."""
        for holding in list(self._held.values()):
            limit = holding.limit or longest
            if self._clock() - holding.since > limit:
                where = f"shard {holding.lease.shard}, stage {holding.stage}, step {holding.step}"
                yield holding.worker, f"no progress for {limit:.0f} s in {where}"

    def done(self, lease: Lease) -> None:
        del self._held[lease.attempt]
        self._suspects.discard(lease.shard)
        self._hunts.pop(lease.shard, None)
        self._committed = True

    def survived(self, lease: Lease) -> None:
        """The worker came through the lease's probe."""
        self._hunts[lease.shard].survived()
        self._probed(lease, 0.0)

    def returned(self, lease: Lease) -> None:
        """The worker left the shard because it was asked to."""
        self._release(lease, "stopped before it was finished", charged=False)

    def failed(self, lease: Lease, why: str, charged: bool = True, fatal: bool = False) -> bool:
        """The attempt failed; `fatal`: and its worker is to be replaced. Whether the shard will be tried again."""
        if fatal and charged:
            self._killed(self._held[lease.attempt], why)
        else:
            self._release(lease, why, charged)
        return lease.shard not in self._given_up

    def lost(self, worker: int, why: str) -> None:
        """The worker died. Charged are the shards it had begun to sample, or else the oldest; not one read ahead."""
        holdings = self._of(worker)
        guilty = [holding for holding in holdings if holding.begun] or holdings[:1]
        for holding in holdings:
            if holding in guilty:
                self._killed(holding, why)
            else:
                self._suspects.add(holding.lease.shard)
                self._release(holding.lease, why, charged=False)

    def unfinished(self) -> dict[int, str]:
        """Why each shard that is not done is open."""
        left = {*self._fresh, *self._again, *self._given_up, *(held.lease.shard for held in self._held.values())}
        return {shard: self._why.get(shard, "stopped before it was begun") for shard in sorted(left)}

    def _killed(self, holding: Holding, why: str) -> None:
        """A worker died over this shard, or cannot be trusted any more."""
        lease, shard = holding.lease, holding.lease.shard
        self._suspects.add(shard)
        if lease.probe:
            self._hunts[shard].died()
            self._probed(lease, backoff(1))
            return
        self._release(lease, why, charged=True)
        saved = self._saved(shard)
        step, (before, deaths) = max(saved, holding.step), self._stuck.get(shard, (-1, 0))
        self._stuck[shard] = (step, 1) if step > before else (before, deaths + 1)
        if self._stuck[shard][1] >= STUCK and shard not in self._hunted:
            places = [place for place in range(self._pairs(shard)) if place not in self._killers.get(shard, {})]
            if places:
                # It died before its next checkpoint.
                self._hunts[shard] = Hunt(places, max(step, saved + self._every), lambda: self._committed)
                self._given_up.discard(shard)
                self._again[shard] = self._clock() + backoff(1)

    def _probed(self, lease: Lease, pause: float) -> None:
        """A probe is over; with the last one the hunt is, too."""
        shard, hunt = lease.shard, self._hunts[lease.shard]
        del self._held[lease.attempt]
        self._again[shard] = self._clock() + pause
        if hunt.probe is None:
            del self._hunts[shard]
            if found := hunt.found:
                self._killers.setdefault(shard, {}).update(found)
                self._failures[shard] = 0
                del self._stuck[shard]
            else:
                self._hunted.add(shard)
                self._give_up_if_spent(shard, f"{self._why[shard]}; no single pair does that")

    def _of(self, worker: int) -> list[Holding]:
        return [holding for holding in self._held.values() if holding.worker == worker]

    def _next(self, due: list[int]) -> int | None:
        return due[0] if due else self._fresh[0] if self._fresh else None

    def _release(self, lease: Lease, why: str, charged: bool) -> None:
        del self._held[lease.attempt]
        shard = lease.shard
        self._failures[shard] += charged
        self._why[shard] = why
        self._again[shard] = self._clock() + (backoff(self._failures[shard]) if charged else 0)
        if charged:
            self._give_up_if_spent(shard, why)

    def _give_up_if_spent(self, shard: int, why: str) -> None:
        if self._failures[shard] >= self._attempts:
            self._why[shard] = f"{self._attempts} attempts failed, the last one: {why}"
            self._given_up.add(shard)
            self._again.pop(shard, None)
            self._hunts.pop(shard, None)
