"""Runs on a local Ray: workers that raise, die or are stopped, and the files they leave."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_runs import TIMEOUTS, RecordingListener, WorkerWithoutModel, data_files, local_ray, make_run
from stylemill import __version__, errors
from stylemill.cluster import Timeouts, actors, run_on_ray
from stylemill.cluster.worker import LoadedModel, Worker, WorkerLocation
from stylemill.errors import ClusterError, IncompleteError, ManifestError, ModelError, StorageError, StylemillError
from stylemill.execution.attempt import Attempt, AutoSettings, Progress, Run
from stylemill.store.records import Record

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StylemillError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_can_be_pickled(kind: type[StylemillError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("shard 3: reason")))
    assert (type(copy), str(copy)) == (kind, "shard 3: reason")


@pytest.fixture(scope="module")
def local_ray_session() -> Iterator[None]:
    """One local Ray for all tests below. Runs use it and do not stop it."""
    with local_ray(sys.modules[__name__]):
        yield


def test_workers_of_a_local_ray_get_as_much_of_a_busy_machine_as_the_driver(local_ray_session: None) -> None:
    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


class StubWorker(WorkerWithoutModel):
    """Subclasses override methods; `log_event` writes to the run folder."""

    def location(self) -> WorkerLocation:
        return WorkerLocation("host", os.getpid(), __version__)

    def load(self, auto: AutoSettings) -> LoadedModel:
        self.log_event("load", auto.dtype, *sorted(auto.micro_batches.items()))
        return super().load(auto)

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


def loads(folder: Path) -> list[str]:
    return [line for line in (folder / "out" / "events").read_text().splitlines() if line.startswith("load")]


def test_the_first_worker_chooses_dtype_and_micro_batch_for_all(run_workers: Any, tmp_path: Path) -> None:
    open_shards, listener = run_workers(StubWorker, shards=4)
    assert open_shards == {}
    phases = list(dict.fromkeys(listener.phases))
    assert phases[1:] == ["waiting for a machine", "loading the model and calibrating", "sampling", "leaving Ray"]
    assert sorted(listener.committed_shards) == [0, 1, 2, 3]
    assert listener.numerics == [{"device": "card", "dtype": "float32", "micro_batch": 7}]
    assert loads(tmp_path)[0] == "load None"
    assert set(loads(tmp_path)[1:]) <= {"load float32 ('card', 7)"}


@pytest.mark.parametrize("cluster", [{}, {"micro_batch": 4}], ids=["micro-batch too", "dtype only"])
def test_a_resumed_run_keeps_what_its_first_worker_chose(
    run_workers: Any, tmp_path: Path, cluster: dict[str, Any]
) -> None:
    earlier = AutoSettings("float16", {"card": 5})
    open_shards, listener = run_workers(StubWorker, shards=4, listener=RecordingListener(earlier), **cluster)
    assert open_shards == {}
    assert listener.numerics == [{"device": "card", "dtype": "float16", "micro_batch": 5}]
    assert set(loads(tmp_path)) == {"load float16 ('card', 5)"}


def test_a_worker_with_another_card_chooses_its_own_micro_batch_and_is_warned_about(
    run_workers: Any, tmp_path: Path
) -> None:
    warned = tmp_path / "warned"

    class SignalsWarning(RecordingListener):
        def warn(self, message: str) -> None:
            super().warn(message)
            warned.touch()

    class OtherCard(StubWorker):
        """The first worker has one card, the next ones another, in which less fits."""

        def load(self, auto: AutoSettings) -> LoadedModel:
            if auto.dtype is not None:
                self.device, self.micro_batch = "other card", 3
            return super().load(auto)

        def run_attempt(self, attempt: Attempt) -> Record | None:
            while not warned.exists():
                time.sleep(0.005)
            return super().run_attempt(attempt)

    open_shards, listener = run_workers(OtherCard, shards=4, listener=SignalsWarning())
    assert open_shards == {}
    assert listener.numerics == [{"device": "card", "dtype": "float32", "micro_batch": 7}]
    (warning,) = listener.warnings
    assert "differs from the first one (device other card, not card; micro_batch 3, not 7)" in warning


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
        def load(self, auto: AutoSettings) -> LoadedModel:
            raise ModelError("model: has no UNet")

    with pytest.raises(ModelError, match=r"^model: has no UNet$"):
        run_workers(NoUNet)


def test_the_run_stops_after_three_workers_died_while_loading(run_workers: Any) -> None:
    class DiesWhileLoading(StubWorker):
        def load(self, auto: AutoSettings) -> LoadedModel:
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


@pytest.mark.parametrize("event", ["committed", "committed_record"])
def test_an_error_in_the_driver_s_part_of_a_commit_costs_an_attempt_of_its_shard_only(
    run_workers: Any, event: str
) -> None:
    class FailsOnce(RecordingListener):
        failed = False

        def fail(self, name: str, shard: int) -> None:
            if (name, shard, self.failed) == (event, 1, False):
                self.failed = True
                raise StorageError("the store does not answer")

        def committed_record(self, attempt: Attempt) -> Record | None:
            self.fail("committed_record", attempt.shard)
            return super().committed_record(attempt)

        def committed(self, record: Record) -> None:
            self.fail("committed", record.shard)
            super().committed(record)

    open_shards, listener = run_workers(StubWorker, listener=FailsOnce())
    assert open_shards == {}
    assert sorted(listener.committed_shards) == [0, 1, 2]
    assert listener.warnings == ["shard 1: the store does not answer; it is tried again"]


def test_a_shut_down_does_not_wait_for_a_shard_whose_commit_failed(
    local_ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CommitsWhenAskedToStop(StubWorker):
        def run_attempt(self, attempt: Attempt) -> Record | None:
            if attempt.shard == 1:
                self._stopping.wait(60)
            return super().run_attempt(attempt)

    class StopsAfterTheFirst(RecordingListener):
        def committed(self, record: Record) -> None:
            if record.shard == 1:
                raise StorageError("the store does not answer")
            super().committed(record)
            stopping.set()

    monkeypatch.setattr(actors, "Worker", CommitsWhenAskedToStop)
    run, stopping = make_run(tmp_path, 2, 1, cluster={"workers": 1}), threading.Event()
    started = time.monotonic()
    open_shards = run_on_ray(run, [1, 0], {}, StopsAfterTheFirst(), stopping, TIMEOUTS)
    assert open_shards == {1: "the store does not answer"}
    assert time.monotonic() - started < TIMEOUTS.shutdown


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

SAMPLING = {"steps": 6}


@pytest.fixture(scope="module")
def model(demo_models: dict[str, Path]) -> Path:
    return demo_models["sd"]


def finish_inline(run: Run, shards: Iterable[int]) -> dict[str, bytes]:
    """Process the shards in this process, without Ray; returns the data files of the run."""
    from stylemill.execution.local import run_inline

    assert run_inline(run, list(shards), {}, RecordingListener(), threading.Event()) == {}
    return data_files(run)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data files of a run without Ray."""
    run = make_run(tmp_path_factory.mktemp("inline"), 6, 2, model=str(model), sampling=SAMPLING)
    return finish_inline(run, range(3))


def test_a_worker_killed_while_sampling_is_replaced_and_the_files_are_identical(
    local_ray_session: None, model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WritesPid(Worker):
        def location(self) -> WorkerLocation:
            location = super().location()
            (self._run.paths.output / "pid").write_text(str(location.pid))
            return location

    monkeypatch.setattr(actors, "Worker", WritesPid)
    run = make_run(tmp_path, 6, 2, model=str(model), sampling=SAMPLING, cluster={"workers": 1})
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
    assert data_files(run) == expected


def test_stopped_workers_write_checkpoints_and_the_next_start_resumes_from_them(
    local_ray_session: None, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    settings = {"sampling": SAMPLING, "cluster": {"workers": 1}, "checkpoint": {"every_steps": 100}}
    run = make_run(tmp_path, 6, 2, model=str(model), **settings)
    listener, stopping = RecordingListener(), threading.Event()
    listener.on_progress = lambda progress: stopping.set() if progress.stage == "sample" else None
    open_shards = run_on_ray(run, range(3), {}, listener, stopping, TIMEOUTS)
    assert open_shards
    assert sorted([*open_shards, *listener.committed_shards]) == [0, 1, 2]
    assert any(
        list(run.paths.checkpoints(shard).glob("*")) for shard in open_shards if run.paths.checkpoints(shard).exists()
    )
    assert finish_inline(run, open_shards) == expected
