"""Timeouts and polling intervals of the driver, the clock they are measured with, and the pause before a retry."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

MAX_CLOCK_STEP = 10  # seconds; a longer step means that the driver process was suspended


@dataclass(frozen=True)
class Timeouts:
    """How long the driver waits, in seconds.

    connect: for the address of a cluster to answer.
    placement: for Ray to place the first worker. An autoscaler may have to start a machine for it.
    placement_notice: for Ray to place a worker, before the user is told that the run waits for it.
    shutdown: for workers that were asked to stop to write their checkpoints.
    poll_interval: between two requests to one worker for its progress.
    cluster_poll_interval: between two requests to Ray for the resources of the cluster.
    """

    connect: float = 10
    placement: float = 300
    placement_notice: float = 15
    shutdown: float = 300
    poll_interval: float = 0.5
    cluster_poll_interval: float = 10


def backoff(failures: int, maximum: float = 30) -> float:
    """Seconds to wait after `failures` failures in a row: 0.5, doubled each time up to `maximum`, times 0.5 to 1.5.

    The random factor keeps workers that failed together from coming back together.
    """
    return float(min(0.5 * 2 ** max(failures - 1, 0), maximum) * random.uniform(0.5, 1.5))


class DriverClock:
    """Seconds that the driver process has run. The time in which it was suspended does not make a worker overdue."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._advanced_at = time.monotonic()

    def __call__(self) -> float:
        return self._seconds

    def advance(self) -> None:
        """Add the time since the last call, at most MAX_CLOCK_STEP seconds."""
        now = time.monotonic()
        self._seconds += min(now - self._advanced_at, MAX_CLOCK_STEP)
        self._advanced_at = now
