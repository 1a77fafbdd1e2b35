"""The LoRAs of a job at plan time: found, and pinned to their content."""

from __future__ import annotations

from stylemill.config.job import Job
from stylemill.models.hub import ResolvedModel
from stylemill.models.lora import resolve_lora


def pin_loras(job: Job) -> tuple[Job, list[ResolvedModel]]:
    """The job with each LoRA's revision pinned to a commit, and their files. Raises ModelError for an absent one."""
    files = [resolve_lora(lora) for lora in job.model.loras]
    pinned = tuple(
        lora.model_copy(update={"revision": found.commit}) if found.commit else lora
        for lora, found in zip(job.model.loras, files, strict=True)
    )
    return job.model_copy(update={"model": job.model.model_copy(update={"loras": pinned})}), files
