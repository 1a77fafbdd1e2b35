"""What `auto` stands for: the first worker chooses dtype and micro-batch, and those after it take them over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stylemill
from ray_runs import make_run
from stylemill.config.job import Job
from stylemill.engine import Engine
from stylemill.engine.batching import LARGEST_MICRO_BATCH, USABLE_MEMORY, cpu_micro_batch, gpu_micro_batch
from stylemill.engine.memory import measured_micro_batch
from stylemill.engine.unet import model as loaded_model
from stylemill.errors import ModelError
from stylemill.execution.attempt import AutoSettings
from stylemill.execution.worker_engine import load_engine

# --- dtype ------------------------------------------------------------------------------------------------------------


def job_of_two_shards(folder: Path, model: Path) -> Job:
    """Of two pairs each; the second one fails while STYLEMILL_FAILPOINTS says so."""
    settings = {"shards": {"pairs_per_shard": 2}, "sampling": {"steps": 2}, "retries": 0, "cluster": {"workers": 1}}
    return make_run(folder, 4, 2, model=str(model), **settings).job


def start_on_a_gpu(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the run in a process that chooses float16, as one with a GPU does, and commit shard 0 of it."""
    real: Callable[..., Engine] = Engine.load

    def load(model: str, *, dtype: str, device: str, **options: Any) -> Engine:
        assert (dtype, device) == ("auto", "auto")
        return real(model, dtype="float16", device="cpu", **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", load)
        patch.setenv("STYLEMILL_FAILPOINTS", "before-read:raise:shard=1:error=StorageError:times=always")
        patch.setenv("STYLEMILL_FAILPOINTS_STATE", job.output)
        assert stylemill.run(job, inline=True, quiet=True).exit_code == 1


@pytest.mark.parametrize(
    ("inline", "lost"),
    [(True, False), (True, True), pytest.param(False, False, marks=pytest.mark.slow)],
    ids=["inline", "numerics.json is lost", "on Ray"],
)
def test_a_run_that_began_in_float16_is_resumed_on_a_cpu_in_float16(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: bool, lost: bool
) -> None:
    job, output = job_of_two_shards(tmp_path, folder), tmp_path / "out"
    start_on_a_gpu(job, monkeypatch)
    assert json.loads((output / "numerics.json").read_bytes())["dtype"] == "float16"
    if lost:
        (output / "numerics.json").unlink()
    assert stylemill.run(job, inline=inline, quiet=True).exit_code == 0
    dtypes = [json.loads(path.read_bytes())["numerics"]["dtype"] for path in sorted((output / "records").iterdir())]
    assert dtypes == ["float16", "float16"]
    assert json.loads((output / "numerics.json").read_bytes())["dtype"] == "float16"


def test_a_device_that_is_full_is_not_called_one_without_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv2d(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(loaded_model, "conv2d", conv2d)
    with pytest.raises(torch.OutOfMemoryError):
        loaded_model.check_dtype("float16", "cpu")


def test_a_device_without_the_dtype_of_the_run_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conv2d(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError(f'"slow_conv2d_cpu" not implemented for {str(x.dtype)!r}')  # as older CPU builds

    monkeypatch.setattr(loaded_model, "conv2d", conv2d)
    run = make_run(tmp_path, 1, 1, model=str(folder))
    with pytest.raises(
        ModelError, match=r"cpu of this worker cannot compute in float16 \(.*slow_conv2d.*another model"
    ):
        load_engine(run, AutoSettings("float16"))


def test_a_dtype_in_the_job_is_used_whatever_was_chosen(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 1, model={"name": str(folder), "dtype": "bfloat16"})
    assert load_engine(run, AutoSettings("float16")).numerics["dtype"] == "bfloat16"


# --- micro-batch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_size", "sizes", "expected"),
    [
        ("auto", {"cpu": 5}, 5),  # of the run's first worker, which had the same device
        ("auto", {"NVIDIA H100 80GB HBM3": 64}, cpu_micro_batch((64, 64))),  # another card's says nothing here
        (3, {"cpu": 5}, 3),
    ],
)
def test_a_worker_takes_the_micro_batch_of_its_own_device(
    folder: Path, tmp_path: Path, given_size: Any, sizes: dict[str, int], expected: int
) -> None:
    run = make_run(tmp_path, 1, 1, model=str(folder), cluster={"micro_batch": given_size})
    assert load_engine(run, AutoSettings("float32", sizes)).micro_batch == expected


def test_choices_are_kept_and_new_devices_added() -> None:
    first = AutoSettings().with_choices_of({"device": "A", "dtype": "float16", "micro_batch": 8})
    assert first == AutoSettings("float16", {"A": 8})
    again = first.with_choices_of({"device": "A", "dtype": "float16", "micro_batch": 4})  # halved, then replaced
    assert again == first
    assert again.with_choices_of({"device": "B", "dtype": "float16", "micro_batch": 2}).micro_batches == {
        "A": 8,
        "B": 2,
    }


@pytest.mark.parametrize(("gpus", "share"), [("auto", 1.0), (0.25, 0.25), (2.0, 1.0)])
def test_a_worker_with_a_part_of_a_gpu_measures_that_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Any, share: float
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(Engine, "calibrate", lambda self, size, share: asked.append(share))
    load_engine(make_run(tmp_path, 1, 1, model=str(folder), cluster={"gpus_per_worker": gpus}), AutoSettings())
    assert asked == [share]


def test_a_worker_without_a_gpu_does_not_use_one_that_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray does not hide the GPUs of a machine from a worker that reserves none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = make_run(tmp_path, 1, 1, model=str(folder), cluster={"gpus_per_worker": 0.0})
    numerics = load_engine(run, AutoSettings()).numerics
    assert (numerics["device"], numerics["dtype"]) == ("cpu", "float32")


GIB = 2**30
SIZES = st.integers(0, 200 * GIB)


@given(peaks=st.tuples(SIZES, SIZES), features=SIZES, held=SIZES, free=SIZES, total=SIZES, share=st.floats(0.01, 1.0))
def test_a_gpu_micro_batch_is_the_largest_power_of_two_that_fits(
    peaks: tuple[int, int], features: int, held: int, free: int, total: int, share: float
) -> None:
    one, slope = peaks[0], max(peaks[1] - peaks[0], 1)
    sizes = {"peak_of_one": peaks[0], "peak_of_two": peaks[1], "features": features, "held": held}
    found = gpu_micro_batch(**sizes, free=free, total=total, share=share)
    available = USABLE_MEMORY * min(free, share * total - held)

    def fits(pairs: int) -> bool:
        return features + one + (pairs - 1) * slope <= available

    assert found in (1, 2, 4, 8, 16, 32, LARGEST_MICRO_BATCH)
    assert found == 1 or fits(found)
    assert found == LARGEST_MICRO_BATCH or not fits(2 * found)
    assert gpu_micro_batch(**sizes, free=free, total=total, share=1.0) >= found
    assert gpu_micro_batch(**sizes, free=free // 2, total=total, share=share) <= found


class FakeGpu:
    """A GPU with the functions of torch.cuda that tell of its memory, and torch's way of keeping freed memory."""

    def __init__(self, total: int, others: int, weights: int) -> None:
        self.total, self.others = total, others  # bytes; `others` is what other processes hold
        self.allocated = self.peak = self.reserved = weights

    def sample(self, count: int) -> None:
        self.peak = max(self.peak, self.allocated + (2 + 3 * count) * GIB)
        self.reserved = max(self.reserved, self.peak)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        functions: dict[str, Callable[..., Any]] = {
            "empty_cache": lambda: setattr(self, "reserved", self.allocated),
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.allocated),
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "memory_reserved": lambda device: self.reserved,
            "mem_get_info": lambda device: (self.total - self.others - self.reserved, self.total),
        }
        for name, function in functions.items():
            patch.setattr(torch.cuda, name, function)


@pytest.mark.parametrize(
    ("others", "features", "share", "expected"),
    [
        (6 * GIB, 0, 1.0, 16),  # 0.8 × (80 − 6 − 4) = 56 GiB, and 16 pairs take 50; the probe's own 8 count as free
        (0, 12 * GIB, 1.0, 8),
        (0, 0, 0.5, 8),  # 0.8 × (40 − 4) = 28.8 GiB
        (40 * GIB, 0, 1.0, 8),
        (40 * GIB, 0, 0.5, 8),  # the other worker's memory counts once
    ],
    ids=["freed memory", "features", "half of the GPU", "others", "a worker beside another"],
)
def test_the_micro_batch_of_a_gpu_counts_what_this_worker_may_use(
    monkeypatch: pytest.MonkeyPatch, others: int, features: int, share: float, expected: int
) -> None:
    gpu = FakeGpu(80 * GIB, others, weights=4 * GIB)
    gpu.install(monkeypatch)
    assert measured_micro_batch(torch.device("cuda"), gpu.sample, features, share) == expected
    assert gpu.reserved == gpu.allocated
