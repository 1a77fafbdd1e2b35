"""Assignment of shards, capacity of a cluster, connection to Ray, and workers that raise or die.

The tests above the `local_ray_session` fixture need a process without Ray, so they come first in the file.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from ray_runs import TIMEOUTS, RecordingListener, data_files, local_ray, make_run
from stylemill import __version__, errors
from stylemill.cluster import Timeouts, actors, run_on_ray
from stylemill.cluster.assignment import Assignments
from stylemill.cluster.capacity import WorkerResources, worker_capacity, worker_resources
from stylemill.cluster.session import ray_session
from stylemill.cluster.worker import LoadedModel, Worker, WorkerLocation
from stylemill.config.job import ClusterSettings
from stylemill.errors import ClusterError, IncompleteError, ManifestError, ModelError, StorageError, StylemillError
from stylemill.execution.attempt import Attempt, Progress, Run
from stylemill.store.records import Record

# --- assignment -------------------------------------------------------------------------------------------------------


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


def test_a_worker_death_is_not_charged_to_a_shard_that_was_only_read() -> None:
    clock = Clock()
    assignments = Assignments(range(10), 1, clock)
    assign_all(assignments, [1])
    assignments.record_progress(progress_of(assignments.attempts_of(1)[0], 3))
    assignments.worker_died(1, "killed")
    assert list(assignments.open_shards().items())[:2] == [
        (0, "1 attempts failed, the last one: killed"),
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
    assert assignments.open_shards() == {0: "stopped before it was finished"}
    assert assign_all(assignments, [1]) == {1: [0]}


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
    ],
)
def test_the_number_of_workers_follows_the_capacity_of_the_cluster(
    cluster: ClusterSettings, machines: list[dict[str, float]], resident: int, workers: int
) -> None:
    assert worker_capacity(cluster, worker_resources(cluster, machines), machines, resident) == workers


# --- connection to Ray ------------------------------------------------------------------------------------------------


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_without_a_server_is_refused(form: str) -> None:
    with listening() as server:
        address = form.format(port=server.getsockname()[1])
    with pytest.raises(ClusterError, match="no answer"), ray_session(ClusterSettings(address=address), 2):
        pass


def test_a_server_that_sends_nothing_is_refused_after_the_timeout() -> None:
    with (
        listening() as server,
        pytest.raises(ClusterError, match="no answer"),
        ray_session(ClusterSettings(address=f"127.0.0.1:{server.getsockname()[1]}"), 0.2),
    ):
        pass


def test_a_web_server_is_refused() -> None:
    def serve(server: socket.socket) -> None:
        with suppress(OSError):  # until the test closes the server
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening() as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="is not Ray"), ray_session(ClusterSettings(address=address), 2):
            pass


@pytest.mark.parametrize("address", ["localhost", "head:port", "http://127.0.0.1:8265", ""])
def test_other_forms_of_an_address_are_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="not one of host:port"), ray_session(ClusterSettings(address=address), 2):
        pass


ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StylemillError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_can_be_pickled(kind: type[StylemillError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("shard 3: reason")))
    assert (type(copy), str(copy)) == (kind, "shard 3: reason")


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray_session() -> Iterator[None]:
    """One local Ray for all tests below. Runs use it and do not stop it."""
    with local_ray(sys.modules[__name__]):
        yield


class StubWorker(Worker):
    """A worker without a model. Subclasses override methods; `log_event` writes to the run folder."""

    def location(self) -> WorkerLocation:
        return WorkerLocation("host", os.getpid(), __version__)

    def load(self, micro_batch: int | None) -> LoadedModel:
        self.log_event("load", micro_batch)
        return LoadedModel({"micro_batch": micro_batch or 7}, 0)

    def run_attempt(self, attempt: Attempt) -> Record | None:
        return Record(attempt.shard, "f" * 64, 0, 1, attempt.id)

    def log_event(self, *words: object) -> int:
        """Append `words` to the events; returns how often they have been appended, including this time."""
        line = " ".join(map(str, words)) + "\n"
        path = self._run.paths.output / "events"
        with open(path, "a") as file:
            file.write(line)
        return path.read_text().splitlines(keepends=True).count(line)


@pytest.fixture
def run_workers(
    local_ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, RecordingListener]]:
    """A function that runs shards with workers of a class and returns the open shards and the listener."""

    def work(
        kind: type[Worker], shards: int = 3, listener: RecordingListener | None = None, **cluster: Any
    ) -> tuple[Any, RecordingListener]:
        monkeypatch.setattr(actors, "Worker", kind)
        listener = listener or RecordingListener()
        run = make_run(tmp_path, shards, 1, cluster={"workers": 2, **cluster})
        return run_on_ray(run, range(shards), {}, listener, threading.Event(), TIMEOUTS), listener

    return work


def test_the_first_worker_sets_the_micro_batch_of_all(run_workers: Any, tmp_path: Path) -> None:
    open_shards, listener = run_workers(StubWorker, shards=4)
    assert open_shards == {}
    assert sorted(listener.committed_shards) == [0, 1, 2, 3]
    assert listener.settled == [{"micro_batch": 7}]
    loads = [line for line in (tmp_path / "out" / "events").read_text().splitlines() if line.startswith("load")]
    assert loads[0] == "load None"
    assert set(loads[1:]) <= {"load 7"}


def test_a_worker_that_raised_an_unexpected_error_is_replaced(run_workers: Any, tmp_path: Path) -> None:
    class RaisesOnce(StubWorker):
        def run_attempt(self, attempt: Attempt) -> Record | None:
            self.log_event("pid", os.getpid())
            if attempt.shard == 1 and self.log_event("shard 1") == 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().run_attempt(attempt)

    open_shards, listener = run_workers(RaisesOnce, workers=1)
    assert open_shards == {}
    assert sorted(listener.committed_shards) == [0, 1, 2]
    assert any("shard 1: RuntimeError: CUDA error" in warning for warning in listener.warnings)
    events = (tmp_path / "out" / "events").read_text().splitlines()
    assert len({line for line in events if line.startswith("pid")}) == 2


def test_a_worker_that_dies_while_it_is_drained_is_removed_once(run_workers: Any, tmp_path: Path) -> None:
    warned = tmp_path / "warned"

    class SignalsWarning(RecordingListener):
        def warn(self, message: str) -> None:
            super().warn(message)
            if "shard 1: RuntimeError" in message:
                warned.touch()

    class RaisesThenDies(StubWorker):
        def run_attempt(self, attempt: Attempt) -> Record | None:
            if attempt.shard == 1 and self.log_event("shard 1") == 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if attempt.shard == 0 and self.log_event("shard 0") == 1:
                while not warned.exists():
                    time.sleep(0.005)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run_attempt(attempt)

    open_shards, listener = run_workers(RaisesThenDies, listener=SignalsWarning(), workers=1)
    assert open_shards == {}
    assert sorted(listener.committed_shards) == [0, 1, 2]
    assert len([warning for warning in listener.warnings if "died while processing shard 0" in warning]) == 1


def test_a_transient_error_costs_an_attempt_of_its_shard_only(run_workers: Any, tmp_path: Path) -> None:
    class DiskFull(StubWorker):
        def run_attempt(self, attempt: Attempt) -> Record | None:
            self.log_event("pid", os.getpid())
            if attempt.shard == 1:
                raise StorageError("the disk is full")
            return super().run_attempt(attempt)

    open_shards, listener = run_workers(DiskFull, workers=1)
    assert open_shards == {1: "2 attempts failed, the last one: the disk is full"}
    assert sorted(listener.committed_shards) == [0, 2]
    events = (tmp_path / "out" / "events").read_text().splitlines()
    assert len({line for line in events if line.startswith("pid")}) == 1


def test_an_input_error_while_loading_stops_the_run(run_workers: Any) -> None:
    class NoUNet(StubWorker):
        def load(self, micro_batch: int | None) -> LoadedModel:
            raise ModelError("model: has no UNet")

    with pytest.raises(ModelError, match=r"^model: has no UNet$"):
        run_workers(NoUNet)


def test_the_run_stops_after_three_workers_died_while_loading(run_workers: Any) -> None:
    class DiesWhileLoading(StubWorker):
        def load(self, micro_batch: int | None) -> LoadedModel:
            os._exit(1)

    with pytest.raises(StylemillError, match="3 workers in a row died before they were ready"):
        run_workers(DiesWhileLoading, workers=1)


class StopsWhenAsked(StubWorker):
    """Finishes shard 0 at once, and the others when it is asked to stop."""

    def run_attempt(self, attempt: Attempt) -> Record | None:
        if attempt.shard == 0:
            return super().run_attempt(attempt)
        self._stopping.wait(60)
        self.log_event("checkpoint", attempt.shard)
        return None


def test_after_an_error_of_the_listener_workers_write_checkpoints(run_workers: Any, tmp_path: Path) -> None:
    class RaisesOnCommit(RecordingListener):
        def committed(self, record: Record) -> None:
            raise IncompleteError("too many failed")

    with pytest.raises(IncompleteError, match="too many failed"):
        run_workers(StopsWhenAsked, listener=RaisesOnCommit())
    assert "checkpoint 1" in (tmp_path / "out" / "events").read_text()


def test_after_an_input_error_of_a_shard_the_other_workers_write_checkpoints(run_workers: Any, tmp_path: Path) -> None:
    class NullStyle(StopsWhenAsked):
        def run_attempt(self, attempt: Attempt) -> Record | None:
            if attempt.shard == 0:
                raise ManifestError("pairs.parquet: row 0, style: is null")
            return super().run_attempt(attempt)

    with pytest.raises(ManifestError, match=r"^pairs.parquet: row 0, style: is null$"):
        run_workers(NullStyle)
    assert "checkpoint 1" in (tmp_path / "out" / "events").read_text()


def test_a_cluster_too_small_for_a_worker_is_reported(local_ray_session: None, tmp_path: Path) -> None:
    run = make_run(tmp_path, 2, 1, cluster={"gpus_per_worker": 8.0, "workers": 1})
    with pytest.raises(ClusterError, match=r"a worker needs 8 GPU, and the cluster has .* GPUs and \d+ CPUs"):
        run_on_ray(run, [0, 1], {}, RecordingListener(), threading.Event(), Timeouts(placement=0.3))


# --- with Ray and the model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def inline(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[Run, int], None], dict[str, bytes]]:
    """A function that processes a shard in this process, and the data files of a run processed only by it."""
    from stylemill.execution.shard import load_engine, process_shard

    run = make_run(tmp_path_factory.mktemp("inline"), 6, 2, model=str(model))
    engine = load_engine(run, None)

    def finish(run: Run, shard: int) -> None:
        assert process_shard(
            run, run.new_attempt(shard, {}), engine, nullcontext(), lambda progress: None, lambda: False
        )

    for shard in range(3):
        finish(run, shard)
    return finish, data_files(run)


def test_a_worker_killed_while_sampling_is_replaced_and_the_files_are_identical(
    local_ray_session: None, model: Path, inline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WritesPid(Worker):
        def location(self) -> WorkerLocation:
            location = super().location()
            (self._run.paths.output / "pid").write_text(str(location.pid))
            return location

    monkeypatch.setattr(actors, "Worker", WritesPid)
    run = make_run(tmp_path, 6, 2, model=str(model), cluster={"workers": 1})
    listener, killed = RecordingListener(), []

    def kill(progress: Progress) -> None:
        if not killed and progress.stage == "sample" and progress.step >= 2:
            killed.append(int((run.paths.output / "pid").read_text()))
            os.kill(killed[0], signal.SIGKILL)

    listener.on_progress = kill
    assert run_on_ray(run, range(3), {}, listener, threading.Event(), TIMEOUTS) == {}
    assert killed
    assert len([warning for warning in listener.warnings if "a new worker replaces it" in warning]) == 1
    assert sorted(listener.committed_shards) == [0, 1, 2]
    assert data_files(run) == inline[1]


def test_stopped_workers_write_checkpoints_and_the_next_start_resumes_from_them(
    local_ray_session: None, model: Path, inline: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, 6, 2, model=str(model), cluster={"workers": 1}, checkpoint={"every_steps": 100})
    listener, stopping = RecordingListener(), threading.Event()
    listener.on_progress = lambda progress: stopping.set() if progress.stage == "sample" else None
    open_shards = run_on_ray(run, range(3), {}, listener, stopping, TIMEOUTS)
    assert open_shards
    assert sorted([*open_shards, *listener.committed_shards]) == [0, 1, 2]
    assert any(
        list(run.paths.checkpoints(shard).glob("*")) for shard in open_shards if run.paths.checkpoints(shard).exists()
    )
    finish, expected = inline
    for shard in open_shards:
        finish(run, shard)
    assert data_files(run) == expected
