"""The plan of a run: which rows make which shard, what the run follows from, and what it will cost. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stylemill.config.job import Job
from stylemill.manifest import Manifest, open_manifest
from stylemill.models.hub import ModelFiles, resolve_model
from stylemill.models.single_file import is_single_file, resolve_single_file
from stylemill.planning.controlnets import controlnet_parameters, plan_controlnets
from stylemill.planning.cost import Cost, count_cost
from stylemill.planning.fingerprint import Fingerprint, fingerprint, fingerprint_differences, fingerprint_sha256
from stylemill.planning.loras import plan_loras
from stylemill.planning.model_shape import check_against_model, read_shape
from stylemill.store.paths import RunPaths
from stylemill.store.run_file import refuse_foreign_files

__all__ = ["Plan", "fingerprint_differences", "fingerprint_sha256", "plan"]

LARGEST_SHARD = 256  # pairs: a 16 × 16 tile
SHARDS_PER_WORKER = 4  # so that the last shards of a run leave no worker idle for long


@dataclass(frozen=True)
class Plan:
    """Which rows make which shard: shard i is `rows_of(i)`, for ever. Small and picklable."""

    job: Job
    manifest: Manifest
    model: ModelFiles
    pairs_per_shard: int
    fingerprint: Fingerprint
    occurrences: dict[int, int]  # rows that repeat an earlier row -> which repetition; tells their ids apart
    controlnets: tuple[ModelFiles, ...] = ()

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
        """The manifest rows of a shard."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of {self.shards}")
        return self.manifest.shard(shard, self.pairs_per_shard)

    def cost(self) -> Cost:
        """Count passes and estimate memory; streams the whole manifest."""
        ranges = (self.rows_of(shard) for shard in range(self.shards))
        rows = (self.manifest.output_rows(rows.start, rows.stop) for rows in ranges)
        model, shape = self.model, None
        if model.folder:
            shape = read_shape(model.folder, model.checkpoint)
            shape = replace(shape, parameters=shape.parameters + sum(map(controlnet_parameters, self.controlnets)))
        return count_cost(self.job, rows, shape)

    def describe(self) -> str:
        """What `stylemill plan` prints."""
        cost, job = self.cost(), self.job
        width, height = job.image.width_height
        size = f"{self.pairs_per_shard:,} pairs" + (
            f", the last of {n}" if (n := len(self.rows_of(self.shards - 1))) < self.pairs_per_shard else ""
        )
        lines = [
            ("job", job.name),
            ("manifest", f"{self.manifest.path}"),
            ("model", self.model.label + ("" if self.model.folder else " (not on this machine yet)")),
            *(("controlnet", files.label) for files in self.controlnets),
            ("sampling", f"{job.sampling.method}, {job.sampling.steps} steps, {width}×{height} pixels{_sizes(job)}"),
            ("rows", f"{self.rows:,}"),
            ("unique images", f"{cost.contents:,} contents, {cost.styles:,} styles"),
            ("shards", f"{self.shards:,} of {size}"),
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

    `pairs_per_shard` is what a run was first cut into, and wins over a job's 'auto' only: that follows from the number
    of workers, which may change between starts, while shards may not. Raises JobError, ManifestError, ModelError and
    OutputError for what the user must change.
    """
    if not isinstance(job, Job):
        job = Job.load(job, overrides)
    elif overrides:
        raise TypeError("overrides go with a job file, not with a Job")
    manifest = open_manifest(job.manifest).with_images_per_pair(job.images_per_pair)
    if is_single_file(job.model.name):
        model = resolve_single_file(job.model.name, job.model.config)
    else:
        model = resolve_model(job.model.name, job.model.revision)
    job = job.model_copy(update={"model": job.model.model_copy(update=model.pins)})
    if model.folder:
        check_against_model(job, read_shape(model.folder, model.checkpoint))
    job, controlnets = plan_controlnets(job, model, manifest)
    job, loras = plan_loras(job)
    asked = job.shards.pairs_per_shard
    if asked == "auto":
        asked = pairs_per_shard or automatic_shard(
            [start * manifest.images_per_pair for start in manifest.group_starts], _workers(job)
        )
    made = Plan(
        job=job,
        manifest=manifest,
        model=model,
        pairs_per_shard=asked,
        fingerprint=fingerprint(job, model, manifest.sha256(), asked, controlnets, loras),
        occurrences=manifest.repeated_rows(),
        controlnets=tuple(controlnets),
    )
    refuse_foreign_files(RunPaths(Path(job.output), made.shards))  # also refuses what is no local path
    return made


def automatic_shard(group_starts: Sequence[int], workers: int) -> int:
    """Pairs in a shard: the largest tile, of at most 256 pairs, that still gives four shards a worker.

    `group_starts` is the first row of each row group, then the number of rows. `manifest build` writes a tile as a row
    group, so whole groups, or an even part of one, keep the images of a shard few; else the tile is a square.
    """
    rows, wanted = group_starts[-1], SHARDS_PER_WORKER * workers
    most = max(1, min(LARGEST_SHARD, (rows - 1) // (wanted - 1)))  # ceil(rows / most) >= wanted
    group = group_starts[1] if len(group_starts) > 2 else 0
    if 0 < group <= most:
        return most // group * group
    parts = [size for size in range(most, most // 2, -1) if group and group % size == 0]
    return parts[0] if parts else max(side * side for side in range(1, 17) if side * side <= most)


def _workers(job: Job) -> int:
    workers = job.cluster.workers
    return workers if isinstance(workers, int) else max(1, (os.cpu_count() or 1) // job.cluster.threads)


def _memory_lines(cost: Cost) -> list[tuple[str, str]]:
    memory = cost.memory
    if memory is None:
        return [("memory", "estimated once the model is on this machine")]
    return [
        ("memory", f"about {_size(memory.total)} a worker in {memory.dtype}, an estimate"),
        ("  weights", _size(memory.weights)),
        ("  features", _size(memory.features)),
        ("  latents", _size(memory.state)),
        ("  activations", f"{_size(memory.activations)} a pair, {memory.micro_batch} pairs in a micro-batch"),
    ]


def _sizes(job: Job) -> str:
    if job.image.fit == "keep":
        return " at most, as each content is (fit: keep); all below are upper bounds"
    return f" in windows of {job.sampling.window} latents" if job.sampling.window else ""


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
