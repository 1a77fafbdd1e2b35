"""Which worker gets which shard, and how often a shard is attempted. Policy only, without Ray or files."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from stylemill.cluster.bisect import Bisection
from stylemill.cluster.timeouts import backoff
from stylemill.execution.attempt import STOPPED, Attempt, Progress
from stylemill.plural import counted

DEATHS_BEFORE_BISECTION = 2  # worker deaths over one shard at the same step
ATTEMPTS_PER_WORKER = 2  # one samples while the other reads its inputs or writes its images


@dataclass
class Assignment:
    """An attempt that a worker is processing, and its last known progress."""

    worker: int
    attempt: Attempt
    since: float  # when the attempt reached this stage and step
    stage: str = "read"
    step: int = 0
    fraction_done: float = 0.0  # of the sampling steps
    limit: float | None = None  # seconds until the next progress is due; None: the attempt waits for the device

    @property
    def reached_device(self) -> bool:
        return self.stage not in ("read", "wait")


class Assignments:
    """The state of every shard that is not committed: waiting, assigned, or given up after `max_attempts` failures.

    A shard whose worker died is attempted again alone in a worker, so that the cause of another death is known. After
    two deaths at the same step, a bisection looks for the poison pairs of the shard, and later attempts leave them out.

    `pairs_in` returns the number of pairs of a shard, `checkpoint_step` the step of its newest checkpoint, and
    `checkpoint_every` is the number of steps between two checkpoints.
    """

    def __init__(
        self,
        shards: Sequence[int],
        max_attempts: int,
        clock: Callable[[], float] = time.monotonic,
        pairs_in: Callable[[int], int] = lambda shard: 0,
        checkpoint_step: Callable[[int], int] = lambda shard: 0,
        checkpoint_every: int = 1,
    ) -> None:
        self._max_attempts = max_attempts
        self._clock = clock
        self._pairs_in, self._checkpoint_step, self._checkpoint_every = pairs_in, checkpoint_step, checkpoint_every
        self._untried = deque(shards)
        self._retry_at: dict[int, float] = {}  # shard to attempt again -> earliest time
        self._assigned: dict[str, Assignment] = {}  # by attempt id, oldest first
        self._given_up: set[int] = set()
        self._failures: Counter[int] = Counter()  # by shard
        self._reasons: dict[int, str] = {}  # shard -> why its last attempt ended
        self._run_alone: set[int] = set()  # shards whose worker died; they share no worker
        self._deaths: dict[int, tuple[int, int]] = {}  # shard -> (furthest step, worker deaths since it was reached)
        self._any_committed = False  # since the start of the run
        self._bisections: dict[int, Bisection] = {}
        self._bisected_without_result: set[int] = set()
        self._poison_pairs: dict[int, dict[int, str]] = {}  # shard -> place -> stage

    @property
    def num_open(self) -> int:
        """Number of shards that are neither committed nor given up."""
        return self.num_waiting + self.num_assigned

    @property
    def num_waiting(self) -> int:
        return len(self._untried) + len(self._retry_at)

    @property
    def num_assigned(self) -> int:
        return len(self._assigned)

    def attempts_of(self, worker: int) -> list[Attempt]:
        """The attempts of a worker, oldest first."""
        return [assignment.attempt for assignment in self._of(worker)]

    def choose(self, workers: Iterable[int], num_loading: int = 0) -> tuple[int, int] | None:
        """The next (worker, shard) to assign, or None for now. `num_loading` workers will be ready soon.

        A worker gets a second attempt only when every worker has one and enough shards are left for those that load.
        When few shards are left, the second attempt also waits until the worker is half-way through its first:
        another worker may finish sooner.
        """
        assigned = {worker: self._of(worker) for worker in workers}
        due = [shard for shard, when in self._retry_at.items() if when <= self._clock()]
        for worker, assignments in assigned.items():
            if not assignments:
                shard = self._next(due)
                return None if shard is None else (worker, shard)
        if self._run_alone.intersection(due):
            return None  # the shard needs an idle worker, and there is one only if no worker gets a second attempt now
        fraction_done = {
            worker: assignments[0].fraction_done
            for worker, assignments in assigned.items()
            if len(assignments) < ATTEMPTS_PER_WORKER and assignments[0].attempt.shard not in self._run_alone
        }
        shard, num_spare = self._next(due), self.num_waiting - num_loading
        if not fraction_done or shard is None or num_spare <= 0:
            return None
        furthest = max(fraction_done, key=lambda worker: fraction_done[worker])
        if num_spare < len(assigned) and fraction_done[furthest] < 0.5:
            return None
        return furthest, shard

    def with_history(self, attempt: Attempt) -> Attempt:
        """The attempt with what follows from earlier ones at its shard.

        That is whether it is the last one, the known poison pairs and, during a bisection, the next probe.
        """
        bisection = self._bisections.get(attempt.shard)
        return replace(
            attempt,
            last=self._failures[attempt.shard] + 1 >= self._max_attempts,
            poison_pairs=dict(self._poison_pairs.get(attempt.shard, {})),
            probe=bisection.probe if bisection else None,
        )

    def assign(self, worker: int, attempt: Attempt) -> None:
        if attempt.shard in self._retry_at:
            del self._retry_at[attempt.shard]
        else:
            self._untried.remove(attempt.shard)
        self._assigned[attempt.id] = Assignment(worker, attempt, self._clock())

    def record_progress(self, progress: Progress) -> bool:
        """Record the progress of an attempt; False for one that is over, whose last reply was faster."""
        if (assignment := self._assigned.get(progress.attempt_id)) is None:
            return False
        if (progress.stage, progress.step) != (assignment.stage, assignment.step) or assignment.limit is None:
            assignment.since = self._clock()
        assignment.stage, assignment.step, assignment.limit = progress.stage, progress.step, progress.limit
        assignment.fraction_done = progress.step / progress.steps
        return True

    def overdue(self, default_limit: float) -> Iterator[tuple[int, str]]:
        """Workers without progress for longer than their limit, and where they hang.

        `default_limit` (seconds) applies to an attempt without a limit of its own.
        """
        for assignment in list(self._assigned.values()):
            limit = assignment.limit or default_limit
            if self._clock() - assignment.since > limit:
                where = f"shard {assignment.attempt.shard}, stage {assignment.stage}, step {assignment.step}"
                yield assignment.worker, f"no progress for {limit:.0f} s in {where}"

    def committed(self, attempt: Attempt) -> None:
        del self._assigned[attempt.id]
        self._run_alone.discard(attempt.shard)
        self._bisections.pop(attempt.shard, None)
        self._any_committed = True

    def probe_survived(self, attempt: Attempt) -> None:
        self._bisections[attempt.shard].worker_survived()
        self._finish_probe(attempt, 0.0)

    def stopped(self, attempt: Attempt) -> None:
        """The worker ended the attempt because it was asked to stop."""
        self._release(attempt, STOPPED, charged=False)

    def failed(self, attempt: Attempt, reason: str, charged: bool = True, fatal: bool = False) -> bool:
        """Record a failed attempt; returns whether the shard will be attempted again.

        `charged` counts the attempt against `max_attempts`. `fatal` counts the failure as a death of the worker.
        """
        if fatal and charged:
            self._record_death(self._assigned[attempt.id], reason)
        else:
            self._release(attempt, reason, charged)
        return attempt.shard not in self._given_up

    def worker_died(self, worker: int, reason: str) -> None:
        """Return the shards of a dead worker. Those it sampled are charged an attempt, or else its oldest one.

        A shard whose inputs it only read beside another one is not charged.
        """
        assignments = self._of(worker)
        charged = [assignment for assignment in assignments if assignment.reached_device] or assignments[:1]
        for assignment in assignments:
            if assignment in charged:
                self._record_death(assignment, reason)
            else:
                self._run_alone.add(assignment.attempt.shard)
                self._release(assignment.attempt, reason, charged=False)

    def open_shards(self) -> dict[int, str]:
        """Each shard that is not committed, with the reason."""
        assigned = (assignment.attempt.shard for assignment in self._assigned.values())
        shards = {*self._untried, *self._retry_at, *self._given_up, *assigned}
        return {shard: self._reasons.get(shard, STOPPED) for shard in sorted(shards)}

    def _record_death(self, assignment: Assignment, reason: str) -> None:
        """A worker died while it processed this shard, or can no longer be trusted."""
        attempt, shard = assignment.attempt, assignment.attempt.shard
        self._run_alone.add(shard)
        if attempt.probe:
            self._bisections[shard].worker_died()
            self._finish_probe(attempt, backoff(1))
            return
        self._release(attempt, reason, charged=True)
        checkpoint_step = self._checkpoint_step(shard)
        step, (furthest, deaths) = max(checkpoint_step, assignment.step), self._deaths.get(shard, (-1, 0))
        self._deaths[shard] = (step, 1) if step > furthest else (furthest, deaths + 1)
        if self._deaths[shard][1] >= DEATHS_BEFORE_BISECTION and shard not in self._bisected_without_result:
            known = self._poison_pairs.get(shard, {})
            if places := [place for place in range(self._pairs_in(shard)) if place not in known]:
                # The worker died before the next checkpoint, since there is none.
                until = max(step, checkpoint_step + self._checkpoint_every)
                self._bisections[shard] = Bisection(places, until, lambda: self._any_committed)
                self._given_up.discard(shard)
                self._retry_at[shard] = self._clock() + backoff(1)

    def _finish_probe(self, attempt: Attempt, pause: float) -> None:
        """End a probe and, if it was the last one, its bisection."""
        shard, bisection = attempt.shard, self._bisections[attempt.shard]
        del self._assigned[attempt.id]
        self._retry_at[shard] = self._clock() + pause
        if bisection.probe is None:
            del self._bisections[shard]
            if poison_pairs := bisection.poison_pairs:
                self._poison_pairs.setdefault(shard, {}).update(poison_pairs)
                self._failures[shard] = 0
                del self._deaths[shard]
            else:
                self._bisected_without_result.add(shard)
                self._give_up_if_spent(shard, f"{self._reasons[shard]}; no single pair causes this")

    def _of(self, worker: int) -> list[Assignment]:
        return [assignment for assignment in self._assigned.values() if assignment.worker == worker]

    def _next(self, due: list[int]) -> int | None:
        return due[0] if due else self._untried[0] if self._untried else None

    def _release(self, attempt: Attempt, reason: str, charged: bool) -> None:
        del self._assigned[attempt.id]
        shard = attempt.shard
        self._failures[shard] += charged
        self._reasons[shard] = reason
        self._retry_at[shard] = self._clock() + (backoff(self._failures[shard]) if charged else 0)
        if charged:
            self._give_up_if_spent(shard, reason)

    def _give_up_if_spent(self, shard: int, reason: str) -> None:
        if self._failures[shard] >= self._max_attempts:
            self._reasons[shard] = f"{counted(self._max_attempts, 'attempt')} failed, the last one: {reason}"
            self._given_up.add(shard)
            self._retry_at.pop(shard, None)
            self._bisections.pop(shard, None)
