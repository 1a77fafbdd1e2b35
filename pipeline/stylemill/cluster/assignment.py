"""Who works on which shard, and how often it is tried. Policy only: it knows neither Ray nor files."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from stylemill.cluster.bisect import Bisection
from stylemill.cluster.timeouts import backoff
from stylemill.execution.attempt import Attempt, Progress

STUCK = 2  # deaths of a shard's workers without a step more, until the pair that kills them is hunted
ATTEMPTS_PER_WORKER = 2  # a worker holds: one samples while the other is read ahead or written


@dataclass
class Assignment:
    """A attempt in the hands of a worker, and how far it is known to be."""

    worker: int
    attempt: Attempt
    since: float  # when it came to where it is
    stage: str = "read"
    step: int = 0
    share: float = 0.0  # of the steps done
    limit: float | None = None  # seconds it may stay there; None: as long as its worker answers

    @property
    def begun(self) -> bool:
        """Whether it had the device."""
        return self.stage not in ("read", "wait")


class Assignments:
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
        self._bisections: dict[int, Bisection] = {}
        self._bisected_in_vain: set[int] = set()  # in vain
        self._poison_pairs: dict[int, dict[int, str]] = {}
        self._fresh = deque(shards)
        self._again: dict[int, float] = {}  # shard to try again -> not before
        self._held: dict[str, Assignment] = {}  # by attempt, oldest first
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

    def held_by(self, worker: int) -> list[Attempt]:
        """Oldest first."""
        return [assignment.attempt for assignment in self._of(worker)]

    def choose(self, workers: Iterable[int], coming: int = 0) -> tuple[int, int] | None:
        """The next (worker, shard) to bring together, or None for now. `coming` workers will be ready soon.

        Breadth first: a worker gets a second attempt only when no worker is without one and none that is coming will
        want the shard. Near the end the second one is also withheld from a worker not half through its first:
        another may be free sooner.
        """
        held = {worker: self._of(worker) for worker in workers}
        due = [shard for shard, when in self._again.items() if when <= self._clock()]
        for worker, assignments in held.items():
            if not assignments:
                shard = self._next(due)
                return None if shard is None else (worker, shard)
        if self._suspects.intersection(due):
            return None  # it needs a worker of its own, and there will be one only if nobody reads ahead now
        ahead = {
            worker: assignments[0].share
            for worker, assignments in held.items()
            if len(assignments) < ATTEMPTS_PER_WORKER and assignments[0].attempt.shard not in self._suspects
        }
        shard, spare = self._next(due), self.waiting - coming
        if not ahead or shard is None or spare <= 0:
            return None
        furthest = max(ahead, key=lambda worker: ahead[worker])
        if spare < len(held) and ahead[furthest] < 0.5:
            return None
        return furthest, shard

    def grant(self, worker: int, attempt: Attempt) -> None:
        if attempt.shard in self._again:
            del self._again[attempt.shard]
        else:
            self._fresh.remove(attempt.shard)
        self._held[attempt.id] = Assignment(worker, attempt, self._clock())

    def fit_out(self, attempt: Attempt) -> Attempt:
        """The attempt with what is known of the shard's poison_pairs, or what is to be tried to find them."""
        bisection = self._bisections.get(attempt.shard)
        poison_pairs = self._poison_pairs.get(attempt.shard, {})
        return replace(attempt, poison_pairs=dict(poison_pairs), probe=bisection.probe if bisection else None)

    def note(self, progress: Progress) -> None:
        if assignment := self._held.get(progress.attempt_id):
            if (progress.stage, progress.step) != (assignment.stage, assignment.step) or assignment.limit is None:
                assignment.since = self._clock()
            assignment.stage, assignment.step, assignment.limit = progress.stage, progress.step, progress.limit
            assignment.share = progress.step / progress.steps

    def overdue(self, longest: float) -> Iterator[tuple[int, str]]:
        """Workers that hang, and where. While nothing is heard of how long it may take, that is `longest` seconds."""
        for assignment in list(self._held.values()):
            limit = assignment.limit or longest
            if self._clock() - assignment.since > limit:
                where = f"shard {assignment.attempt.shard}, stage {assignment.stage}, step {assignment.step}"
                yield assignment.worker, f"no progress for {limit:.0f} s in {where}"

    def done(self, attempt: Attempt) -> None:
        del self._held[attempt.id]
        self._suspects.discard(attempt.shard)
        self._bisections.pop(attempt.shard, None)
        self._committed = True

    def survived(self, attempt: Attempt) -> None:
        """The worker came through the attempt's probe."""
        self._bisections[attempt.shard].survived()
        self._probed(attempt, 0.0)

    def returned(self, attempt: Attempt) -> None:
        """The worker left the shard because it was asked to."""
        self._release(attempt, "stopped before it was finished", charged=False)

    def failed(self, attempt: Attempt, why: str, charged: bool = True, fatal: bool = False) -> bool:
        """The attempt failed; `fatal`: and its worker is to be replaced. Whether the shard will be tried again."""
        if fatal and charged:
            self._killed(self._held[attempt.id], why)
        else:
            self._release(attempt, why, charged)
        return attempt.shard not in self._given_up

    def lost(self, worker: int, why: str) -> None:
        """The worker died. Charged are the shards it had begun to sample, or else the oldest; not one read ahead."""
        assignments = self._of(worker)
        guilty = [assignment for assignment in assignments if assignment.begun] or assignments[:1]
        for assignment in assignments:
            if assignment in guilty:
                self._killed(assignment, why)
            else:
                self._suspects.add(assignment.attempt.shard)
                self._release(assignment.attempt, why, charged=False)

    def unfinished(self) -> dict[int, str]:
        """Why each shard that is not done is open."""
        left = {*self._fresh, *self._again, *self._given_up, *(held.attempt.shard for held in self._held.values())}
        return {shard: self._why.get(shard, "stopped before it was begun") for shard in sorted(left)}

    def _killed(self, assignment: Assignment, why: str) -> None:
        """A worker died over this shard, or cannot be trusted any more."""
        attempt, shard = assignment.attempt, assignment.attempt.shard
        self._suspects.add(shard)
        if attempt.probe:
            self._bisections[shard].died()
            self._probed(attempt, backoff(1))
            return
        self._release(attempt, why, charged=True)
        saved = self._saved(shard)
        step, (before, deaths) = max(saved, assignment.step), self._stuck.get(shard, (-1, 0))
        self._stuck[shard] = (step, 1) if step > before else (before, deaths + 1)
        if self._stuck[shard][1] >= STUCK and shard not in self._bisected_in_vain:
            places = [place for place in range(self._pairs(shard)) if place not in self._poison_pairs.get(shard, {})]
            if places:
                # It died before its next checkpoint.
                self._bisections[shard] = Bisection(places, max(step, saved + self._every), lambda: self._committed)
                self._given_up.discard(shard)
                self._again[shard] = self._clock() + backoff(1)

    def _probed(self, attempt: Attempt, pause: float) -> None:
        """A probe is over; with the last one the bisection is, too."""
        shard, bisection = attempt.shard, self._bisections[attempt.shard]
        del self._held[attempt.id]
        self._again[shard] = self._clock() + pause
        if bisection.probe is None:
            del self._bisections[shard]
            if found := bisection.found:
                self._poison_pairs.setdefault(shard, {}).update(found)
                self._failures[shard] = 0
                del self._stuck[shard]
            else:
                self._bisected_in_vain.add(shard)
                self._give_up_if_spent(shard, f"{self._why[shard]}; no single pair does that")

    def _of(self, worker: int) -> list[Assignment]:
        return [assignment for assignment in self._held.values() if assignment.worker == worker]

    def _next(self, due: list[int]) -> int | None:
        return due[0] if due else self._fresh[0] if self._fresh else None

    def _release(self, attempt: Attempt, why: str, charged: bool) -> None:
        del self._held[attempt.id]
        shard = attempt.shard
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
            self._bisections.pop(shard, None)
