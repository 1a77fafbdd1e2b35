"""Which worker gets which shard, what a failure costs it, and how many workers a cluster can hold."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stylemill.cluster.assignment import Assignments
from stylemill.cluster.capacity import WorkerResources, worker_capacity, worker_resources
from stylemill.config.job import ClusterSettings
from stylemill.execution.attempt import STOPPED, Attempt, Probe, Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def new_attempt(shard: int) -> Attempt:
    return Attempt(shard, f"attempt-{shard}-{time.monotonic_ns()}", {})


def assign_all(assignments: Assignments, workers: list[int], num_loading: int = 0) -> dict[int, list[int]]:
    """Assign all shards that can be assigned now; returns the shards of each worker."""
    while choice := assignments.choose(workers, num_loading):
        assignments.assign(choice[0], new_attempt(choice[1]))
    return {worker: [attempt.shard for attempt in assignments.attempts_of(worker)] for worker in workers}


def progress_of(attempt: Attempt, step: int, stage: str = "sample") -> Progress:
    return Progress(attempt.shard, attempt.id, stage, step, 10, 4)


def test_every_worker_gets_one_attempt_before_any_gets_two() -> None:
    assert assign_all(Assignments(range(20), 1), [1, 2, 3]) == {1: [0, 3], 2: [1, 4], 3: [2, 5]}


def test_shards_are_kept_for_workers_that_are_loading() -> None:
    assert assign_all(Assignments(range(3), 1), [1], num_loading=2) == {1: [0]}


def test_the_last_shards_go_to_the_worker_that_is_furthest() -> None:
    assignments = Assignments(range(3), 1)
    assert assign_all(assignments, [1, 2]) == {1: [0], 2: [1]}
    assignments.record_progress(progress_of(assignments.attempts_of(1)[0], 4))
    assert assign_all(assignments, [1, 2]) == {1: [0], 2: [1]}
    assignments.record_progress(progress_of(assignments.attempts_of(2)[0], 5))
    assert assign_all(assignments, [1, 2]) == {1: [0], 2: [1, 2]}


def test_the_progress_of_an_attempt_that_is_over_does_not_count() -> None:
    assignments = Assignments(range(2), 1)
    assign_all(assignments, [1])
    attempt = assignments.attempts_of(1)[0]
    assert assignments.record_progress(progress_of(attempt, 4))
    assignments.committed(attempt)
    assert not assignments.record_progress(progress_of(attempt, 5))


def test_a_failed_shard_is_retried_after_a_pause_and_given_up_after_its_last_attempt() -> None:
    clock = Clock()
    assignments = Assignments([7], 2, clock)
    assign_all(assignments, [1])
    assert assignments.failed(assignments.attempts_of(1)[0], "disk full")
    assert assign_all(assignments, [1]) == {1: []}
    clock.now += 60
    assert assign_all(assignments, [1]) == {1: [7]}
    assert not assignments.failed(assignments.attempts_of(1)[0], "disk full again")
    assert assignments.num_open == 0
    assert assignments.open_shards() == {7: "2 attempts failed, the last one: disk full again"}


def test_an_attempt_knows_whether_it_is_the_last_one() -> None:
    clock = Clock()
    assignments = Assignments([7], 2, clock)
    first = take(assignments, clock)
    assignments.failed(first, "asked to stop", charged=False)
    second = take(assignments, clock)
    assignments.failed(second, "disk full")
    assert [first.last, second.last, take(assignments, clock).last] == [False, False, True]


def test_a_worker_death_is_not_charged_to_a_shard_that_was_only_read() -> None:
    clock = Clock()
    assignments = Assignments(range(10), 1, clock)
    assign_all(assignments, [1])
    assignments.record_progress(progress_of(assignments.attempts_of(1)[0], 3))
    assignments.worker_died(1, "killed")
    assert list(assignments.open_shards().items())[:2] == [
        (0, "1 attempt failed, the last one: killed"),
        (1, "killed"),
    ]
    assert assign_all(assignments, [2])[2][0] == 1


def test_after_a_worker_death_its_shards_are_retried_alone_in_a_worker() -> None:
    clock = Clock()
    assignments = Assignments(range(10), 9, clock)
    assign_all(assignments, [1, 2])
    for attempt in assignments.attempts_of(1):
        assignments.record_progress(progress_of(attempt, 3))
    assignments.worker_died(1, "killed")
    clock.now += 60
    assert assign_all(assignments, [2, 3]) == {2: [1, 3], 3: [0]}, "shard 2 waits for an idle worker"
    for attempt in assignments.attempts_of(2):
        assignments.committed(attempt)
    assert assign_all(assignments, [2, 3]) == {2: [2], 3: [0]}
    for worker in (2, 3):
        assignments.committed(assignments.attempts_of(worker)[0])
    assert assign_all(assignments, [2, 3]) == {2: [4, 6], 3: [5, 7]}


def test_a_stopped_attempt_is_not_charged() -> None:
    assignments = Assignments([0], 1)
    assign_all(assignments, [1])
    assignments.stopped(assignments.attempts_of(1)[0])
    assert assignments.open_shards() == {0: STOPPED}
    assert assign_all(assignments, [1]) == {1: [0]}


# --- bisection as part of the assignments -----------------------------------------------------------------------------


def take(assignments: Assignments, clock: Clock) -> Attempt:
    """Assign the next attempt to worker 1."""
    clock.now += 60
    choice = assignments.choose([1])
    assert choice
    attempt = assignments.with_history(Attempt(choice[1], f"attempt at {clock.now}", {}))
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


# --- capacity of a cluster --------------------------------------------------------------------------------------------

GPU_NODE = {"CPU": 8.0, "GPU": 4.0, "memory": 64e9}
CPU_NODE = {"CPU": 8.0, "memory": 10e9}


def test_a_worker_reserves_a_gpu_if_the_cluster_has_one() -> None:
    assert worker_resources(ClusterSettings(), [CPU_NODE, GPU_NODE]) == WorkerResources(cpus=0, gpus=1)
    assert worker_resources(ClusterSettings(threads=2), [CPU_NODE]) == WorkerResources(cpus=2, gpus=0)
    assert worker_resources(ClusterSettings(gpus_per_worker=0.0), [GPU_NODE]) == WorkerResources(cpus=1, gpus=0)


@pytest.mark.parametrize(
    ("cluster", "machines", "resident", "workers"),
    [
        (ClusterSettings(), [GPU_NODE, GPU_NODE, CPU_NODE], 10**9, 8),
        (ClusterSettings(gpus_per_worker=0.5), [GPU_NODE], 0, 8),
        (ClusterSettings(), [CPU_NODE], 0, 8),
        (ClusterSettings(threads=3), [CPU_NODE, CPU_NODE], 0, 4),
        (ClusterSettings(), [CPU_NODE], 10**9, 5),  # limited by memory
        (ClusterSettings(), [CPU_NODE], 10**11, 1),
        (ClusterSettings(workers=3), [CPU_NODE], 10**11, 3),
        (ClusterSettings(gpus_per_worker=0.1), [GPU_NODE], 0, 40),  # in floats, 1.0 // 0.1 is 9
        (ClusterSettings(gpus_per_worker=0.2), [{"GPU": 1.0}], 0, 5),
        (ClusterSettings(gpus_per_worker=0.4), [GPU_NODE], 0, 8),  # two on each GPU: none is on two of them
    ],
)
def test_the_number_of_workers_follows_the_capacity_of_the_cluster(
    cluster: ClusterSettings, machines: list[dict[str, float]], resident: int, workers: int
) -> None:
    assert worker_capacity(cluster, worker_resources(cluster, machines), machines, resident) == workers


@given(st.integers(1, 10_000), st.integers(0, 16))
def test_as_many_workers_share_each_gpu_as_ray_places_there(units: int, gpus: int) -> None:
    """Ray places a worker where its amount, in units of 1/10000, is free on a single GPU."""
    free, placed = [10_000] * gpus, 0
    while any(left >= units for left in free):
        free[next(gpu for gpu, left in enumerate(free) if left >= units)] -= units
        placed += 1
        if placed > 1000:  # enough; a unit each would take 160,000
            return
    resources = WorkerResources(cpus=0, gpus=units / 10_000)
    assert resources.number_on({"CPU": 8.0, "GPU": float(gpus)}) == placed


@given(st.integers(1, 64), st.integers(0, 256))
def test_a_worker_fits_where_its_cpus_are(threads: int, cpus: int) -> None:
    assert WorkerResources(cpus=threads, gpus=0).number_on({"CPU": float(cpus)}) == cpus // threads
