"""Small runs on a local Ray, and a listener that records the events of a run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from stylemill.cluster import Timeouts, assignment, failures, pool, worker
from stylemill.cluster.session import ray_session
from stylemill.cluster.worker import LoadedModel, Worker
from stylemill.config.job import ClusterSettings, Job
from stylemill.execution.attempt import Attempt, AutoSettings, Progress, Run
from stylemill.manifest import open_manifest
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.run_file import create_run_folder

TIMEOUTS = Timeouts(connect=2, placement=60, placement_notice=60, shutdown=30, poll_interval=0.05)


@contextmanager
def local_ray(module: ModuleType) -> Iterator[None]:
    """A local Ray for the tests of `module`, whose classes are sent to the workers."""

    def handler(*_: object) -> None: ...

    for sent in (module, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(sent)  # workers cannot import it
    before = signal.signal(signal.SIGTERM, handler)
    with pytest.MonkeyPatch.context() as patch:
        for retrying in (assignment, failures):
            patch.setattr(retrying, "backoff", lambda count: 0.0)
        patch.setattr(pool, "REPLY_TIMEOUT", TIMEOUTS.poll_interval)  # a longer one would delay the polls
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a local Ray must not use it
        with ray_session(ClusterSettings(workers=4), 10) as local:
            assert local
            assert signal.getsignal(signal.SIGTERM) is handler, "Ray replaced the SIGTERM handler of the run"
            yield
    signal.signal(signal.SIGTERM, before)


class WorkerWithoutModel(Worker):
    """A worker that starts quickly, since it does not import torch."""

    device, micro_batch = "card", 7

    def __init__(self, run: Run) -> None:
        worker._import_engine = lambda: None
        super().__init__(run)

    def load(self, auto: AutoSettings) -> LoadedModel:
        numerics = {"device": self.device, "dtype": auto.dtype or "float32"}
        return LoadedModel({**numerics, "micro_batch": auto.micro_batches.get(self.device, self.micro_batch)}, 0)

    def run_attempt(self, attempt: Attempt) -> Record | None:
        return Record(attempt.shard, "f" * 64, 0, 1, attempt.id)


class RecordingListener:
    """Records what the driver reports."""

    def __init__(self, auto_settings: AutoSettings | None = None) -> None:
        self.auto_settings = auto_settings or AutoSettings()
        self.numerics: list[dict[str, str | int]] = []
        self.committed_shards: list[int] = []
        self.warnings: list[str] = []
        self.phases: list[str] = []
        self.on_progress: Callable[[Progress], None] = lambda progress: None

    def record_numerics(self, numerics: dict[str, str | int]) -> None:
        assert not self.committed_shards
        self.numerics.append(numerics)

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def progress(self, progress: Progress) -> None:
        self.on_progress(progress)

    def committed_record(self, attempt: Attempt) -> Record | None:
        return None

    def committed(self, record: Record) -> None:
        self.committed_shards.append(record.shard)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def make_run(folder: Path, rows: int, pairs_per_shard: int, **job: Any) -> Run:
    noise = np.random.default_rng(0)
    for number in range(3):
        pixels = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    columns = {
        "content": [f"{row % 3}.png" for row in range(rows)],
        "style": [f"{row // 3}.png" for row in range(rows)],
    }
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    values = {
        "name": "test",
        "manifest": str(folder / "pairs.parquet"),
        "output": str(folder / "out"),
        "model": str(folder / "model"),
        "image": {"size": 64},
        "sampling": {"steps": 10},
        "checkpoint": {"every_steps": 2},
        "retries": 1,
        **job,
    }
    paths = RunPaths(folder / "out", -(-rows // pairs_per_shard))
    create_run_folder(paths)
    return Run(Job.parse(values), paths, open_manifest(values["manifest"]), "f" * 64, pairs_per_shard, "demo", "base")


def data_files(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.paths.data_folder.iterdir())}
