"""The plan of a run: its shards, its fingerprint and its cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stylemill.config.job import Job
from stylemill.manifest import Manifest, open_manifest
from stylemill.models.resolve import ResolvedModel
from stylemill.planning.cost import Cost, count_cost
from stylemill.planning.fingerprint import Fingerprint, compute_fingerprint, fingerprint_sha256
from stylemill.planning.model_shape import check_against_model, read_shape
from stylemill.planning.models import count_controlnet_parameters, pin_controlnets, pin_loras, pin_model
from stylemill.store.paths import RunPaths
from stylemill.store.run_file import refuse_foreign_files

MAX_PAIRS_PER_SHARD = 256  # a tile of 16 × 16
SHARDS_PER_WORKER = 4  # at least, so that few workers are idle while the last shards of a run are sampled


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
        shape = None
        if self.model.folder:
            shape = read_shape(self.model.folder, self.model.checkpoint)
            controlnets = sum(map(count_controlnet_parameters, self.controlnets))
            shape = replace(shape, parameters=shape.parameters + controlnets)
        return count_cost(self.job, rows, shape)

    def describe(self) -> str:
        """The text that `stylemill plan` prints."""
        cost, job = self.cost(), self.job
        width, height = job.image.width_height
        last = len(self.rows_of(self.shards - 1))
        shard_size = f"{self.pairs_per_shard:,} pairs" + (
            f", the last of {last}" if last < self.pairs_per_shard else ""
        )
        lines = [
            ("job", job.name),
            ("manifest", f"{self.manifest.path}"),
            ("model", self.model.label + ("" if self.model.folder else " (not on this machine yet)")),
            *(("controlnet", controlnet.label) for controlnet in self.controlnets),
            (
                "sampling",
                f"{job.sampling.method}, {job.sampling.steps} steps, {width}×{height} pixels{_size_note(job)}",
            ),
            ("rows", f"{self.rows:,}"),
            ("unique images", f"{cost.contents:,} contents, {cost.styles:,} styles"),
            ("shards", f"{self.shards:,} of {shard_size}"),
            ("blocks a step", f"{cost.blocks} at most" if cost.blocks > 1 else "1: the features of a shard fit"),
            ("UNet passes", f"{cost.with_sharing:,} with sharing, {cost.without_sharing:,} without"),
            ("  denoise", f"{cost.denoise:,}"),
            ("  gradient", f"{cost.gradient:,}"),
            ("  features", f"{cost.shared_features:,} with sharing, {cost.unshared_features:,} without"),
            *_memory_lines(cost),
            ("output", job.output),
        ]
        return "\n".join(f"{name:<15} {value}" for name, value in lines)


def plan(job: Job | str | Path, overrides: dict[str, Any] | None = None, pairs_per_shard: int | None = None) -> Plan:
    """Plan a job, or a YAML job file with `overrides` of dotted keys. Reads the manifest once, writes nothing.

    `pairs_per_shard` is the value of an existing run. It replaces 'auto' in the job, because 'auto' follows from the
    number of workers, which may change between starts, while shards may not. Raises JobError, ManifestError, ModelError
    or OutputError when the user must change something.
    """
    if not isinstance(job, Job):
        job = Job.load(job, overrides)
    elif overrides:
        raise TypeError("`overrides` can be given with a job file only, not with a Job")
    manifest = open_manifest(job.manifest).with_images_per_pair(job.images_per_pair)
    job, model = pin_model(job)
    if model.folder:
        check_against_model(job, read_shape(model.folder, model.checkpoint))
    job, controlnets = pin_controlnets(job, model, manifest)
    job, loras = pin_loras(job)
    size = job.shards.pairs_per_shard
    if size == "auto":
        group_starts = [start * manifest.images_per_pair for start in manifest.group_starts]
        size = pairs_per_shard or choose_pairs_per_shard(group_starts, _worker_count(job))
    planned = Plan(
        job=job,
        manifest=manifest,
        model=model,
        pairs_per_shard=size,
        fingerprint=compute_fingerprint(job, model, manifest.sha256(), size, controlnets, loras),
        occurrences=manifest.repeated_rows(),
        controlnets=tuple(controlnets),
    )
    refuse_foreign_files(RunPaths(Path(job.output), planned.shards))  # also rejects URLs that are not supported
    return planned


def choose_pairs_per_shard(group_starts: Sequence[int], workers: int) -> int:
    """Choose the number of pairs in a shard: as many as possible up to 256, with at least four shards for each worker.

    `group_starts` is the first output row of each row group of the manifest, then the number of output rows. `manifest
    build` writes each tile as a row group, so a shard of whole groups, or of an even part of one, has few distinct
    images. A manifest with one row group gets a square number of pairs.
    """
    rows, shards = group_starts[-1], SHARDS_PER_WORKER * workers
    most = max(1, min(MAX_PAIRS_PER_SHARD, (rows - 1) // (shards - 1)))  # ceil(rows / most) >= shards
    group = group_starts[1] if len(group_starts) > 2 else 0
    if 0 < group <= most:
        return most // group * group
    parts = [size for size in range(most, most // 2, -1) if group and group % size == 0]
    return parts[0] if parts else max(side * side for side in range(1, 17) if side * side <= most)


def _worker_count(job: Job) -> int:
    workers = job.cluster.workers
    return workers if isinstance(workers, int) else max(1, (os.cpu_count() or 1) // job.cluster.threads)


def _memory_lines(cost: Cost) -> list[tuple[str, str]]:
    memory = cost.memory
    if memory is None:
        return [("memory", "estimated once the model is on this machine")]
    return [
        ("memory", f"about {_format_bytes(memory.total)} a worker in {memory.dtype}, an estimate"),
        ("  weights", _format_bytes(memory.weights)),
        ("  features", _format_bytes(memory.features)),
        ("  latents", _format_bytes(memory.state)),
        ("  activations", f"{_format_bytes(memory.activations)} a pair, {memory.micro_batch} pairs in a micro-batch"),
    ]


def _size_note(job: Job) -> str:
    if job.image.fit == "keep":
        return " at most, in the shape of each content image (fit: keep); all numbers below are upper bounds"
    return f" in windows of {job.sampling.window} latents" if job.sampling.window else ""


def _format_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
