"""The plan of a run: its shards, its fingerprint and its cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stylemill.config.job import Job
from stylemill.manifest import Manifest, open_manifest
from stylemill.models.resolve import ResolvedModel
from stylemill.planning.cost import Cost, count_cost
from stylemill.planning.device_time import DeviceTimes
from stylemill.planning.fingerprint import Fingerprint, compute_fingerprint, fingerprint_sha256
from stylemill.planning.model_shape import ModelShape, check_against_model, read_shape
from stylemill.planning.models import check_prompts, count_controlnet_parameters, pin_controlnets, pin_loras, pin_model
from stylemill.planning.shard_size import choose_pairs_per_shard, expected_workers
from stylemill.plural import counted
from stylemill.store.paths import RunPaths
from stylemill.store.run_file import RunFile, refuse_foreign_files


@dataclass(frozen=True)
class Plan:
    """The plan of a run. Small and picklable.

    Shard i has the output rows `rows_of(i)`, each time the run is started. `occurrences` maps a manifest row without a
    pair_id that repeats an earlier row to its occurrence (2, 3, …), which makes its id unique.
    """

    job: Job
    manifest: Manifest
    model: ResolvedModel
    pairs_per_shard: int
    fingerprint: Fingerprint
    occurrences: dict[int, int]
    controlnets: tuple[ResolvedModel, ...] = ()
    size_reason: str = ""  # where `pairs_per_shard` comes from, as `describe` says it

    @property
    def rows(self) -> int:
        return self.manifest.num_output_rows

    @property
    def shards(self) -> int:
        return -(-self.rows // self.pairs_per_shard)

    @property
    def fingerprint_sha256(self) -> str:
        return fingerprint_sha256(self.fingerprint)

    def rows_of(self, shard: int) -> range:
        """The output rows of a shard. Raises IndexError for a shard that the plan does not have."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard}: the plan has {self.shards} shards, numbered from 0")
        return self.manifest.shard(shard, self.pairs_per_shard)

    def cost(self) -> Cost:
        """Count UNet passes and estimate memory. Reads the whole manifest in bounded memory."""
        ranges = (self.rows_of(shard) for shard in range(self.shards))
        rows = (self.manifest.output_rows(rows.start, rows.stop) for rows in ranges)
        shape = self._shape()
        if shape:
            controlnets = sum(map(count_controlnet_parameters, self.controlnets))
            shape = replace(shape, parameters=shape.parameters + controlnets)
        return count_cost(self.job, rows, shape)

    def describe(self, bench: str | Path | None = None) -> str:
        """The text that `stylemill plan` prints. With `bench`, a file of `stylemill bench --json`, also the time.

        Raises JobError for a file that has not measured what this job does.
        """
        times = None if bench is None else DeviceTimes.open(Path(bench), self.job, self._shape())
        cost, job = self.cost(), self.job
        width, height = job.image.width_height
        last = len(self.rows_of(self.shards - 1))
        shard_size = counted(self.pairs_per_shard, "pair") + (
            f", the last of {last}" if last < self.pairs_per_shard else ""
        )
        lines = [
            ("job", job.name),
            ("manifest", f"{self.manifest.path}"),
            ("model", self.model.label + ("" if self.model.folder else " (not on this machine yet)")),
            *(("controlnet", controlnet.label) for controlnet in self.controlnets),
            (
                "sampling",
                f"{job.sampling.method}, {counted(job.sampling.steps, 'step')}, {width}×{height} pixels"
                f"{_size_note(job)}",
            ),
            ("rows", f"{self.rows:,}"),
            ("unique images", f"{counted(cost.contents, 'content')}, {counted(cost.styles, 'style')}"),
            ("shards", f"{self.shards:,} of {shard_size}"),
            ("  size", self.size_reason),
            ("blocks a step", f"{cost.blocks} at most" if cost.blocks > 1 else "1: the features of a shard fit"),
            ("UNet passes", f"{cost.with_sharing:,} with sharing, {cost.without_sharing:,} without"),
            ("  denoise", f"{cost.denoise:,}"),
            ("  gradient", f"{cost.gradient:,}"),
            ("  features", f"{cost.shared_features:,} with sharing, {cost.unshared_features:,} without"),
            *_memory_lines(cost),
            *(times.describe(job, cost, self.shards) if times else []),
            ("output", job.output),
        ]
        return "\n".join(f"{name:<15} {value}" for name, value in lines)

    def _shape(self) -> ModelShape | None:
        return read_shape(self.model.folder, self.model.checkpoint) if self.model.folder else None


def plan(job: Job | str | Path, overrides: dict[str, Any] | None = None) -> Plan:
    """Plan a job, or a YAML job file with `overrides` of dotted keys. Reads the manifest once or twice, writes nothing.

    A run that is in the output folder keeps its number of pairs in a shard, where the job has 'auto': 'auto' depends on
    the number of workers, which may change between starts, while shards may not. Raises JobError, ManifestError,
    ModelError or OutputError when the user must change something.
    """
    if not isinstance(job, Job):
        job = Job.load(job, overrides)
    elif overrides:
        raise TypeError("`overrides` can be given with a job file only, not with a Job")
    manifest = open_manifest(job.manifest).with_images_per_pair(job.images_per_pair)
    job, model = pin_model(job)
    shape = read_shape(model.folder, model.checkpoint) if model.folder else None
    if shape:
        check_against_model(job, shape)
    check_prompts(job, manifest)
    job, controlnets = pin_controlnets(job, model, manifest)
    job, loras = pin_loras(job)
    size, reason = _pairs_per_shard(job, manifest, shape)
    planned = Plan(
        job=job,
        manifest=manifest,
        model=model,
        pairs_per_shard=size,
        fingerprint=compute_fingerprint(job, model, manifest.sha256(), size, controlnets, loras),
        occurrences=manifest.repeated_rows(),
        controlnets=tuple(controlnets),
        size_reason=reason,
    )
    refuse_foreign_files(RunPaths(Path(job.output), planned.shards))  # also rejects URLs that are not supported
    return planned


def _pairs_per_shard(job: Job, manifest: Manifest, shape: ModelShape | None) -> tuple[int, str]:
    """The number of pairs in a shard, and where it comes from."""
    if job.shards.pairs_per_shard != "auto":
        return job.shards.pairs_per_shard, "set by the job"
    if existing := RunFile.find(job.output):
        return existing.pairs_per_shard, "that of the run in this folder"
    workers = counted(expected_workers(job), "worker")
    return choose_pairs_per_shard(job, manifest, shape), f"chosen for {workers}, as the fastest by estimate"


def _memory_lines(cost: Cost) -> list[tuple[str, str]]:
    memory = cost.memory
    if memory is None:
        return [("memory", "estimated once the model is on this machine")]
    return [
        ("memory", f"about {_format_bytes(memory.total)} a worker in {memory.dtype}, an estimate"),
        ("  weights", _format_bytes(memory.weights)),
        ("  features", _format_bytes(memory.features)),
        ("  latents", _format_bytes(memory.state)),
        (
            "  activations",
            f"{_format_bytes(memory.activations)} a pair, {counted(memory.micro_batch, 'pair')} in a micro-batch",
        ),
    ]


def _size_note(job: Job) -> str:
    if job.image.fit == "keep":
        return " at most, in the shape of each content image (fit: keep); all numbers below are upper bounds"
    return f" in windows of {job.sampling.window} latents" if job.sampling.window else ""


def _format_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
