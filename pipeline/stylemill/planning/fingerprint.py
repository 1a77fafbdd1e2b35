"""The fingerprint of a run: a flat table of everything that determines its images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from stylemill.config.job import Job
from stylemill.models.resolve import ResolvedModel
from stylemill.store.parquet import OUTPUT_FORMAT

Value = str | int | float | list[float] | None
Fingerprint = dict[str, Value]


def compute_fingerprint(
    job: Job,
    model: ResolvedModel,
    manifest_sha256: str,
    pairs_per_shard: int,
    controlnets: Sequence[ResolvedModel] = (),
    loras: Sequence[ResolvedModel] = (),
) -> Fingerprint:
    """Collect what must be the same each time a run is started.

    Workers, address, retries and checkpoint settings are left out, because they do not affect images. Threads,
    micro-batch, feature budget, compile and deterministic are left out too: they affect low bits only, and are recorded
    as numerics.
    """
    width, height = job.image.width_height
    values: Fingerprint = {
        "manifest.sha256": manifest_sha256,
        **model.identity(),
        "model.dtype": job.model.dtype,
        "model.layers": "the last six" if job.model.layers is None else ",".join(map(str, job.model.layers)),
    }
    for index, (controlnet, resolved) in enumerate(zip(job.model.controlnet, controlnets, strict=True)):
        settings = controlnet.model_dump(include={"scale", "start", "end"})
        values |= _prefixed(f"model.controlnet.{index}", {**_identity(resolved), **settings})
    for index, (lora, resolved) in enumerate(zip(job.model.loras, loras, strict=True)):
        file = {"file": lora.file} if resolved.commit and lora.file else {}
        values |= _prefixed(f"model.loras.{index}", {**_identity(resolved), **file, "scale": lora.scale})
    values |= _prefixed("sampling", job.sampling.model_dump(mode="json"))
    if job.images_per_pair != 1:
        values["images_per_pair"] = job.images_per_pair
    values |= {"image.size": f"{width}x{height}", "image.fit": job.image.fit}
    if job.image.style_size is not None:
        values["image.style_size"] = "{}x{}".format(*job.image.style_width_height)
    values |= {"shards.pairs_per_shard": pairs_per_shard, "shards.image_format": job.shards.image_format}
    values["shards.output_format"] = OUTPUT_FORMAT
    if job.shards.image_format != "png":
        values["shards.quality"] = job.shards.quality
    return values


def fingerprint_sha256(values: Mapping[str, Value]) -> str:
    """The SHA-256 of a fingerprint, hex. Records and checkpoints contain it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_differences(old: Mapping[str, Value], new: Mapping[str, Value]) -> list[str]:
    """A line for each key on which a run folder (`old`) and a job (`new`) differ; empty when they are the same."""
    return [
        f"{key}: run has {old.get(key, 'nothing')}, job has {new.get(key, 'nothing')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _identity(resolved: ResolvedModel) -> dict[str, str]:
    return {key.removeprefix("model."): value for key, value in resolved.identity().items()}


def _prefixed(prefix: str, values: Mapping[str, Value]) -> Fingerprint:
    return {f"{prefix}.{key}": value for key, value in values.items()}
