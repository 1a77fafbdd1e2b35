"""The fingerprint of a run: everything that its images follow from, as one flat table of keys and values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from stylemill.config.job import Job
from stylemill.models.hub import ResolvedModel

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
    """What must not change between two starts of a run.

    Left out is what may: workers, address, retries, checkpoints; and threads, micro-batch and feature budget, which
    touch low bits only and are recorded as numerics.
    """
    width, height = job.image.width_height
    return {
        "manifest.sha256": manifest_sha256,
        **model.identity(),
        "model.dtype": job.model.dtype,
        "model.layers": "the last six" if job.model.layers is None else ",".join(map(str, job.model.layers)),
        **{
            f"model.controlnet.{place}.{name}": value
            for place, (net, files) in enumerate(zip(job.model.controlnet, controlnets, strict=True))
            for name, value in {
                **{key.removeprefix("model."): digest for key, digest in files.identity().items()},
                **net.model_dump(include={"scale", "start", "end"}),
            }.items()
        },
        **{
            f"model.loras.{place}.{name}": value
            for place, (lora, files) in enumerate(zip(job.model.loras, loras, strict=True))
            for name, value in {
                **{key.removeprefix("model."): digest for key, digest in files.identity().items()},
                **({"file": lora.file} if files.commit and lora.file else {}),
                "scale": lora.scale,
            }.items()
        },
        **{f"sampling.{name}": value for name, value in job.sampling.model_dump(mode="json").items()},
        **({} if job.images_per_pair == 1 else {"images_per_pair": job.images_per_pair}),
        "image.size": f"{width}x{height}",
        "image.fit": job.image.fit,
        **({} if job.image.style_size is None else {"image.style_size": "{}x{}".format(*job.image.style_width_height)}),
        "shards.pairs_per_shard": pairs_per_shard,
        "shards.image_format": job.shards.image_format,
        **({} if job.shards.image_format == "png" else {"shards.quality": job.shards.quality}),
    }


def fingerprint_sha256(values: Mapping[str, Value]) -> str:
    """One digest of a whole fingerprint; records and checkpoints carry it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_differences(old: Mapping[str, Value], new: Mapping[str, Value]) -> list[str]:
    """A line for each key on which a run folder (`old`) and a job (`new`) differ; empty when they are the same."""
    return [
        f"{key}: run has {old.get(key, 'nothing')}, job has {new.get(key, 'nothing')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
