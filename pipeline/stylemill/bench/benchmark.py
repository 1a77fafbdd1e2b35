"""What `stylemill bench` does: measure one model on one device, a row for each micro-batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from platform import python_version
from typing import Any, Literal

import torch

from stylemill import __version__
from stylemill.bench.measure import (
    CallCost,
    RunCost,
    device_rates,
    matrix_rate,
    measure_calls,
    measure_images,
    measure_run,
    needed_passes,
)
from stylemill.bench.pass_cost import PassCost, known_pass_cost
from stylemill.bench.random_models import random_model
from stylemill.bench.result import BenchResult, BenchRow, Tile
from stylemill.bench.table import BenchTable
from stylemill.config.job import Job
from stylemill.config.model import DType
from stylemill.config.paths import EMBEDDED
from stylemill.config.sampling import DEFAULT_PRESET, Sampling
from stylemill.engine import Engine
from stylemill.engine.batching import LARGEST_MICRO_BATCH, cpu_micro_batch
from stylemill.engine.kernels import prepare_cuda
from stylemill.engine.memory import translate_out_of_memory
from stylemill.engine.unet.model import DTYPES, check_dtype
from stylemill.errors import DeviceMemoryError, JobError
from stylemill.models.resolve import resolve_model
from stylemill.models.single_file import is_single_file

GPU_TILE, CPU_TILE = (8, 8), (2, 4)  # on a CPU, the whole command takes a minute or two
LONG_STEP = 5.0  # seconds; of longer steps, one is timed and not three


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. None, and no micro-batches, stand for defaults that follow from the device and the model."""

    model: str | None = None  # as in a job
    random: str | None = None  # sd15 or sdxl, instead of `model`
    size: int | None = None  # the side of an image in pixels
    dtype: DType = "auto"
    device: str = "auto"
    preset: str | None = None
    method: str | None = None
    steps: int | None = None
    tile: Tile | None = None
    micro_batches: tuple[int, ...] = ()
    compare_naive: bool = False
    compiled: bool = False  # as cluster.compile in a job
    deterministic: bool = True  # as cluster.deterministic


def benchmark(options: BenchOptions, show: Callable[[str], None]) -> BenchResult:
    """Measure what the options say. `show` gets each line of the table as soon as it is measured.

    A micro-batch that does not fit is a row with an error; without `micro_batches`, it is the last one. Raises JobError
    for options that do not fit together or the model, ModelError as `Engine.load` and where the UNet cannot be
    compiled, and DeviceMemoryError if the model itself does not fit.
    """
    settings, device = _sampling(options), _device(options.device)
    tile = options.tile or (GPU_TILE if device.type == "cuda" else CPU_TILE)
    _check_micro_batches(options.micro_batches, tile)
    eager, name = _load(options, device)
    model, size = eager.model, _size(options, eager, settings)
    pass_cost = known_pass_cost(model.unet.config, size)
    rates = device_rates(device) if pass_cost else {}
    images = translate_out_of_memory(partial(measure_images, eager, size), "encoding an image", "take a smaller --size")
    result = BenchResult(
        date=time.strftime("%Y-%m-%d"),
        device=str(eager.numerics["device"]),
        capability=str(eager.numerics["capability"]),
        threads=eager.threads,
        versions=_versions(eager),
        model=name,
        random_weights=options.random is not None or (options.model is None and name != EMBEDDED),
        unet_parameters=sum(parameter.numel() for parameter in model.unet.parameters()),
        latent_channels=model.latent_channels,
        pixels_per_latent=model.pixels_per_latent,
        dtype=str(eager.numerics["dtype"]),
        compiled=options.compiled,
        deterministic=options.deterministic,
        size=size,
        tile=tile,
        preset=options.preset or DEFAULT_PRESET,
        sampling=settings.model_dump(mode="json"),
        rates=rates,
        encode_seconds=images.encode_seconds,
        decode_seconds=images.decode_seconds,
    )
    table = BenchTable(result, options.compare_naive)
    for line in table.header():
        show(line)
    bench = _Bench(settings, tile, size, pass_cost, rates)
    naive = None
    if options.compare_naive:
        naive = bench.naive(eager)
        result.rows.append(naive)
        show(table.line(naive))
    # After the naive row: an engine with compiled calls changes the UNet.
    engine = Engine(model, threads=eager.threads, compiled=options.compiled, deterministic=options.deterministic)
    for micro_batch in options.micro_batches or _default_micro_batches(engine, size, tile):
        row = bench.lockstep(engine, micro_batch, naive)
        result.rows.append(row)
        show(table.line(row))
        if row.error and not options.micro_batches:
            break
    return result


@dataclass(frozen=True)
class _Bench:
    settings: Sampling
    tile: Tile
    size: int
    pass_cost: PassCost | None
    rates: dict[str, float]

    def lockstep(self, engine: Engine, micro_batch: int, naive: BenchRow | None) -> BenchRow:
        return self._row("lockstep", engine, self.tile, micro_batch, naive)

    def naive(self, eager: Engine) -> BenchRow:
        """One pair at a time, whose features every step reads, with the fastest kernels and without compiling."""
        fastest = Engine(eager.model, threads=eager.threads, deterministic=False)
        return self._row("naive", fastest, (1, 1), 1, None)

    def _row(
        self, way: Literal["lockstep", "naive"], engine: Engine, tile: Tile, micro_batch: int, naive: BenchRow | None
    ) -> BenchRow:
        try:
            calls, run = translate_out_of_memory(partial(self._measure, engine, tile, micro_batch))
        except DeviceMemoryError:
            return BenchRow(way=way, micro_batch=micro_batch, error="out of memory")
        tflops = run.tflops(self.pass_cost) if self.pass_cost else None
        ratio = run.images_per_second / naive.images_per_second if naive and naive.images_per_second else None
        return BenchRow(
            way=way,
            micro_batch=micro_batch,
            denoise_ms=1000 * calls["denoise"].seconds,
            features_ms=1000 * calls["features"].seconds,
            gradient_ms=1000 * calls["gradient"].seconds,
            step_seconds=run.step_seconds,
            step_calls_seconds=self._step_calls_seconds(calls, tile),
            seconds_per_image=1 / run.images_per_second,
            images_per_second=run.images_per_second,
            times_naive=ratio,
            tflops=tflops,
            utilisation=tflops / matrix_rate(self.rates) if tflops else None,
            peak_gib=max(run.peak_gib, calls["gradient"].peak_gib) or None,
            passes=run.passes,
            images_lost=run.images_lost,
        )

    def _measure(self, engine: Engine, tile: Tile, micro_batch: int) -> tuple[dict[str, CallCost], RunCost]:
        calls = measure_calls(engine, self.size, micro_batch, 3 if engine.model.device.type == "cuda" else 1)
        timed_steps = 3 if self._step_calls_seconds(calls, tile) < LONG_STEP else 1
        return calls, measure_run(engine, self.settings, tile, self.size, micro_batch, timed_steps)

    def _step_calls_seconds(self, calls: dict[str, CallCost], tile: Tile) -> float:
        """Of the calls that a step of the tile needs, in the mean of a run."""
        seconds = {"denoise": calls["denoise"], "feature": calls["features"], "gradient": calls["gradient"]}
        passes = needed_passes(self.settings, tile)
        return math.prod(tile) * sum(count * seconds[kind].seconds for kind, count in passes.items())


# --- options ----------------------------------------------------------------------------------------------------------


def _sampling(options: BenchOptions) -> Sampling:
    """The settings as those of a job, which has the same checks."""
    changes = {"method": options.method, "steps": options.steps}
    values: dict[str, Any] = {
        "name": "bench",
        "manifest": "none",
        "output": "none",
        "model": options.model or EMBEDDED,
        "preset": options.preset or DEFAULT_PRESET,
        "sampling": {key: value for key, value in changes.items() if value is not None},
        "image": {} if options.size is None else {"size": options.size},
    }
    return Job.parse(values, "stylemill bench").sampling


def _device(name: str) -> torch.device:
    prepare_cuda()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise JobError(f"--device {name}: no such device; take cpu, cuda, or cuda:1 for the second GPU") from None
    if device.type not in ("cpu", "cuda"):
        raise JobError(f"--device {name}: stylemill works on cpu and cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise JobError(f"--device {name}: torch finds {count} CUDA GPUs on this machine; take --device cpu, or another")
    return device


def _check_micro_batches(micro_batches: tuple[int, ...], tile: Tile) -> None:
    pairs = math.prod(tile)
    if pairs < 1:
        raise JobError(f"--tile {tile[0]}x{tile[1]}: a tile has at least one content and one style, such as 8x8")
    for micro_batch in micro_batches:
        if micro_batch < 1:
            raise JobError(f"--micro-batch {micro_batch}: take a number of pairs, 1 or more")
        if micro_batch > pairs:
            raise JobError(
                f"--micro-batch {micro_batch}: the tile {tile[0]}x{tile[1]} has {pairs} pairs; take a larger --tile"
            )


def _load(options: BenchOptions, device: torch.device) -> tuple[Engine, str]:
    """The engine, and the name of its model."""
    if options.model and options.random:
        raise JobError(f"MODEL {options.model} and --random {options.random}: give one of them")
    random = options.random or ("sd15" if device.type == "cuda" and not options.model else None)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float16" if device.type == "cuda" else "float32"

    def load() -> Engine:
        if random:
            check_dtype(dtype, str(device))
            return Engine(random_model(random, str(device), DTYPES[dtype]))
        name = options.model or EMBEDDED
        return Engine.load(name, revision=_hub_commit(name), dtype=dtype, device=str(device))

    engine = translate_out_of_memory(load, "loading the model", "take a smaller model, or --dtype float16")
    return engine, random or options.model or EMBEDDED


def _hub_commit(name: str) -> str | None:
    """The commit of a hub model; None for a model on this machine. Raises ModelError if there is none of that name."""
    if name == EMBEDDED or is_single_file(name) or Path(name).expanduser().is_dir():
        return None
    return resolve_model(name).commit


def _size(options: BenchOptions, engine: Engine, settings: Sampling) -> int:
    model = engine.model
    size = options.size or int(model.unet.config.sample_size) * model.pixels_per_latent
    if size % model.grid:
        nearest = max(model.grid, round(size / model.grid) * model.grid)
        raise JobError(f"--size {size}: must be a multiple of {model.grid} for this model, such as {nearest}")
    if settings.window and size > (side := settings.window * model.pixels_per_latent):
        raise JobError(
            f"--size {size}: preset {options.preset} samples images above {side} pixels in windows, which bench does"
            f" not measure; take --size {side}, the size of a window"
        )
    return size


def _default_micro_batches(engine: Engine, size: int, tile: Tile) -> list[int]:
    """Powers of two on a GPU; on a CPU, where each takes long, 1 and what a job takes.

    Where each is compiled anew, which takes minutes, only what a job takes.
    """
    pairs = math.prod(tile)
    if engine.compiled:
        return [min(engine.calibrate((size, size)), pairs)]
    if engine.model.device.type == "cuda":
        return [1 << power for power in range(min(LARGEST_MICRO_BATCH, pairs).bit_length())]
    return sorted({1, min(cpu_micro_batch((size, size)), pairs)})


def _versions(engine: Engine) -> dict[str, str]:
    numerics = engine.numerics
    libraries = {name: str(numerics[name]) for name in ("torch", "diffusers", "transformers", "numpy")}
    cuda = {"cuda": str(torch.version.cuda)} if engine.model.device.type == "cuda" else {}
    return {"stylemill": __version__, "python": python_version(), **libraries, **cuda}
