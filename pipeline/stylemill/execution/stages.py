"""What a worker tells of the stages of a shard: where it stands, how long it may stay there, how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stylemill.config.job import Job
from stylemill.execution.attempt import Attempt, Progress

if TYPE_CHECKING:
    from stylemill.engine import SampleState

STEP_LIMIT_FACTOR = 20  # a worker hangs when a step takes this many times the slowest step before it


class ProgressReporter:
    """Reports where a shard stands, with the seconds until the next report, after which its worker counts as hanging.

    The limit of a step follows from the slowest step of its kind so far (`Sampling.step_kind`). The first step of a
    kind, and any other stage, has `cluster.stage_timeout`.
    """

    def __init__(self, job: Job, attempt: Attempt, pairs: int, send: Callable[[Progress], None]) -> None:
        self._job = job
        self._attempt = attempt
        self.pairs = pairs
        self._send = send
        self._slowest: dict[tuple[bool, bool], float] = {}  # seconds of a step, by its kind
        self._last = ("", 0, 0.0)  # stage, step and time of the last report

    def __call__(self, stage: str, state: SampleState | None = None) -> None:
        sampling = self._job.sampling
        step, now = state.step if state else sampling.first_step, time.monotonic()
        if stage == "sample" and self._last[:2] == ("sample", step - 1):
            kind = sampling.step_kind(step - 1)
            self._slowest[kind] = max(self._slowest.get(kind, 0.0), now - self._last[2])
        self._last = (stage, step, now)
        limit = self._limit(stage, step)
        self._send(Progress(self._attempt.shard, self._attempt.id, stage, step, sampling.steps, self.pairs, limit))

    def _limit(self, stage: str, step: int) -> float | None:
        cluster = self._job.cluster
        if stage == "wait":
            return None
        if stage == "sample" and (slowest := self._slowest.get(self._job.sampling.step_kind(step))):
            return max(cluster.step_timeout, STEP_LIMIT_FACTOR * slowest)
        return cluster.stage_timeout


class StageTimer:
    """Seconds spent in each stage of a shard, for its record."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
