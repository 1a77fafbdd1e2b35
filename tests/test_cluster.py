"""Who gets which shard, what happens when workers raise or die, and how Ray is reached.

Tests above the `ray_session` fixture must find no Ray running in this process: they stand first in the file.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ray_runs import PATIENCE, RecordingListener, data_files, make_run, one_ray
from stylemill import __version__, errors
from stylemill.cluster import Timeouts, run_on_ray
from stylemill.cluster import actors as actors
from stylemill.cluster.assignment import Assignments
from stylemill.cluster.capacity import WorkerResources, worker_capacity, worker_resources
from stylemill.cluster.session import session
from stylemill.cluster.worker import Loaded, Worker, WorkerLocation
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


def lease_out(book: Assignments, workers: list[int], coming: int = 0) -> dict[int, list[int]]:
    """Grant all that the book has to give; shards by worker."""
    while choice := book.choose(workers, coming):
        book.grant(choice[0], new_attempt(choice[1]))
    return {worker: [held.shard for held in book.held_by(worker)] for worker in workers}


def at(held: Attempt, step: int, stage: str = "sample") -> Progress:
    return Progress(held.shard, held.id, stage, step, 10, 4)


def test_every_worker_gets_one_lease_before_any_gets_two() -> None:
    assert lease_out(Assignments(range(20), 1), [1, 2, 3]) == {1: [0, 3], 2: [1, 4], 3: [2, 5]}


def test_workers_still_loading_have_shards_kept_for_them() -> None:
    assert lease_out(Assignments(range(3), 1), [1], coming=2) == {1: [0]}


def test_the_last_shards_go_to_whoever_is_furthest() -> None:
    book = Assignments(range(3), 1)
    assert lease_out(book, [1, 2]) == {1: [0], 2: [1]}
    book.note(at(book.held_by(1)[0], 4))
    assert lease_out(book, [1, 2]) == {1: [0], 2: [1]}
    book.note(at(book.held_by(2)[0], 5))
    assert lease_out(book, [1, 2]) == {1: [0], 2: [1, 2]}


def test_a_failed_shard_waits_and_is_given_up_after_its_attempts() -> None:
    clock = Clock()
    book = Assignments([7], 2, clock)
    lease_out(book, [1])
    assert book.failed(book.held_by(1)[0], "disk full")
    assert lease_out(book, [1]) == {1: []}
    clock.now += 60
    assert lease_out(book, [1]) == {1: [7]}
    assert not book.failed(book.held_by(1)[0], "disk full again")
    assert book.open == 0
    assert book.unfinished() == {7: "2 attempts failed, the last one: disk full again"}


def test_a_death_is_not_charged_to_the_shard_read_ahead() -> None:
    clock = Clock()
    book = Assignments(range(10), 1, clock)
    lease_out(book, [1])
    book.note(at(book.held_by(1)[0], 3))
    book.lost(1, "killed")
    assert list(book.unfinished().items())[:2] == [(0, "1 attempts failed, the last one: killed"), (1, "killed")]
    assert lease_out(book, [2])[2][0] == 1


def test_after_a_death_suspects_work_alone() -> None:
    clock = Clock()
    book = Assignments(range(10), 9, clock)
    lease_out(book, [1, 2])
    for held in book.held_by(1):
        book.note(at(held, 3))
    book.lost(1, "killed")
    clock.now += 60
    assert lease_out(book, [2, 3]) == {2: [1, 3], 3: [0]}, "the other suspect waits for a worker of its own"
    for held in book.held_by(2):
        book.done(held)
    assert lease_out(book, [2, 3]) == {2: [2], 3: [0]}
    for worker in (2, 3):
        book.done(book.held_by(worker)[0])
    assert lease_out(book, [2, 3]) == {2: [4, 6], 3: [5, 7]}


def test_a_shard_given_back_costs_no_attempt() -> None:
    book = Assignments([0], 1)
    lease_out(book, [1])
    book.returned(book.held_by(1)[0])
    assert book.unfinished() == {0: "stopped before it was finished"}
    assert lease_out(book, [1]) == {1: [0]}


# --- room in a cluster ------------------------------------------------------------------------------------------------

GPU_NODE = {"CPU": 8.0, "GPU": 4.0, "memory": 64e9}
CPU_NODE = {"CPU": 8.0, "memory": 10e9}


def test_a_worker_asks_for_a_gpu_where_there_is_one() -> None:
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
        (ClusterSettings(), [CPU_NODE], 10**9, 5),  # memory is what is short
        (ClusterSettings(), [CPU_NODE], 10**11, 1),
        (ClusterSettings(workers=3), [CPU_NODE], 10**11, 3),
    ],
)
def test_workers_follow_the_size_of_the_cluster(
    cluster: ClusterSettings, machines: list[dict[str, float]], resident: int, workers: int
) -> None:
    assert worker_capacity(cluster, worker_resources(cluster, machines), machines, resident) == workers


# --- reaching Ray -----------------------------------------------------------------------------------------------------


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_where_nothing_listens_is_refused_at_once(form: str) -> None:
    with listening() as server:
        address = form.format(port=server.getsockname()[1])
    with pytest.raises(ClusterError, match="no answer"), session(ClusterSettings(address=address), 2):
        pass


def test_a_port_that_never_answers_is_given_up_in_bounded_time() -> None:
    with (
        listening() as server,
        pytest.raises(ClusterError, match="no answer"),
        session(ClusterSettings(address=f"127.0.0.1:{server.getsockname()[1]}"), 0.2),
    ):
        pass


def test_a_web_server_is_not_taken_for_ray() -> None:
    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening() as server:
        threading.Thread(target=serve, args=(server,)).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="is not Ray"), session(ClusterSettings(address=address), 2):
            pass


@pytest.mark.parametrize("address", ["localhost", "head:port", "http://127.0.0.1:8265", ""])
def test_other_forms_of_an_address_are_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="not one of host:port"), session(ClusterSettings(address=address), 2):
        pass


ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StylemillError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_arrive_from_a_worker_as_they_were_raised(kind: type[StylemillError]) -> None:
    arrived = pickle.loads(pickle.dumps(kind("shard 3: why")))
    assert (type(arrived), str(arrived)) == (kind, "shard 3: why")


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One Ray of our own for all tests below; runs find it running and leave it so."""
    with one_ray(sys.modules[__name__]):
        yield


class Hand(Worker):
    """A worker without a model. A test overrides `work`; `trace` keeps what happened, in the run folder."""

    def hello(self) -> WorkerLocation:
        return WorkerLocation("here", os.getpid(), __version__)

    def load(self, micro_batch: int | None) -> Loaded:
        self.trace("load", micro_batch)
        return Loaded({"micro_batch": micro_batch or 7}, 0)

    def work(self, attempt: Attempt) -> Record | None:
        return Record(attempt.shard, "f" * 64, 0, 1, attempt.id)

    def trace(self, *words: object) -> int:
        """Note `words`; how often they have been noted, this time included."""
        line = " ".join(map(str, words)) + "\n"
        path = self._run.paths.output / "trace"
        with open(path, "a") as file:
            file.write(line)
        return path.read_text().splitlines(keepends=True).count(line)


@pytest.fixture
def hands(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, RecordingListener]]:
    """Runs shards with workers of the given class."""

    def work(
        kind: type[Worker], shards: int = 3, ears: RecordingListener | None = None, **cluster: Any
    ) -> tuple[Any, RecordingListener]:
        monkeypatch.setattr(actors, "Worker", kind)
        ears = ears or RecordingListener()
        run = make_run(tmp_path, shards, 1, cluster={"workers": 2, **cluster})
        return run_on_ray(run, range(shards), {}, ears, threading.Event(), PATIENCE), ears

    return work


def test_the_first_worker_settles_the_micro_batch_for_all(hands: Any, tmp_path: Path) -> None:
    left, ears = hands(Hand, shards=4)
    assert left == {}
    assert sorted(ears.done) == [0, 1, 2, 3]
    assert ears.settled == [{"micro_batch": 7}]
    loads = [line for line in (tmp_path / "out" / "trace").read_text().splitlines() if line.startswith("load")]
    assert loads[0] == "load None"
    assert set(loads[1:]) <= {"load 7"}


def test_a_worker_that_raised_unexpectedly_is_replaced(hands: Any, tmp_path: Path) -> None:
    class Stumbling(Hand):
        def work(self, attempt: Attempt) -> Record | None:
            self.trace("pid", os.getpid())
            if attempt.shard == 1 and self.trace("shard 1") == 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().work(attempt)

    left, ears = hands(Stumbling, workers=1)
    assert left == {}
    assert sorted(ears.done) == [0, 1, 2]
    assert any("shard 1: RuntimeError: CUDA error" in warning for warning in ears.warnings)
    trace = (tmp_path / "out" / "trace").read_text().splitlines()
    assert len({line for line in trace if line.startswith("pid")}) == 2


def test_a_worker_that_dies_while_it_is_to_be_replaced_is_gone_once(hands: Any, tmp_path: Path) -> None:
    heard = tmp_path / "heard"

    class Listening(RecordingListener):
        def warn(self, message: str) -> None:
            super().warn(message)
            if "shard 1: RuntimeError" in message:
                heard.touch()

    class Failing(Hand):
        def work(self, attempt: Attempt) -> Record | None:
            if attempt.shard == 1 and self.trace("shard 1") == 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if attempt.shard == 0 and self.trace("shard 0") == 1:
                while not heard.exists():
                    time.sleep(0.005)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().work(attempt)

    left, ears = hands(Failing, ears=Listening(), workers=1)
    assert left == {}
    assert sorted(ears.done) == [0, 1, 2]
    assert len([warning for warning in ears.warnings if "died with shard 0" in warning]) == 1


def test_transient_trouble_costs_an_attempt_and_leaves_the_others_alone(hands: Any, tmp_path: Path) -> None:
    class Unlucky(Hand):
        def work(self, attempt: Attempt) -> Record | None:
            self.trace("pid", os.getpid())
            if attempt.shard == 1:
                raise StorageError("the disk is full")
            return super().work(attempt)

    left, ears = hands(Unlucky, workers=1)
    assert left == {1: "2 attempts failed, the last one: the disk is full"}
    assert sorted(ears.done) == [0, 2]
    trace = (tmp_path / "out" / "trace").read_text().splitlines()
    assert len({line for line in trace if line.startswith("pid")}) == 1


def test_input_that_no_attempt_can_cure_stops_the_run(hands: Any) -> None:
    class Misled(Hand):
        def load(self, micro_batch: int | None) -> Loaded:
            raise ModelError("model: has no UNet")

    with pytest.raises(ModelError, match=r"^model: has no UNet$"):
        hands(Misled)


def test_workers_that_die_while_loading_are_tried_only_so_often(hands: Any) -> None:
    class Stillborn(Hand):
        def load(self, micro_batch: int | None) -> Loaded:
            os._exit(1)

    with pytest.raises(StylemillError, match="3 workers in a row died before they were ready"):
        hands(Stillborn, workers=1)


class Patient(Hand):
    """Shard 0 is done at once, the others when asked to stop."""

    def work(self, attempt: Attempt) -> Record | None:
        if attempt.shard == 0:
            return super().work(attempt)
        self._stopping.wait(60)
        self.trace("checkpoint", attempt.shard)
        return None


def test_a_listener_that_raises_stops_the_run_gently(hands: Any, tmp_path: Path) -> None:
    class Strict(RecordingListener):
        def committed(self, record: Record) -> None:
            raise IncompleteError("too many failed")

    with pytest.raises(IncompleteError, match="too many failed"):
        hands(Patient, ears=Strict())
    assert "checkpoint 1" in (tmp_path / "out" / "trace").read_text()


def test_a_shard_that_no_attempt_can_cure_stops_the_others_gently(hands: Any, tmp_path: Path) -> None:
    class Misled(Patient):
        def work(self, attempt: Attempt) -> Record | None:
            if attempt.shard == 0:
                raise ManifestError("pairs.parquet: row 0, style: is null")
            return super().work(attempt)

    with pytest.raises(ManifestError, match=r"^pairs.parquet: row 0, style: is null$"):
        hands(Misled)
    assert "checkpoint 1" in (tmp_path / "out" / "trace").read_text()


def test_a_cluster_without_room_is_named(ray_session: None, tmp_path: Path) -> None:
    run = make_run(tmp_path, 2, 1, cluster={"gpus_per_worker": 8.0, "workers": 1})
    with pytest.raises(ClusterError, match=r"each asks for 8 GPU, and the cluster has .* GPUs and \d+ CPUs"):
        run_on_ray(run, [0, 1], {}, RecordingListener(), threading.Event(), Timeouts(place=0.3))


# --- with Ray and the model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def inline(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[Run, int], None], dict[str, bytes]]:
    """A way to finish a shard in this process, and the data files of a run that knew nothing else."""
    from stylemill.execution.shard import process_shard
    from stylemill.execution.worker_engine import load_engine

    run = make_run(tmp_path_factory.mktemp("inline"), 6, 2, model=str(model))
    engine = load_engine(run, None)

    def finish(run: Run, shard: int) -> None:
        assert process_shard(
            run, run.new_attempt(shard, {}), engine, nullcontext(), lambda progress: None, lambda: False
        )

    for shard in range(3):
        finish(run, shard)
    return finish, data_files(run)


def test_a_worker_killed_while_sampling_is_replaced_and_no_byte_differs(
    ray_session: None, model: Path, inline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Telling(Worker):
        def hello(self) -> WorkerLocation:
            home = super().hello()
            (self._run.paths.output / "pid").write_text(str(home.pid))
            return home

    monkeypatch.setattr(actors, "Worker", Telling)
    run = make_run(tmp_path, 6, 2, model=str(model), cluster={"workers": 1})
    ears, killed = RecordingListener(), []

    def kill(progress: Progress) -> None:
        if not killed and progress.stage == "sample" and progress.step >= 2:
            killed.append(int((run.paths.output / "pid").read_text()))
            os.kill(killed[0], signal.SIGKILL)

    ears.on_progress = kill
    assert run_on_ray(run, range(3), {}, ears, threading.Event(), PATIENCE) == {}
    assert killed
    assert len([warning for warning in ears.warnings if "another takes its place" in warning]) == 1
    assert sorted(ears.done) == [0, 1, 2]
    assert data_files(run) == inline[1]


def test_asked_to_stop_workers_leave_checkpoints_that_another_start_goes_on_from(
    ray_session: None, model: Path, inline: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, 6, 2, model=str(model), cluster={"workers": 1}, checkpoint={"every_steps": 100})
    ears, stopping = RecordingListener(), threading.Event()
    ears.on_progress = lambda progress: stopping.set() if progress.stage == "sample" else None
    left = run_on_ray(run, range(3), {}, ears, stopping, PATIENCE)
    assert left
    assert sorted([*left, *ears.done]) == [0, 1, 2]
    assert any(list(run.paths.checkpoints(shard).glob("*")) for shard in left if run.paths.checkpoints(shard).exists())
    finish, expected = inline
    for shard in left:
        finish(run, shard)
    assert data_files(run) == expected
