"""Workers that die on a poison pair or hang, with the demo model, and machines on which the model cannot be loaded."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_runs import TIMEOUTS, RecordingListener, local_ray, make_run
from stylemill import __version__
from stylemill.cluster import actors, run_on_ray
from stylemill.cluster.worker import LoadedModel, Worker, WorkerLocation
from stylemill.errors import ModelError
from stylemill.execution.attempt import Attempt, Run
from stylemill.store.checkpoints import newest_step
from stylemill.store.ledger import Ledger
from stylemill.store.records import Record


@pytest.fixture(scope="module")
def local_ray_session() -> Iterator[None]:
    with local_ray(sys.modules[__name__]):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("demo") / "model")


class FailpointWorker(Worker):
    """A worker whose process uses the failpoints in the file `failpoints` of the run folder."""

    def __init__(self, run: Run) -> None:
        rules = run.paths.output / "failpoints"
        os.environ["STYLEMILL_FAILPOINTS_STATE"] = str(run.paths.output.parent)
        os.environ["STYLEMILL_FAILPOINTS"] = rules.read_text() if rules.exists() else ""
        super().__init__(run)


@pytest.fixture
def run_with(local_ray_session: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that completes a run of 2 shards of 4 pairs with failpoint `rules`; returns run and listener."""
    monkeypatch.setattr(actors, "Worker", FailpointWorker)

    def work(rules: str, name: str, **cluster: Any) -> tuple[Run, RecordingListener]:
        folder = tmp_path / name
        folder.mkdir()
        cluster = {"workers": 1, "micro_batch": 2, **cluster}
        job = {"retries": 2, "sampling": {"steps": 4}, "cluster": cluster}
        run, listener = make_run(folder, 8, 4, model=str(model), **job), RecordingListener()
        (run.paths.output / "failpoints").write_text(rules)
        assert run_on_ray(run, range(2), {}, listener, threading.Event(), TIMEOUTS) == {}, listener.warnings
        assert sorted(listener.committed_shards) == [0, 1]
        return run, listener

    return work


def images(run: Run) -> dict[int, bytes]:
    rows = [row for path in sorted(run.paths.data_folder.iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["row"]: row["image"]["bytes"] for row in rows}


def failures(run: Run) -> list[tuple[int, str, str]]:
    rows = [row for path in sorted(run.paths.failures_folder.iterdir()) for row in pq.read_table(path).to_pylist()]
    return [(row["row"], row["stage"], row["error"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "poison_row", "stage"),
    [
        ("mid-sample:kill:row=6:step=3:times=always", 6, "sample"),
        ("mid-sample:segfault:row=5:step=1:times=always", 5, "sample"),
        ("mid-sample:raise:row=4:step=2:times=always", 4, "sample"),  # as a permanent CUDA error does
    ],
)
def test_a_poison_pair_is_recorded_as_failed_and_the_other_images_are_identical(
    run_with: Any, rules: str, poison_row: int, stage: str
) -> None:
    undisturbed, _ = run_with("", "whole")
    run, _ = run_with(rules, "run")
    assert failures(run) == [(poison_row, stage, "PoisonPairError")]
    expected = images(undisturbed)
    del expected[poison_row]
    assert images(run) == expected
    ledger = Ledger(run.paths)
    ledger.refresh()
    (record,) = ledger.records(1)
    assert record.failed_by_class == {"PoisonPairError": 1}
    assert newest_step(run.paths, 1) is None, "the checkpoints are removed"
    assert list(run.paths.tmp.iterdir()) == []


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_its_shard_is_resumed(run_with: Any) -> None:
    undisturbed, _ = run_with("", "whole")
    run, listener = run_with("mid-sample:hang:shard=1:step=3", "run", step_timeout=0.5)
    assert images(run) == images(undisturbed)
    warnings = [warning for warning in listener.warnings if "no progress for" in warning]
    assert len(warnings) == 1
    assert "in shard 1, stage sample, step" in warnings[0]
    assert "cluster.step_timeout" in warnings[0]


@pytest.mark.slow
def test_the_process_of_a_stopped_worker_is_killed(run_with: Any) -> None:
    """A process stopped by SIGSTOP ignores a request to exit, and keeps its lock and its GPU."""
    _, listener = run_with("mid-sample:stop:shard=1:step=3", "run", step_timeout=0.5)
    (warning,) = [warning for warning in listener.warnings if "no progress for" in warning]
    pid = int(warning.split("pid ")[1].split()[0])
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]


# --- machines ---------------------------------------------------------------------------------------------------------


class OnTwoMachines(Worker):
    """Workers that are placed on two machines in turn; on the machines in `failing` the model cannot be loaded."""

    failing: tuple[str, ...] = ()

    def location(self) -> WorkerLocation:
        places = self._run.paths.output / "places"
        with open(places, "a") as file:
            file.write(".")
        self.host = f"machine {places.stat().st_size % 2}"
        return WorkerLocation(self.host, os.getpid(), __version__)

    def load(self, micro_batch: int | None) -> LoadedModel:
        if self.host in self.failing:
            raise ModelError(f"{self.host}: no model there")
        return LoadedModel({"micro_batch": 1}, 0)

    def run_attempt(self, attempt: Attempt) -> Record | None:
        return Record(attempt.shard, "f" * 64, 0, 1, attempt.id)


class OneFails(OnTwoMachines):
    failing = ("machine 1",)


class BothFail(OnTwoMachines):
    failing = ("machine 0", "machine 1")


def test_the_run_continues_without_a_machine_on_which_the_model_cannot_be_loaded(
    local_ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "Worker", OneFails)
    run, listener = make_run(tmp_path, 4, 1, cluster={"workers": 2}), RecordingListener()
    assert run_on_ray(run, range(4), {}, listener, threading.Event(), TIMEOUTS) == {}
    assert sorted(listener.committed_shards) == [0, 1, 2, 3]
    assert any("cannot be loaded on machine 1" in warning for warning in listener.warnings)


def test_the_run_stops_if_the_model_can_be_loaded_on_no_machine(
    local_ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "Worker", BothFail)
    run = make_run(tmp_path, 4, 1, cluster={"workers": 2})
    with pytest.raises(ModelError, match=r"^machine \d: no model there$"):
        run_on_ray(run, range(4), {}, RecordingListener(), threading.Event(), TIMEOUTS)
