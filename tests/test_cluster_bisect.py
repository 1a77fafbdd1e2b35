"""The bisection finds the pairs that kill their workers, and only those."""

from __future__ import annotations

import random

import pytest

from stylemill.cluster.bisect import MAX_POISON_PAIRS, Bisection
from stylemill.execution.attempt import Probe


def run_bisection(bisection: Bisection, reading: set[int], sampling: set[int]) -> list[Probe]:
    """Run a bisection where the pairs at these places kill their worker; returns the probes."""
    probes = []
    while probe := bisection.probe:
        probes.append(probe)
        kill = reading if probe.stage == "read" else reading | sampling
        if kill.intersection(probe.places):
            bisection.worker_died()
        else:
            bisection.worker_survived()
    return probes


@pytest.mark.parametrize("seed", range(20))
def test_all_poison_pairs_are_found_and_no_others(seed: int) -> None:
    draw = random.Random(seed)
    pairs = draw.randint(2, 200)
    poison_pairs = set(draw.sample(range(pairs), draw.randint(1, min(3, pairs - 1))))
    stage = draw.choice(["read", "sample"])
    bisection = Bisection(range(pairs), 7, lambda: False)
    probes = run_bisection(
        bisection, poison_pairs if stage == "read" else set(), poison_pairs if stage == "sample" else set()
    )
    assert bisection.poison_pairs == dict.fromkeys(poison_pairs, stage)
    assert len(probes) <= 2 + len(poison_pairs) * (2 * pairs.bit_length() + 1)
    assert {probe.until for probe in probes} == {7}


def test_no_pair_is_blamed_if_every_worker_dies() -> None:
    for others_committed, poison_pairs in ((False, []), (True, [0, 1])):
        bisection = Bisection(range(2), 1, lambda committed=others_committed: committed)  # type: ignore[misc]
        run_bisection(bisection, {0, 1}, set())
        assert list(bisection.poison_pairs) == poison_pairs


@pytest.mark.parametrize("deaths", [{1}, {1, 2}, {1, 2, 4}, {1, 3, 5}])
def test_no_pair_is_blamed_if_workers_are_preempted(deaths: set[int]) -> None:
    """The workers of these sampling probes die, but no two in a row with the same single pair."""
    bisection, number = Bisection(range(4), 7, lambda: True), 0
    while probe := bisection.probe:
        bisection.worker_died() if number in deaths else bisection.worker_survived()
        number += probe.stage == "sample"
    assert bisection.poison_pairs == {}


def test_no_pair_is_blamed_if_too_many_kill_their_workers() -> None:
    bisection = Bisection(range(100), 1, lambda: True)
    probes = run_bisection(bisection, set(range(0, 100, 2)), set())
    assert bisection.poison_pairs == {}
    assert len(probes) <= 5 * MAX_POISON_PAIRS + 8
