"""The bisection finds the pairs that kill their workers, and only those."""

from __future__ import annotations

import random

import pytest

from stylemill.cluster.assignment import Assignments
from stylemill.cluster.bisect import MAX_POISON_PAIRS, Bisection
from stylemill.execution.attempt import Attempt, Probe, Progress


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
        bisection = Bisection(range(2), 1, lambda survive=others_committed: survive)  # type: ignore[misc]
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


# --- bisection as part of the assignments -----------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def take(assignments: Assignments, clock: Clock) -> Attempt:
    """Assign the next attempt to worker 1."""
    clock.now += 60
    choice = assignments.choose([1])
    assert choice
    attempt = assignments.with_bisection(Attempt(choice[1], f"attempt at {clock.now}", {}))
    assignments.assign(1, attempt)
    return attempt


def die_at(assignments: Assignments, attempt: Attempt, step: int) -> None:
    assignments.record_progress(Progress(attempt.shard, attempt.id, "sample", step, 20, 4))
    assignments.worker_died(1, "killed")


def test_two_deaths_at_one_step_start_a_bisection_and_its_poison_pairs_are_left_out() -> None:
    clock = Clock()
    assignments = Assignments(
        [0], 3, clock, pairs_in=lambda shard: 4, checkpoint_step=lambda shard: 10, checkpoint_every=5
    )
    die_at(assignments, take(assignments, clock), 12)
    attempt = take(assignments, clock)
    assert (attempt.probe, attempt.poison_pairs) == (None, {})
    die_at(assignments, attempt, 12)
    attempt = take(assignments, clock)
    assert attempt.probe == Probe((0, 1, 2, 3), "read", 15)
    assignments.probe_survived(attempt)
    for places, dies in (((0, 1), True), ((0,), False), ((1,), True), ((1,), True), ((2, 3), False)):
        attempt = take(assignments, clock)
        assert attempt.probe == Probe(places, "sample", 15)
        assignments.worker_died(1, "killed") if dies else assignments.probe_survived(attempt)
    attempt = take(assignments, clock)
    assert (attempt.probe, attempt.poison_pairs) == (None, {1: "sample"})
    for step in (13, 14):  # the failures before the bisection do not count
        die_at(assignments, attempt, step)
        attempt = take(assignments, clock)
        assert attempt.probe is None
    assignments.committed(attempt)
    assert assignments.num_open == 0


def test_deaths_at_different_steps_start_no_bisection() -> None:
    clock = Clock()
    assignments = Assignments([0], 9, clock, pairs_in=lambda shard: 4)
    for step in range(3, 8):
        attempt = take(assignments, clock)
        assert attempt.probe is None
        die_at(assignments, attempt, step)


def test_after_a_bisection_without_result_the_shard_has_its_remaining_attempts() -> None:
    clock = Clock()
    assignments = Assignments([0], 3, clock, pairs_in=lambda shard: 2)
    for _ in range(2):
        die_at(assignments, take(assignments, clock), 3)
    while (attempt := take(assignments, clock)).probe:
        assignments.probe_survived(attempt)
    die_at(assignments, attempt, 3)
    assert assignments.num_open == 0
    assert assignments.open_shards() == {0: "3 attempts failed, the last one: killed"}


def test_a_worker_is_overdue_after_its_limit_but_not_while_it_waits_and_reports() -> None:
    clock = Clock()
    assignments = Assignments([0, 1], 3, clock)
    attempt = take(assignments, clock)
    assignments.record_progress(Progress(0, attempt.id, "sample", 3, 20, 4, limit=10))
    clock.now += 9
    assignments.record_progress(Progress(0, attempt.id, "sample", 3, 20, 4, limit=10))
    assert not list(assignments.overdue(100))
    clock.now += 2
    assert list(assignments.overdue(100)) == [(1, "no progress for 10 s in shard 0, stage sample, step 3")]
    for _ in range(3):
        clock.now += 99
        assignments.record_progress(Progress(0, attempt.id, "wait", 0, 20, 4))
        assert not list(assignments.overdue(100))
    clock.now += 101
    assert list(assignments.overdue(100)) == [(1, "no progress for 100 s in shard 0, stage wait, step 0")]
