"""Measurements of an engine: seconds and memory of each call of the UNet, and of a run; and the rates of its device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stylemill.bench.pass_cost import PassCost
from stylemill.bench.result import Tile
from stylemill.bench.tile import tile_pairs
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine
from stylemill.engine.attention import Target
from stylemill.engine.kernels import repeatable
from stylemill.engine.unet.text import Text
from stylemill.errors import DeviceMemoryError, JobError

TIMESTEP = 401  # of the calls; their duration does not depend on it


# --- time and memory --------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Wait until the device has finished all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """The median duration of `work` in `repeats` calls, after one call to warm up."""
    work()
    durations = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


@dataclass
class PeakMemory:
    """The most memory that tensors took in a block, in GiB; 0 on a CPU."""

    gib: float = 0.0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the block. What the block yields has the result after its end."""
    found, on_cuda = PeakMemory(), device.type == "cuda"
    gc.collect()  # what earlier measurements left in reference cycles would count
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.gib = torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else 0.0


# --- the device -------------------------------------------------------------------------------------------------------


def device_rates(device: torch.device) -> dict[str, float]:
    """The device's own rates: products of 8192² matrices in half precision, and a copy. Smaller ones on a CPU.

    A CPU has the rate in float32 too, because few have faster products in half precision.
    """
    on_cuda = device.type == "cuda"
    side, elements = (8192, 2**30) if on_cuda else (256, 2**20)
    found = {}
    for dtype in (torch.float16, torch.bfloat16) if on_cuda else (torch.float16, torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(lambda a=a, b=b: [a @ b for _ in range(10)], device) / 10  # type: ignore[misc]
        found[f"{dtype} TFLOP/s".removeprefix("torch.")] = 2 * side**3 / seconds / 1e12
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    found["copy TB/s"] = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device) / 1e12
    return found


def matrix_rate(rates: dict[str, float]) -> float:
    """The highest rate of matrix products in `device_rates`, in TFLOP/s."""
    return max(rate for name, rate in rates.items() if name.endswith("TFLOP/s"))


# --- calls of the UNet ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallCost:
    """What one call of the UNet takes: seconds a pair, and the peak memory of the process in GiB (0 on a CPU)."""

    seconds: float
    peak_gib: float


class CallInputs:
    """Random inputs for calls with `micro_batch` pairs of size × size pixels, and the calls with them."""

    def __init__(self, engine: Engine, size: int, micro_batch: int) -> None:
        model, side = engine.model, size // engine.model.pixels_per_latent
        self.engine = engine
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(micro_batch, model.latent_channels, side, side, generator=generator)
        self.z: Tensor = drawn.to(model.device, model.latent_dtype)
        self.text: Text = model.encode_text("")
        engine.calls.slot = micro_batch

    def denoise(self) -> Tensor:
        return self.engine.calls.predict_noise(self.z, TIMESTEP, self.text)

    def features(self) -> Any:
        return self.engine.calls.activations(self.z, TIMESTEP, self.text)

    def targets(self) -> list[Target]:
        """Features of other latents, for `gradient`: each pair has a style and a content of its own."""
        features = self.engine.calls.activations(self.z.flip(0) * 0.9, TIMESTEP, self.text)
        return [Target(one.k.clone(), one.v.clone(), one.q.clone()) for one in features]

    def gradient(self, targets: list[Target]) -> Tensor:
        """The gradient at λ = 0.25, with the loss scale of half precision -> (B, C, h, w)."""
        ones, layer_weights = torch.ones(len(self.z), device=self.z.device), (1.0,) * len(self.engine.layers)
        calls = self.engine.calls
        return calls.gradient(self.z, TIMESTEP, self.text, targets, 0.25 * ones, layer_weights, 1.0, 2.0**16 * ones)[0]


def measure_calls(engine: Engine, size: int, micro_batch: int, repeats: int = 3) -> dict[str, CallCost]:
    """The cost of the calls `denoise`, `features` and `gradient`, with `micro_batch` pairs of size × size pixels.

    Raises what torch raises when the memory is too small.
    """
    with repeatable(engine.threads):
        inputs = CallInputs(engine, size, micro_batch)
        found = {name: _call_cost(inputs, work, repeats) for name, work in _forward_calls(inputs).items()}
        targets = inputs.targets()
        found["gradient"] = _call_cost(inputs, lambda: inputs.gradient(targets), repeats)
    return found


def _forward_calls(inputs: CallInputs) -> dict[str, Callable[[], Any]]:
    return {"denoise": inputs.denoise, "features": inputs.features}


def _call_cost(inputs: CallInputs, work: Callable[[], Any], repeats: int) -> CallCost:
    device = inputs.engine.model.device
    with peak_memory(device) as memory:
        seconds = median_seconds(work, device, repeats)
    return CallCost(seconds / len(inputs.z), memory.gib)


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageCost:
    """Seconds of the VAE for one image: to encode it, and to decode its latents."""

    encode_seconds: float
    decode_seconds: float


def measure_images(engine: Engine, size: int, repeats: int = 3) -> ImageCost:
    """The cost of an image of size × size pixels. The engine encodes and decodes one at a time.

    Raises what torch raises when the memory is too small to encode it, and DeviceMemoryError if it is to decode it.
    """
    model, grey = engine.model, np.full((size, size, 3), 127, np.uint8)
    with repeatable(engine.threads):
        latents = model.encode_image(grey)
        return ImageCost(
            median_seconds(lambda: model.encode_image(grey), model.device, repeats),
            median_seconds(lambda: engine.decoder.decode(latents, "none"), model.device, repeats),
        )


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCost:
    """What a run of a tile takes, from the medians of some of its steps. Without reading, distances and writing."""

    pairs: int
    steps: int  # of the whole run
    step_seconds: float  # the mean of the run
    other_seconds: float  # to encode and to decode
    passes: dict[str, float]  # UNet passes a pair and step by kind, as the engine counted them
    needed: dict[str, float]  # those that the method needs
    images_lost: int
    peak_gib: float  # 0 on a CPU

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.steps * self.step_seconds + self.other_seconds

    @property
    def images_per_second(self) -> float:
        return self.pairs / self.seconds

    def tflops(self, cost: PassCost) -> float:
        """TFLOP/s of a step. Only passes that the method needs count: none that an overflow repeats."""
        return self.pairs * cost.tflop(self.needed) / self.step_seconds


def measure_run(
    engine: Engine, settings: Sampling, tile: Tile, size: int, micro_batch: int, timed_steps: int = 3
) -> RunCost:
    """Take the first steps of a run of `tile`, size × size pixels: one to warm up and at most `timed_steps` to time.

    Without sharing, as the method's reference code works, is a run of the tile (1, 1).
    Raises DeviceMemoryError if the memory is too small for the micro-batch, and JobError if no pair can be sampled.
    """
    pairs, device = tile_pairs(tile, size), engine.model.device
    engine.micro_batch = micro_batch
    engine.passes.clear()
    with peak_memory(device) as memory:
        start, durations = time.perf_counter(), []
        for state in engine.sample(pairs, settings):
            durations.append(time.perf_counter() - start)
            _check_run(engine, micro_batch, state)
            if len(durations) > timed_steps:
                break
            start = time.perf_counter()
        passes = {kind: count / len(pairs) / len(durations) for kind, count in sorted(engine.passes.items())}
        start = time.perf_counter()
        images = engine.decode(state)
        decoding = time.perf_counter() - start
    steps = step_seconds(settings, durations)
    return RunCost(
        pairs=len(pairs),
        steps=len(steps),
        step_seconds=statistics.mean(steps),
        other_seconds=max(durations[0] - steps[0], 0) + decoding,
        passes=passes,
        needed=needed_passes(settings, tile),
        images_lost=sum(image is None for image in images),
        peak_gib=memory.gib,
    )


def step_seconds(settings: Sampling, durations: list[float]) -> list[float]:
    """The seconds of each step of a run whose first steps took `durations`, of which the first one warmed up.

    They are the median of the steps of its kind, or of all if none of its kind was timed.
    """
    first = settings.first_step
    timed = list(enumerate(durations, first))[1:] or [(first, durations[0])]

    def seconds(step: int) -> float:
        kind = settings.step_kind(step)
        alike = [duration for other, duration in timed if settings.step_kind(other) == kind]
        return statistics.median(alike or [duration for _, duration in timed])

    return [seconds(step) for step in range(first, settings.steps)]


def needed_passes(settings: Sampling, tile: Tile) -> dict[str, float]:
    """UNet passes a pair and step by kind, in the mean of a run, where the features of each image are read once."""
    contents, styles = tile
    images = styles + (contents if settings.content_weight > 0 else 0)
    run, steps = settings.passes, settings.steps - settings.first_step
    found = {
        "denoise": run.denoise / steps,
        "feature": images / (contents * styles) * run.features / steps,
        "gradient": run.gradient / steps,
    }
    return {kind: count for kind, count in found.items() if count}


def _check_run(engine: Engine, micro_batch: int, state: Any) -> None:
    if engine.micro_batch < micro_batch:
        raise DeviceMemoryError(f"out of memory with {micro_batch} pairs in a UNet call; take a smaller micro-batch")
    if len(state.excluded) == len(state.latents_of):
        reason = next(iter(state.failures.values())).message
        raise JobError(f"no pair of the tile can be sampled: {reason}")
