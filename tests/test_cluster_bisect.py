"""Which pair kills its worker is found by halving, and nobody is blamed without proof."""

from __future__ import annotations

import random

import pytest

from stylemill.cluster.assignment import Assignments
from stylemill.cluster.bisect import MAX_POISON_PAIRS, Bisection
from stylemill.execution.attempt import Attempt, Probe, Progress


def hunt_down(bisection: Bisection, reading: set[int], sampling: set[int]) -> list[Probe]:
    """Work off a bisection in a world where those places kill; the probes that it took."""
    probes = []
    while probe := bisection.probe:
        probes.append(probe)
        deadly = reading if probe.stage == "read" else reading | sampling
        if deadly.intersection(probe.places):
            bisection.died()
        else:
            bisection.survived()
    return probes


@pytest.mark.parametrize("seed", range(20))
def test_all_killers_are_found_and_no_one_else(seed: int) -> None:
    draw = random.Random(seed)
    pairs = draw.randint(2, 200)
    poison_pairs = set(draw.sample(range(pairs), draw.randint(1, min(3, pairs - 1))))
    stage = draw.choice(["read", "sample"])
    bisection = Bisection(range(pairs), 7, lambda: False)
    probes = hunt_down(
        bisection, poison_pairs if stage == "read" else set(), poison_pairs if stage == "sample" else set()
    )
    assert bisection.found == dict.fromkeys(poison_pairs, stage)
    assert len(probes) <= 2 + len(poison_pairs) * (2 * pairs.bit_length() + 1)
    assert {probe.until for probe in probes} == {7}


def test_a_place_where_all_die_proves_nothing_against_a_pair() -> None:
    for others_survive, found in ((False, []), (True, [0, 1])):
        bisection = Bisection(range(2), 1, lambda survive=others_survive: survive)  # type: ignore[misc]
        hunt_down(bisection, {0, 1}, set())
        assert list(bisection.found) == found


@pytest.mark.parametrize("deaths", [{1}, {1, 2}, {1, 2, 4}, {1, 3, 5}])
def test_workers_that_are_preempted_while_they_probe_convict_nobody(deaths: set[int]) -> None:
    """Of the probes those die that are counted here, whatever they are of; no pair alone dies twice in a row."""
    bisection, number = Bisection(range(4), 7, lambda: True), 0
    while probe := bisection.probe:
        bisection.died() if number in deaths else bisection.survived()
        number += probe.stage == "sample"
    assert bisection.found == {}


def test_where_very_many_die_it_is_not_the_pairs() -> None:
    bisection = Bisection(range(100), 1, lambda: True)
    probes = hunt_down(bisection, set(range(0, 100, 2)), set())
    assert bisection.found == {}
    assert len(probes) <= 5 * MAX_POISON_PAIRS + 8


# --- in the assignment of shards --------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def take(book: Assignments, clock: Clock) -> Attempt:
    """The next attempt, with worker 1."""
    clock.now += 60
    choice = book.choose([1])
    assert choice
    attempt = book.fit_out(Attempt(choice[1], f"attempt at {clock.now}", {}))
    book.grant(1, attempt)
    return attempt


def die_at(book: Assignments, attempt: Attempt, step: int) -> None:
    book.note(Progress(attempt.shard, attempt.id, "sample", step, 20, 4))
    book.lost(1, "killed")


def test_deaths_without_a_step_between_them_start_a_hunt_and_its_killers_are_left_out() -> None:
    clock = Clock()
    book = Assignments([0], 3, clock, pairs=lambda shard: 4, saved=lambda shard: 10, every=5)
    die_at(book, take(book, clock), 12)
    attempt = take(book, clock)
    assert (attempt.probe, attempt.poison_pairs) == (None, {})
    die_at(book, attempt, 12)
    attempt = take(book, clock)
    assert attempt.probe == Probe((0, 1, 2, 3), "read", 15)
    book.survived(attempt)
    for places, dies in (((0, 1), True), ((0,), False), ((1,), True), ((1,), True), ((2, 3), False)):
        attempt = take(book, clock)
        assert attempt.probe == Probe(places, "sample", 15)
        book.lost(1, "killed") if dies else book.survived(attempt)
    attempt = take(book, clock)
    assert (attempt.probe, attempt.poison_pairs) == (None, {1: "sample"})
    for step in (13, 14):  # its attempts begin anew
        die_at(book, attempt, step)
        attempt = take(book, clock)
        assert attempt.probe is None
    book.done(attempt)
    assert book.open == 0


def test_deaths_that_leave_a_step_behind_are_no_reason_to_hunt() -> None:
    clock = Clock()
    book = Assignments([0], 9, clock, pairs=lambda shard: 4)
    for step in range(3, 8):
        attempt = take(book, clock)
        assert attempt.probe is None
        die_at(book, attempt, step)


def test_a_hunt_in_vain_leaves_the_shard_its_other_attempts_and_no_more() -> None:
    clock = Clock()
    book = Assignments([0], 3, clock, pairs=lambda shard: 2)
    for _ in range(2):
        die_at(book, take(book, clock), 3)
    while (attempt := take(book, clock)).probe:
        book.survived(attempt)
    die_at(book, attempt, 3)
    assert book.open == 0
    assert book.unfinished() == {0: "3 attempts failed, the last one: killed"}


def test_a_worker_is_overdue_when_its_step_is_and_not_while_it_waits_and_answers() -> None:
    clock = Clock()
    book = Assignments([0, 1], 3, clock)
    attempt = take(book, clock)
    book.note(Progress(0, attempt.id, "sample", 3, 20, 4, limit=10))
    clock.now += 9
    book.note(Progress(0, attempt.id, "sample", 3, 20, 4, limit=10))
    assert not list(book.overdue(100))
    clock.now += 2
    assert list(book.overdue(100)) == [(1, "no progress for 10 s in shard 0, stage sample, step 3")]
    for _ in range(3):
        clock.now += 99
        book.note(Progress(0, attempt.id, "wait", 0, 20, 4))
        assert not list(book.overdue(100))
    clock.now += 101
    assert list(book.overdue(100)) == [(1, "no progress for 100 s in shard 0, stage wait, step 0")]
