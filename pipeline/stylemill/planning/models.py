"""The models of a job at planning time: resolved to their content, checked, and pinned in the job. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from stylemill.config.job import Job
from stylemill.config.model import ControlNet, Lora
from stylemill.errors import JobError
from stylemill.manifest import Manifest
from stylemill.models.architecture import check_controlnet_architecture, read_config
from stylemill.models.file_sets import CONTROLNET
from stylemill.models.folder import model_paths
from stylemill.models.lora import resolve_lora
from stylemill.models.resolve import ResolvedModel, resolve_model
from stylemill.models.safetensors_file import count_parameters
from stylemill.models.single_file import is_single_file, resolve_single_file

Settings = TypeVar("Settings", ControlNet, Lora)


def pin_model(job: Job) -> tuple[Job, ResolvedModel]:
    """Resolve the job's model; return the job with the hub commit that workers load, and the model.

    Raises ModelError when the model does not exist or is not supported.
    """
    if is_single_file(job.model.name):
        model = resolve_single_file(job.model.name, job.model.config)
    else:
        model = resolve_model(job.model.name, job.model.revision)
    return _with_model(job, model.pins), model


def pin_controlnets(job: Job, model: ResolvedModel, manifest: Manifest) -> tuple[Job, list[ResolvedModel]]:
    """Resolve the job's ControlNets; return the job with their hub commits, and the ControlNets.

    Raises ModelError when one does not exist or was trained for another architecture, JobError when the manifest has no
    column of control images.
    """
    settings = job.model.controlnet
    if settings and "control" not in manifest.schema.names:
        raise JobError(
            f"model.controlnet needs a column 'control' in {manifest.path}, with each row's control image; its columns "
            f"are: {', '.join(manifest.schema.names)}"
        )
    controlnets = [resolve_model(controlnet.name, controlnet.revision, CONTROLNET) for controlnet in settings]
    for controlnet in controlnets:
        if controlnet.folder and model.folder:
            unet = read_config(model.folder / "unet" / "config.json")
            check_controlnet_architecture(controlnet.name, read_config(controlnet.folder / "config.json"), unet)
    return _with_model(job, {"controlnet": _with_revisions(settings, controlnets)}), controlnets


def check_prompts(job: Job, manifest: Manifest) -> None:
    """Raise JobError where `sampling.reuse_prediction` would ignore a row's prompt. Then all rows are read once."""
    if not job.sampling.reuse_prediction or "prompt" not in manifest.schema.names:
        return
    for row in manifest.rows():
        if row.prompt:
            raise JobError(
                f"sampling.reuse_prediction takes predictions for the empty prompt, and row {row.manifest_row} of "
                f"{manifest.path} has the prompt {row.prompt!r}; set it to false, or leave out the column 'prompt'"
            )


def pin_loras(job: Job) -> tuple[Job, list[ResolvedModel]]:
    """Resolve the job's LoRAs; return the job with their hub commits, and the LoRAs.

    Raises ModelError when one does not exist.
    """
    loras = [resolve_lora(lora) for lora in job.model.loras]
    return _with_model(job, {"loras": _with_revisions(job.model.loras, loras)}), loras


def count_controlnet_parameters(controlnet: ResolvedModel) -> int:
    """The number of weights of a ControlNet; 0 while it is not on this machine."""
    if controlnet.folder is None:
        return 0
    paths = model_paths(controlnet.folder, CONTROLNET)
    return sum(count_parameters(controlnet.folder / path) for path in paths if path.endswith(".safetensors"))


def _with_model(job: Job, changes: dict[str, Any]) -> Job:
    return job.model_copy(update={"model": job.model.model_copy(update=changes)})


def _with_revisions(settings: Sequence[Settings], models: Sequence[ResolvedModel]) -> tuple[Settings, ...]:
    return tuple(
        one.model_copy(update={"revision": model.commit}) if model.commit else one
        for one, model in zip(settings, models, strict=True)
    )
