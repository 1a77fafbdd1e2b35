"""Out of memory, the micro-batch is halved and the work repeated; poison pairs are excluded without other changes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import stylemill
from ray_runs import make_run
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, InputImage, Pair
from stylemill.engine.memory import translate_out_of_memory
from stylemill.errors import DeviceMemoryError
from stylemill.execution.attempt import Attempt, AutoSettings, Progress, Run
from stylemill.execution.shard import process_shard
from stylemill.store.records import Record

SETTINGS = Sampling(steps=3, guidance_scale=1.0)


def pairs(count: int) -> list[Pair]:
    noise = np.random.default_rng(0)
    one = [InputImage(str(n), noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for n in range(count + 1)]
    return [Pair((one[0],), (64, 64), content=content) for content in one[1:]]


def load(folder: Path, micro_batch: int) -> Engine:
    return Engine.load(folder, dtype="float32", device="cpu", micro_batch=micro_batch)


def limit_memory(module: Any, name: str, samples: int, since_call: int = 0) -> list[int]:
    """Let a method fail like CUDA out of memory for batches of more than `samples`; returns the sizes of its calls."""
    real, sizes = getattr(module, name), []

    def limited(z: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(len(z))
        if len(z) > samples and len(sizes) > since_call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 10 MiB free.")
        return real(z, *rest, **options)

    setattr(module, name, limited)
    return sizes


def sample(engine: Engine, count: int = 5) -> tuple[torch.Tensor, list[Any]]:
    *_, state = engine.sample(pairs(count), SETTINGS)
    return state.latents, engine.decode(state)


def test_after_out_of_memory_a_step_is_repeated_with_half_the_micro_batch_which_then_stays(folder: Path) -> None:
    engine = load(folder, 8)
    sizes = limit_memory(engine.model.unet, "forward", 2)
    latents, images = sample(engine)
    assert engine.micro_batch == 2
    assert engine.numerics["micro_batch"] == 2
    failed = [size for size in sizes if size > 2]
    assert len(failed) == 2, "8 and 4 are tried once each"
    expected, expected_images = sample(load(folder, 2))
    assert torch.equal(latents, expected)
    assert all(map(np.array_equal, images, expected_images))


def test_changes_by_a_failed_step_are_undone(folder: Path) -> None:
    """The step fails after it has changed some pairs."""
    unlimited = load(folder, 4)
    calls = limit_memory(unlimited.model.unet, "forward", 99)
    at_step = [(state.step, len(calls)) for state in unlimited.sample(pairs(5), SETTINGS)]
    engine = load(folder, 4)
    limit_memory(engine.model.unet, "forward", 2, since_call=at_step[0][1] + 3)
    states = engine.sample(pairs(5), SETTINGS)
    first = next(states).copy()
    second = next(states)
    assert (second.step, engine.micro_batch) == (2, 2)
    other = load(folder, 2)
    again = next(other.sample([], SETTINGS, first))
    assert torch.equal(second.latents, again.latents)


# --- decoding, encoding, refinement -----------------------------------------------------------------------------------


def limit_side(module: Any, name: str, side: int) -> list[int]:
    """Let a method fail like CUDA out of memory for tensors with a longer side than `side`; returns that of its calls.

    The limit comes after the method's own work, when its results are in memory beside its arguments.
    """
    real, sides = getattr(module, name), []

    def limited(z: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sides.append(max(z.shape[-2:]))
        result = real(z, *rest, **options)
        if sides[-1] > side:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 10 MiB free.")
        return result

    setattr(module, name, limited)
    return sides


LARGE = (64, 320)  # pixels; 8 × 40 latents, and a tile of the untrained VAE has 32


def large_pairs(count: int) -> list[Pair]:
    return [replace(pair, size=LARGE, content=None) for pair in pairs(count)]


def test_an_image_that_does_not_fit_as_a_whole_is_decoded_in_tiles_and_so_are_all_later_ones(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load(folder, 4)
    *_, state = engine.sample(large_pairs(3), SETTINGS)
    whole = engine.decode(state)
    assert engine.numerics["decoding"] == "whole images"
    sides = limit_side(engine.model.vae.decoder, "forward", 32)
    tiled = engine.decode(state)
    assert (sides[0], max(sides[1:])) == (40, 32), "a whole image is tried once"
    assert (engine.micro_batch, engine.numerics["decoding"]) == (4, "tiles"), "the UNet's micro-batch has not changed"
    for one, other in zip(whole, tiled, strict=True):
        assert one is not None
        assert other is not None
        assert one.shape == other.shape == (320, 64, 3)
        assert not np.array_equal(one, other)
    assert caplog.text.count("from now on images are decoded in tiles") == 1
    again = load(folder, 4)
    again.decoder.in_tiles = True
    assert all(map(np.array_equal, again.decode(state), tiled)), "whatever was decoded before"
    small = sample(engine, 1)[1]
    assert all(map(np.array_equal, small, sample(load(folder, 4), 1)[1])), (
        "an image that fits into a tile is decoded whole"
    )


def test_a_shard_is_decoded_in_one_way_also_if_memory_runs_out_at_its_last_image(folder: Path) -> None:
    engine = load(folder, 4)
    *_, state = engine.sample(large_pairs(3), SETTINGS)
    decoder, calls = engine.model.vae.decoder, []
    real = decoder.forward

    def limited(z: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(max(z.shape[-2:]))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 10 MiB free.")
        return real(z, *rest, **options)

    decoder.forward = limited
    images = engine.decode(state)
    assert calls[:3] == [40, 40, 40], "two whole images fit"
    in_tiles = load(folder, 4)
    in_tiles.decoder.in_tiles = True
    assert all(map(np.array_equal, images, in_tiles.decode(state)))


@pytest.mark.parametrize("window", [None, 8])
def test_images_are_decoded_one_at_a_time_and_memory_for_a_single_one_is_enough(
    folder: Path, window: int | None
) -> None:
    engine = load(folder, 4)
    sizes = limit_memory(engine.model.vae, "decode", 1)
    settings = SETTINGS.model_copy(update={"window": window, "content_weight": 0.0})
    *_, state = engine.sample(large_pairs(2), settings)
    assert all(image is not None for image in engine.decode(state))
    assert (sizes, engine.micro_batch) == ([1, 1], 4)


@pytest.mark.parametrize(
    ("size", "limit", "tiling", "message"),
    [
        (LARGE, 31, "none", r"decoding an image in tiles \(.*2.00 GiB\); take a smaller image.size, or end"),
        ((64, 64), 0, "none", r"decoding an image \(.*2.00 GiB\); take a smaller image.size, or end"),
        (
            LARGE,
            32,
            "y",
            r"decoding an image \(.*sampling.tiling: none \(an image with tiling y cannot be decoded in t",
        ),
    ],
    ids=["a tile does not fit", "smaller than a tile", "seamless"],
)
def test_an_image_that_cannot_be_decoded_in_the_memory_fails_with_advice(
    folder: Path, size: tuple[int, int], limit: int, tiling: str, message: str
) -> None:
    engine = load(folder, 4)
    settings = SETTINGS.model_copy(update={"tiling": tiling})
    *_, state = engine.sample([replace(large_pairs(1)[0], size=size)], settings)
    limit_side(engine.model.vae.decoder, "forward", limit)
    with pytest.raises(DeviceMemoryError, match=message):
        engine.decode(state)
    assert (engine.micro_batch, engine.numerics["decoding"]) == (4, "whole images")


def test_out_of_memory_in_encoding_or_refinement_says_so_and_leaves_the_micro_batch(folder: Path) -> None:
    engine = load(folder, 4)
    *_, state = engine.sample(pairs(2), SETTINGS.model_copy(update={"refine_decoder_steps": 1}))
    limit_side(engine.model.vae.decoder, "forward", 0)
    with pytest.raises(DeviceMemoryError, match=r"out of memory refining the VAE's decoder on a style .*style_size"):
        engine.decode(state)
    limit_side(engine.model.vae.encoder, "forward", 0)
    with pytest.raises(DeviceMemoryError, match=r"out of memory encoding the images .*image.style_size"):
        sample(engine)
    assert engine.micro_batch == 4


# --- errors -----------------------------------------------------------------------------------------------------------


def test_if_one_pair_alone_does_not_fit_the_error_gives_advice(folder: Path) -> None:
    engine = load(folder, 4)
    limit_memory(engine.model.unet, "forward", 0)
    with pytest.raises(DeviceMemoryError, match=r"Tried to allocate 2.00 GiB.*lower cluster.feature_budget_mb"):
        sample(engine)


NO_KERNEL = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access was encountered", NO_KERNEL])
def test_other_errors_are_not_treated_as_out_of_memory(folder: Path, message: str) -> None:
    engine = load(folder, 4)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    engine.model.unet.forward = broken
    with pytest.raises(RuntimeError, match=message):
        sample(engine)
    assert engine.micro_batch == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory."),
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("std::bad_alloc"),
        None,  # torch's own, on the CPU
    ],
)
def test_failed_allocations_are_out_of_memory(error: Exception | None) -> None:
    def work() -> torch.Tensor:
        if error:
            raise error
        return torch.empty(10**15)

    with pytest.raises(DeviceMemoryError, match="out of memory"):
        translate_out_of_memory(work)


def test_a_halved_micro_batch_is_recorded_and_warned_about_and_a_shard_that_never_fits_stays_open(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stylemill.execution import local

    limit = {"samples": 2}

    def load_with_limited_memory(run: Run, auto: AutoSettings) -> Engine:
        engine = load(folder, 4)
        limit_memory(engine.model.unet, "forward", limit["samples"])
        return engine

    monkeypatch.setattr(local, "load_engine", load_with_limited_memory)
    shards, cluster = {"pairs_per_shard": 4}, {"micro_batch": 4}
    settings = {"model": str(folder), "sampling": {"steps": 2}, "retries": 0}
    job = make_run(tmp_path, 4, 4, **settings, shards=shards, cluster=cluster).job
    limit["samples"] = 0
    result = stylemill.run(job, inline=True)
    assert (result.exit_code, list(result.open)) == (1, [0])
    assert "take a smaller image.size" in result.describe()
    limit["samples"] = 2
    assert stylemill.run(job, inline=True).exit_code == 0
    record = Record.from_bytes((tmp_path / "out" / "records" / "00000.json").read_bytes())
    assert record.numerics["micro_batch"] == 2
    assert "a worker halved its micro-batch to 2" in capsys.readouterr().err


# --- poison pairs -----------------------------------------------------------------------------------------------------


def committed(run: Run, engine: Engine, attempt: Attempt, stop_at: int | None = None) -> dict[int, bytes]:
    """Images by output row after the attempt, which is asked to stop at the step `stop_at`."""
    reports: list[Progress] = []

    def stopping() -> bool:
        return bool(reports) and reports[-1].step == stop_at

    process_shard(run, attempt, engine, nullcontext(), reports.append, stopping)
    files = sorted(run.paths.data_folder.iterdir())
    return {row["row"]: row["image"]["bytes"] for path in files for row in pq.read_table(path).to_pylist()}


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_a_poison_pair_is_left_out_and_the_bytes_of_the_others_do_not_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_checkpoint: bool
) -> None:
    """Only row 3 has style 1. With `from_checkpoint`, the shard resumes from a checkpoint of all pairs."""
    engine = load(folder, 2)
    runs, job = [], {"sampling": {"steps": 3}, "checkpoint": {"every_steps": 1}}
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
        runs.append(make_run(tmp_path / name, 4, 4, model=str(folder), **job))
    whole, run = runs
    expected = committed(whole, engine, whole.new_attempt(0, {}))
    if from_checkpoint:
        assert committed(run, engine, run.new_attempt(0, {}), stop_at=2) == {}
    monkeypatch.setenv("STYLEMILL_FAILPOINTS", "mid-sample:raise:row=3:times=always")
    monkeypatch.setenv("STYLEMILL_FAILPOINTS_STATE", str(tmp_path))
    attempt = replace(run.new_attempt(0, {}), poison_pairs={3: "sample"})
    if from_checkpoint:  # the next attempt knows the poison pair from the checkpoint alone
        monkeypatch.setenv("STYLEMILL_FAILPOINTS", "before-decode:raise; mid-sample:raise:row=3:times=always")
        with pytest.raises(RuntimeError, match="injected at before-decode"):
            committed(run, engine, attempt)
        attempt = run.new_attempt(0, {})
    found = committed(run, engine, attempt)
    del expected[3]
    assert found == expected
    (lost,) = pq.read_table(run.paths.failures(0)).to_pylist()
    assert (lost["row"], lost["stage"], lost["error"]) == (3, "sample", "PoisonPairError")
    assert "try it in a run of its own" in lost["message"]
