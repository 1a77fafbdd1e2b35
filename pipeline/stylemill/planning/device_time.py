"""The device time of a run, estimated as a range from what `stylemill bench` measured.

    lower = Σ passes of the plan · seconds of such a pass
    upper = (lower + passes of distances · seconds of a features pass) · slowdown + encoding + decoding

Passes are those for denoising, gradients and shared features. `slowdown` is what a measured step took over what its
calls predict, and at least 1: micro-batches that are not full, the scheduler, Adam, the host. Encoding counts each
image of each shard once, and decoding each output image; their seconds grow with the number of pixels.

Not counted, because the device does not wait for it or bench does not measure it: reading and writing images, loading
and compiling the model, repeated steps and failures, masks, further styles of a pair, and what `not_counted` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stylemill.bench.result import BenchResult, BenchRow, read_bench_result
from stylemill.config.job import Job
from stylemill.errors import JobError
from stylemill.planning.cost import Cost
from stylemill.planning.model_shape import PIXELS_PER_LATENT, ModelShape
from stylemill.plural import counted

LEAVE_OUT = "leave --bench out"  # where bench cannot measure what the job does
UNITS = (("day", 86400, 4 * 86400), ("hour", 3600, 2 * 3600), ("minute", 60, 120))  # each from so many seconds


@dataclass(frozen=True)
class TimeRange:
    """Seconds, from the least to the most that is expected."""

    lower: float
    upper: float

    def __str__(self) -> str:
        name, unit = next(((name, unit) for name, unit, start in UNITS if self.upper >= start), ("second", 1))
        lower, upper = _figure(self.lower / unit), _figure(self.upper / unit)
        return f"about {upper} {name}s" if lower == upper else f"{lower} to {upper} {name}s"


@dataclass(frozen=True)
class DeviceTimes:
    """The measured times that apply to a job: those of one row of a bench file."""

    file: str  # its name
    measured: BenchResult
    row: BenchRow
    model_compared: bool

    @classmethod
    def open(cls, path: Path, job: Job, shape: ModelShape | None) -> DeviceTimes:
        """The times for the job, whose model has `shape`; None: it is not on this machine, and is not compared.

        Raises JobError if the file is not bench's, or has not measured what the job does.
        """
        measured = read_bench_result(path)
        if differences := list(_differences(measured, job, shape)):
            raise JobError("\n".join(f"--bench {path}: {difference}" for difference in differences))
        return cls(path.name, measured, _choose_row(path, measured, job), shape is not None)

    def of_one_device(self, job: Job, cost: Cost) -> TimeRange:
        """The time of the whole run on one device."""
        row, measured = self.row, self.measured
        # The row is complete: it has no error.
        denoise, features, gradient = (ms or 0 for ms in (row.denoise_ms, row.features_ms, row.gradient_ms))
        lower = (cost.denoise * denoise + cost.gradient * gradient + cost.shared_features * features) / 1000
        slowdown = max(1.0, (row.step_seconds or 0) / (row.step_calls_seconds or 1))
        width, height = job.image.width_height
        areas = width * height / measured.size**2
        images = areas * (cost.encoded * measured.encode_seconds + cost.pairs * measured.decode_seconds)
        return TimeRange(lower, (lower + cost.distance * features / 1000) * slowdown + images)

    def describe(self, job: Job, cost: Cost, shards: int) -> list[tuple[str, str]]:
        """The lines of a plan about time."""
        measured, one = self.measured, self.of_one_device(job, cost)
        device = f"a CPU, {counted(measured.threads, 'thread')}" if _on_cpu(measured) else f"one {measured.device}"
        source = f"{self.file}, micro-batch {self.row.micro_batch}"
        if not self.model_compared:
            source += "; the model was not compared, it is not on this machine yet"
        lines = [("time", f"{one} on {device} ({source})")]
        if all_workers := of_workers(one, job, shards):
            lines.append(("  wall time", f"{all_workers} with {counted(_workers(job), 'worker')}"))
        if missing := not_counted(job):
            lines.append(("  not counted", ", ".join(missing)))
        return lines


def of_workers(one: TimeRange, job: Job, shards: int) -> TimeRange | None:
    """The wall time of the job's workers, each with a device; None for one worker, or where it is not known.

    lower: the work is divided evenly. upper: the busiest worker has ⌈shards / workers⌉ shards.
    """
    workers, gpus = _workers(job), job.cluster.gpus_per_worker
    if workers == 1 or (gpus != "auto" and 0 < gpus < 1):  # several workers share a GPU
        return None
    return TimeRange(one.lower / min(workers, shards), one.upper * -(-shards // workers) / shards)


def not_counted(job: Job) -> list[str]:
    """What takes time on the device in this job and is not measured by bench."""
    found = ["ControlNets"] if job.model.controlnet else []
    return [*found, "refinement of the decoder"] if job.sampling.refine_decoder_steps else found


def _workers(job: Job) -> int:
    """The number that the job names; 1 for auto."""
    return 1 if job.cluster.workers == "auto" else job.cluster.workers


def _on_cpu(measured: BenchResult) -> bool:
    return measured.device == "cpu"


def _choose_row(path: Path, measured: BenchResult, job: Job) -> BenchRow:
    """The row of the job's micro-batch; for "auto", that of the most images a second."""
    lockstep = [row for row in measured.rows if row.way == "lockstep"]
    rows = [row for row in lockstep if row.error is None]
    size = job.cluster.micro_batch
    if size == "auto":
        if not rows:
            errors = "; ".join(f"micro-batch {row.micro_batch}: {row.error}" for row in lockstep) or "it has no rows"
            raise JobError(f"--bench {path}: no times were measured ({errors}); measure with a smaller --micro-batch")
        return max(rows, key=lambda row: row.images_per_second or 0)
    if found := [row for row in rows if row.micro_batch == size]:
        return found[-1]
    failed = [row.error for row in lockstep if row.micro_batch == size]
    others = ", ".join(str(row.micro_batch) for row in rows) or "none"
    raise JobError(
        f"--bench {path}: cluster.micro_batch {size} {f'has an error: {failed[0]}' if failed else 'was not measured'};"
        f" with times: {others}; take one of these, or measure with --micro-batch {size}"
    )


def _differences(measured: BenchResult, job: Job, shape: ModelShape | None) -> Iterator[str]:
    """In what the measured work is not the job's, each with what to do."""
    cluster = job.cluster
    yield from _model_differences(measured, job, shape)
    yield from _size_differences(measured, job, shape)
    if _on_cpu(measured):
        if cluster.gpus_per_worker != "auto" and cluster.gpus_per_worker > 0:
            yield f"a CPU was measured, and cluster.gpus_per_worker is {cluster.gpus_per_worker:g}; measure on a GPU"
        if measured.threads != cluster.threads:
            threads = counted(measured.threads, "thread")
            yield f"a CPU with {threads} was measured, and cluster.threads is {cluster.threads}; {LEAVE_OUT}"
    elif cluster.gpus_per_worker == 0:
        yield f"{measured.device} was measured, and cluster.gpus_per_worker is 0; measure with --device cpu"
    # What workers on such a device take for "auto".
    dtype = ("float32" if _on_cpu(measured) else "float16") if job.model.dtype == "auto" else job.model.dtype
    if measured.dtype != dtype:
        yield f"{measured.dtype} was measured, and the job computes in {dtype}; measure with --dtype {dtype}"
    compiles = cluster.compile and job.sampling.tiling == "none"  # with tiling, the UNet is not compiled
    if measured.compiled and not compiles:
        yield "a compiled UNet was measured, and the job's is not compiled; measure without --compile"
    if compiles and not measured.compiled:
        yield "a UNet was measured that is not compiled, and cluster.compile is true; measure with --compile"
    if measured.deterministic and not cluster.deterministic:
        yield "deterministic gradients were measured, cluster.deterministic is false; measure with --no-deterministic"
    if cluster.deterministic and not measured.deterministic:
        yield "the fastest gradients were measured, cluster.deterministic is true; measure without --no-deterministic"


def _model_differences(measured: BenchResult, job: Job, shape: ModelShape | None) -> Iterator[str]:
    method, injects = measured.sampling.get("method"), "kv_injection"
    if (method == injects) != (job.sampling.method == injects):
        yield (
            f"a run of method {method} was measured, and sampling.method is {job.sampling.method}, whose calls differ;"
            f" measure with --method {job.sampling.method}"
        )
    if shape is None:
        return
    found = measured.unet_parameters, measured.latent_channels, measured.pixels_per_latent
    expected = shape.unet_parameters, shape.latent_channels, shape.pixels_per_latent
    if found != expected:
        yield (
            f"model {measured.model} was measured, which has {_architecture(*found)}, and {job.model.name} has"
            f" {_architecture(*expected)}; measure with that one, or with --random for its dimensions"
        )
    elif shape.select_layers(job.model.layers) != shape.select_layers(None):
        yield f"the last six layers were measured, and model.layers selects others; {LEAVE_OUT}"


def _architecture(parameters: int, channels: int, pixels: int) -> str:
    return f"{parameters:,} parameters in its UNet and latents of {channels} channels and {pixels}×{pixels} pixels"


def _size_differences(measured: BenchResult, job: Job, shape: ModelShape | None) -> Iterator[str]:
    """With windows, the UNet is called with windows, and with styles of image.style_size."""
    size = width, height = job.unet_call_size(shape.pixels_per_latent if shape else PIXELS_PER_LATENT)
    style_width, style_height = job.image.style_width_height
    if width != height:
        yield f"square images were measured, and a UNet call of the job has {width}×{height} pixels; {LEAVE_OUT}"
    elif width != measured.size:
        side = measured.size
        yield (
            f"images of {side}×{side} pixels were measured, and a UNet call of the job has {width}×{height}; measure"
            f" with --size {width}"
        )
    elif (style_width, style_height) != size:
        yield (
            f"styles of the images' size were measured, {width}×{height} pixels, and image.style_size is"
            f" {style_width}×{style_height}; {LEAVE_OUT}"
        )


def _figure(value: float) -> str:
    """At most one decimal below ten, and none above."""
    return f"{value:,.0f}" if value >= 9.95 else f"{round(value, 1):g}"
