"""How long the driver waits for what, and how it waits between tries."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Seconds."""

    connect: float = 10  # until the port of a cluster answers
    place: float = 300  # until a cluster has room for the first worker; an autoscaler may have to start a machine
    remark: float = 15  # of waiting for room before the user is told
    leave: float = 300  # until workers that were asked to stop have written their checkpoints
    beat: float = 0.5  # between two questions to a worker how far it is
    survey: float = 10  # between two looks at how large the cluster is


def backoff(tries: int, longest: float = 30) -> float:
    """Seconds to wait before try number `tries` + 1: doubling from 0.5, jittered so that many do not come at once."""
    return float(min(0.5 * 2 ** max(tries - 1, 0), longest) * random.uniform(0.5, 1.5))
