"""Which pair kills its worker is found by halving, and nobody is blamed without proof."""

from __future__ import annotations

import random

import pytest

from stylemill.cluster.assignment import LeaseBook
from stylemill.cluster.bisect import MOST_KILLERS, Hunt
from stylemill.execution.attempt import Lease, Probe, Progress


def hunt_down(hunt: Hunt, reading: set[int], sampling: set[int]) -> list[Probe]:
    """Work off a hunt in a world where those places kill; the probes that it took."""
    probes = []
    while probe := hunt.probe:
        probes.append(probe)
        deadly = reading if probe.stage == "read" else reading | sampling
        if deadly.intersection(probe.places):
            hunt.died()
        else:
            hunt.survived()
    return probes


@pytest.mark.parametrize("seed", range(20))
def test_all_killers_are_found_and_no_one_else(seed: int) -> None:
    draw = random.Random(seed)
    pairs = draw.randint(2, 200)
    killers = set(draw.sample(range(pairs), draw.randint(1, min(3, pairs - 1))))
    stage = draw.choice(["read", "sample"])
    hunt = Hunt(range(pairs), 7, lambda: False)
    probes = hunt_down(hunt, killers if stage == "read" else set(), killers if stage == "sample" else set())
    assert hunt.found == dict.fromkeys(killers, stage)
    assert len(probes) <= 2 + len(killers) * (2 * pairs.bit_length() + 1)
    assert {probe.until for probe in probes} == {7}


def test_a_place_where_all_die_proves_nothing_against_a_pair() -> None:
    for others_survive, found in ((False, []), (True, [0, 1])):
        hunt = Hunt(range(2), 1, lambda survive=others_survive: survive)  # type: ignore[misc]
        hunt_down(hunt, {0, 1}, set())
        assert list(hunt.found) == found


@pytest.mark.parametrize("deaths", [{1}, {1, 2}, {1, 2, 4}, {1, 3, 5}])
def test_workers_that_are_preempted_while_they_probe_convict_nobody(deaths: set[int]) -> None:
    """Of the probes those die that are counted here, whatever they are of; no pair alone dies twice in a row."""
    hunt, number = Hunt(range(4), 7, lambda: True), 0
    while probe := hunt.probe:
        hunt.died() if number in deaths else hunt.survived()
        number += probe.stage == "sample"
    assert hunt.found == {}


def test_where_very_many_die_it_is_not_the_pairs() -> None:
    hunt = Hunt(range(100), 1, lambda: True)
    probes = hunt_down(hunt, set(range(0, 100, 2)), set())
    assert hunt.found == {}
    assert len(probes) <= 5 * MOST_KILLERS + 8


# --- in the lease book ------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def take(book: LeaseBook, clock: Clock) -> Lease:
    """The next lease, with worker 1."""
    clock.now += 60
    choice = book.choose([1])
    assert choice
    lease = book.fit_out(Lease(choice[1], f"attempt at {clock.now}", {}))
    book.grant(1, lease)
    return lease


def die_at(book: LeaseBook, lease: Lease, step: int) -> None:
    book.note(Progress(lease.shard, lease.attempt, "sample", step, 20, 4))
    book.lost(1, "killed")


def test_deaths_without_a_step_between_them_start_a_hunt_and_its_killers_are_left_out() -> None:
    clock = Clock()
    book = LeaseBook([0], 3, clock, pairs=lambda shard: 4, saved=lambda shard: 10, every=5)
    die_at(book, take(book, clock), 12)
    lease = take(book, clock)
    assert (lease.probe, lease.killers) == (None, {})
    die_at(book, lease, 12)
    lease = take(book, clock)
    assert lease.probe == Probe((0, 1, 2, 3), "read", 15)
    book.survived(lease)
    for places, dies in (((0, 1), True), ((0,), False), ((1,), True), ((1,), True), ((2, 3), False)):
        lease = take(book, clock)
        assert lease.probe == Probe(places, "sample", 15)
        book.lost(1, "killed") if dies else book.survived(lease)
    lease = take(book, clock)
    assert (lease.probe, lease.killers) == (None, {1: "sample"})
    for step in (13, 14):  # its attempts begin anew
        die_at(book, lease, step)
        lease = take(book, clock)
        assert lease.probe is None
    book.done(lease)
    assert book.open == 0


def test_deaths_that_leave_a_step_behind_are_no_reason_to_hunt() -> None:
    clock = Clock()
    book = LeaseBook([0], 9, clock, pairs=lambda shard: 4)
    for step in range(3, 8):
        lease = take(book, clock)
        assert lease.probe is None
        die_at(book, lease, step)


def test_a_hunt_in_vain_leaves_the_shard_its_other_attempts_and_no_more() -> None:
    clock = Clock()
    book = LeaseBook([0], 3, clock, pairs=lambda shard: 2)
    for _ in range(2):
        die_at(book, take(book, clock), 3)
    while (lease := take(book, clock)).probe:
        book.survived(lease)
    die_at(book, lease, 3)
    assert book.open == 0
    assert book.unfinished() == {0: "3 attempts failed, the last one: killed"}


def test_a_worker_is_overdue_when_its_step_is_and_not_while_it_waits_and_answers() -> None:
    clock = Clock()
    book = LeaseBook([0, 1], 3, clock)
    lease = take(book, clock)
    book.note(Progress(0, lease.attempt, "sample", 3, 20, 4, limit=10))
    clock.now += 9
    book.note(Progress(0, lease.attempt, "sample", 3, 20, 4, limit=10))
    assert not list(book.overdue(100))
    clock.now += 2
    assert list(book.overdue(100)) == [(1, "no progress for 10 s in shard 0, stage sample, step 3")]
    for _ in range(3):
        clock.now += 99
        book.note(Progress(0, lease.attempt, "wait", 0, 20, 4))
        assert not list(book.overdue(100))
    clock.now += 101
    assert list(book.overdue(100)) == [(1, "no progress for 100 s in shard 0, stage wait, step 0")]
