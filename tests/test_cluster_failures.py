"""Workers with the real model that die over one pair, hang, or come to a machine where the model cannot be loaded."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_runs import PATIENCE, RecordingListener, make_run, one_ray
from stylemill import __version__
from stylemill.cluster import actors as actors
from stylemill.cluster import run_on_ray
from stylemill.cluster.worker import Loaded, Worker, WorkerLocation
from stylemill.errors import ModelError
from stylemill.execution.attempt import Attempt, Run
from stylemill.store.checkpoints import newest_step
from stylemill.store.ledger import Ledger
from stylemill.store.records import Record


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with one_ray(sys.modules[__name__]):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("demo") / "model")


class Faulty(Worker):
    """A real worker in whose process the faults hold that the run folder names."""

    def __init__(self, run: Run) -> None:
        rules = run.paths.output / "faults"
        os.environ["STYLEMILL_FAILPOINTS_STATE"] = str(run.paths.output.parent)
        os.environ["STYLEMILL_FAILPOINTS"] = rules.read_text() if rules.exists() else ""
        super().__init__(run)


@pytest.fixture
def run_with(ray_session: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Works off a run of 2 shards of 4 pairs in which `rules` hold; returns it with what was heard."""
    monkeypatch.setattr(actors, "Worker", Faulty)

    def work(rules: str, name: str, **cluster: Any) -> tuple[Run, RecordingListener]:
        folder = tmp_path / name
        folder.mkdir()
        cluster = {"workers": 1, "micro_batch": 2, **cluster}
        job = {"retries": 2, "sampling": {"steps": 4}, "cluster": cluster}
        run, ears = make_run(folder, 8, 4, model=str(model), **job), RecordingListener()
        (run.paths.output / "faults").write_text(rules)
        assert run_on_ray(run, range(2), {}, ears, threading.Event(), PATIENCE) == {}, ears.warnings
        assert sorted(ears.done) == [0, 1]
        return run, ears

    return work


def images(run: Run) -> dict[int, bytes]:
    rows = [row for path in sorted(run.paths.data_folder.iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["row"]: row["image"]["bytes"] for row in rows}


def failures(run: Run) -> list[tuple[int, str, str]]:
    rows = [row for path in sorted(run.paths.failures_folder.iterdir()) for row in pq.read_table(path).to_pylist()]
    return [(row["row"], row["stage"], row["error"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "killer", "stage"),
    [
        ("mid-sample:kill:row=6:step=3:times=always", 6, "sample"),
        ("mid-sample:segfault:row=5:step=1:times=always", 5, "sample"),
        ("mid-sample:raise:row=4:step=2:times=always", 4, "sample"),  # as a CUDA error that stays would
    ],
)
def test_a_pair_that_kills_its_workers_is_found_and_the_others_come_out_as_ever(
    run_with: Any, rules: str, killer: int, stage: str
) -> None:
    undisturbed, _ = run_with("", "whole")
    run, _ = run_with(rules, "run")
    assert failures(run) == [(killer, stage, "PoisonPairError")]
    expected = images(undisturbed)
    del expected[killer]
    assert images(run) == expected
    ledger = Ledger(run.paths)
    ledger.refresh()
    (record,) = ledger.records(1)
    assert record.failed_by_class == {"PoisonPairError": 1}
    assert newest_step(run.paths, 1) is None, "the checkpoints are gone"
    assert list(run.paths.tmp.iterdir()) == []


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_its_shard_goes_on(run_with: Any) -> None:
    undisturbed, _ = run_with("", "whole")
    run, ears = run_with("mid-sample:hang:shard=1:step=3", "run", step_timeout=0.5)
    assert images(run) == images(undisturbed)
    hung = [warning for warning in ears.warnings if "no progress for" in warning]
    assert len(hung) == 1
    assert "in shard 1, stage sample, step" in hung[0]
    assert "cluster.step_timeout" in hung[0]


@pytest.mark.slow
def test_a_stopped_worker_is_killed_for_good(run_with: Any) -> None:
    """It holds its lock and its GPU until it is dead, and hears no request to end."""
    _, ears = run_with("mid-sample:stop:shard=1:step=3", "run", step_timeout=0.5)
    (warning,) = [warning for warning in ears.warnings if "no progress for" in warning]
    pid = int(warning.split("pid ")[1].split()[0])
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]


# --- machines ---------------------------------------------------------------------------------------------------------


class Settler(Worker):
    """Of two machines, one may be unfit; which one a worker comes to is told by the count of those before it."""

    unfit: tuple[str, ...] = ()

    def hello(self) -> WorkerLocation:
        places = self._run.paths.output / "places"
        with open(places, "a") as file:
            file.write(".")
        self.host = f"machine {places.stat().st_size % 2}"
        return WorkerLocation(self.host, os.getpid(), __version__)

    def load(self, micro_batch: int | None) -> Loaded:
        if self.host in self.unfit:
            raise ModelError(f"{self.host}: no model there")
        return Loaded({"micro_batch": 1}, 0)

    def work(self, attempt: Attempt) -> Record | None:
        return Record(attempt.shard, "f" * 64, 0, 1, attempt.id)


class OneUnfit(Settler):
    unfit = ("machine 1",)


class AllUnfit(Settler):
    unfit = ("machine 0", "machine 1")


def test_a_machine_where_the_model_cannot_be_loaded_is_given_up_and_others_go_on(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "Worker", OneUnfit)
    run, ears = make_run(tmp_path, 4, 1, cluster={"workers": 2}), RecordingListener()
    assert run_on_ray(run, range(4), {}, ears, threading.Event(), PATIENCE) == {}
    assert sorted(ears.done) == [0, 1, 2, 3]
    assert any("cannot be loaded on machine 1" in warning for warning in ears.warnings)


def test_when_no_machine_can_load_the_model_the_run_stops_with_the_reason(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "Worker", AllUnfit)
    run = make_run(tmp_path, 4, 1, cluster={"workers": 2})
    with pytest.raises(ModelError, match=r"^machine \d: no model there$"):
        run_on_ray(run, range(4), {}, RecordingListener(), threading.Event(), PATIENCE)
