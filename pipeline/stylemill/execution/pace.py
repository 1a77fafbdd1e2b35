"""How far a run is, how fast it is and how long it will take, from what its workers report."""

from __future__ import annotations

import time
from collections.abc import Callable

from stylemill.execution.attempt import Progress

_BEFORE_SAMPLING = ("read", "wait")  # the stages in which a shard only gets ready


class Pace:
    """Counts rows: those that are committed, and of the shards in flight the share of their steps that are done.

    The rate is that since the first step was done, so it does not count the time in which Ray starts, models are loaded
    and a first step warms up. Steps that a checkpoint held count as done, but not for the rate.
    """

    def __init__(self, total: int, done: int, first_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = done
        self.in_flight: dict[int, Progress] = {}  # by shard, the last report of each
        self._first_step = first_step
        self._clock = clock
        self._began: float | None = None  # when the first step was done
        self._shares_at_start: dict[int, float] = {}  # by shard, then or when it began to sample later
        self._sampled = 0.0  # rows of the committed shards that were sampled since

    @property
    def sampling(self) -> list[Progress]:
        """The reports of the shards that got beyond reading."""
        return [progress for progress in self.in_flight.values() if progress.stage not in _BEFORE_SAMPLING]

    @property
    def share(self) -> float:
        """The share of the steps of the shards in flight that are done."""
        pairs = sum(progress.pairs for progress in self.sampling)
        return self._rows_in_flight() / pairs if pairs else 0.0

    def moved(self, progress: Progress) -> None:
        """A shard progressed."""
        self.in_flight[progress.shard] = progress
        if progress.stage not in _BEFORE_SAMPLING:
            self._shares_at_start.setdefault(progress.shard, self._share(progress))
        if progress.stage == "sample" and self._began is None:
            self._began = self._clock()
            self._shares_at_start = {other.shard: self._share(other) for other in self.sampling}

    def committed(self, shard: int, done: int) -> None:
        """A shard was committed, and `done` rows are committed now."""
        progress = self.in_flight.pop(shard, None)
        if progress and shard in self._shares_at_start:
            self._sampled += progress.pairs * (1 - self._shares_at_start.pop(shard))
        self.done = done

    def rate(self) -> float | None:
        """Rows a second; None before the second step, as there is nothing to judge from."""
        rows = self._sampled + sum(
            progress.pairs * max(self._share(progress) - self._shares_at_start[progress.shard], 0.0)
            for progress in self.sampling
        )
        seconds = self._clock() - self._began if self._began is not None else 0.0
        return rows / seconds if rows and seconds else None

    def seconds_left(self) -> float | None:
        rate = self.rate()
        return max(self.total - self.done - self._rows_in_flight(), 0.0) / rate if rate else None

    def _share(self, progress: Progress) -> float:
        return (progress.step - self._first_step) / max(progress.steps - self._first_step, 1)

    def _rows_in_flight(self) -> float:
        return sum(progress.pairs * self._share(progress) for progress in self.sampling)
