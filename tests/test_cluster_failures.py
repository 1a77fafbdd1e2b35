"""Workers that die on a poison pair or hang, with the demo model, and machines on which the model cannot be loaded."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_runs import TIMEOUTS, RecordingListener, WorkerWithoutModel, local_ray, make_run
from stylemill import __version__
from stylemill.cluster import actors, run_on_ray
from stylemill.cluster.worker import LoadedModel, Worker, WorkerLocation
from stylemill.errors import ModelError
from stylemill.execution.attempt import Attempt, AutoSettings, Run
from stylemill.store.checkpoints import newest_step
from stylemill.store.ledger import Ledger
from stylemill.store.records import Record


@pytest.fixture(scope="module")
def local_ray_session() -> Iterator[None]:
    with local_ray(sys.modules[__name__]):
        yield


@pytest.fixture(scope="module")
def model(demo_models: dict[str, Path]) -> Path:
    return demo_models["sd"]


class FailpointWorker(Worker):
    """A worker whose process uses the failpoints in the file `failpoints` of the run folder."""

    def __init__(self, run: Run) -> None:
        rules = run.paths.output / "failpoints"
        os.environ["STYLEMILL_FAILPOINTS_STATE"] = str(run.paths.output.parent)
        os.environ["STYLEMILL_FAILPOINTS"] = rules.read_text() if rules.exists() else ""
        super().__init__(run)


def run_of_two_shards(folder: Path, model: Path, **cluster: Any) -> Run:
    """A run of 2 shards of 3 pairs."""
    cluster = {"workers": 1, "micro_batch": 2, **cluster}
    return make_run(folder, 6, 3, model=str(model), retries=2, sampling={"steps": 6}, cluster=cluster)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The images of a run without failures, in this process."""
    from stylemill.execution.local import run_inline

    run = run_of_two_shards(tmp_path_factory.mktemp("undisturbed"), model)
    assert run_inline(run, range(2), {}, RecordingListener(), threading.Event()) == {}
    return images(run)


@pytest.fixture
def run_with(local_ray_session: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that completes such a run with failpoint `rules`; returns the run and the listener."""
    monkeypatch.setattr(actors, "Worker", FailpointWorker)

    def work(rules: str, **cluster: Any) -> tuple[Run, RecordingListener]:
        run, listener = run_of_two_shards(tmp_path, model, **cluster), RecordingListener()
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


KILL = "mid-sample:kill:row=4:step=3"
SEGFAULT = "mid-sample:segfault:row=4:step=3"
RAISE = "mid-sample:raise:row=5:step=2"  # as a permanent CUDA error does


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "poison_row", "stage"),
    [
        # Each rule but the last acts once, so that attempts and probes end both ways.
        (f"{KILL}; {SEGFAULT}; {KILL}; {SEGFAULT}:times=always", 4, "sample"),
        (f"{RAISE}:times=always", 5, "sample"),
    ],
    ids=["kill and segfault", "raise"],
)
def test_a_poison_pair_is_recorded_as_failed_and_the_other_images_are_identical(
    run_with: Any, undisturbed: dict[int, bytes], rules: str, poison_row: int, stage: str
) -> None:
    run, _ = run_with(rules)
    assert failures(run) == [(poison_row, stage, "PoisonPairError")]
    assert images(run) == {row: image for row, image in undisturbed.items() if row != poison_row}
    ledger = Ledger(run.paths)
    ledger.refresh()
    (record,) = ledger.records(1)
    assert record.failed_by_class == {"PoisonPairError": 1}
    assert newest_step(run.paths, 1) is None, "the checkpoints are removed"
    assert list(run.paths.tmp.iterdir()) == []


@pytest.mark.slow
def test_hanging_and_stopped_workers_are_killed_and_their_shards_are_resumed(
    run_with: Any, undisturbed: dict[int, bytes]
) -> None:
    """A process stopped by SIGSTOP ignores a request to exit, and keeps its lock and its GPU.

    A stopped worker reports no progress, so the driver applies the limit that it last received. The failpoints are at a
    late step, so that this is the limit of a step; it is `stage_timeout` before the second step.
    """
    rules = "mid-sample:hang:shard=0:step=5; mid-sample:stop:shard=1:step=5"
    run, listener = run_with(rules, step_timeout=0.5, stage_timeout=60.0)
    assert images(run) == undisturbed
    warnings = [warning for warning in listener.warnings if "no progress for" in warning]
    assert len(warnings) == 2
    for shard in (0, 1):
        assert any(f"in shard {shard}, stage sample, step" in warning for warning in warnings)
    for warning in warnings:
        assert "cluster.step_timeout" in warning
        pid = int(warning.split("pid ")[1].split()[0])
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]


# --- machines ---------------------------------------------------------------------------------------------------------


class OnTwoMachines(WorkerWithoutModel):
    """Workers that are placed on two machines in turn; on the machines in `failing` the model cannot be loaded."""

    failing: tuple[str, ...] = ()

    def location(self) -> WorkerLocation:
        for number in count():
            with suppress(FileExistsError):
                (self._run.paths.output / f"worker {number}").touch(exist_ok=False)
                break
        self.host = f"machine {number % 2}"
        return WorkerLocation(self.host, os.getpid(), __version__)

    def load(self, auto: AutoSettings) -> LoadedModel:
        if self.host in self.failing:
            raise ModelError(f"{self.host}: no model there")
        return super().load(auto)


class OneFails(OnTwoMachines):
    failing = ("machine 1",)

    def run_attempt(self, attempt: Attempt) -> Record | None:
        while not (self._run.paths.output / "warned").exists():
            time.sleep(0.005)
        return super().run_attempt(attempt)


class BothFail(OnTwoMachines):
    failing = ("machine 0", "machine 1")


def test_the_run_continues_without_a_machine_on_which_the_model_cannot_be_loaded(
    local_ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SignalsWarning(RecordingListener):
        def warn(self, message: str) -> None:
            super().warn(message)
            (run.paths.output / "warned").touch()

    monkeypatch.setattr(actors, "Worker", OneFails)
    run, listener = make_run(tmp_path, 4, 1, cluster={"workers": 2}), SignalsWarning()
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
