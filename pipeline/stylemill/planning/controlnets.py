"""The ControlNets of a job at plan time: pinned, checked against the model, and given images by the manifest."""

from __future__ import annotations

from stylemill.config.job import Job
from stylemill.errors import JobError
from stylemill.manifest import Manifest
from stylemill.models.architecture import check_controlnet_architecture, read_config
from stylemill.models.hub import CONTROLNET, ResolvedModel, model_paths, resolve_model
from stylemill.models.safetensors_file import count_parameters


def pin_controlnets(job: Job, model: ResolvedModel, manifest: Manifest) -> tuple[Job, list[ResolvedModel]]:
    """The job with each ControlNet's revision pinned to a commit, and their files. Weights are not loaded.

    Raises ModelError for one that is absent or of another architecture, JobError where no row could have its image.
    """
    nets = job.model.controlnet
    if nets and "control" not in manifest.schema.names:
        raise JobError(
            f"model.controlnet needs a column 'control' in {manifest.path}, with each row's control image; its columns "
            f"are: {', '.join(manifest.schema.names)}"
        )
    files = [resolve_model(net.name, net.revision, CONTROLNET) for net in nets]
    for found in files:
        if found.folder and model.folder:
            controlnet = read_config(found.folder / "config.json")
            check_controlnet_architecture(found.name, controlnet, read_config(model.folder / "unet" / "config.json"))
    pinned = tuple(
        net.model_copy(update={"revision": found.commit}) if found.commit else net
        for net, found in zip(nets, files, strict=True)
    )
    return job.model_copy(update={"model": job.model.model_copy(update={"controlnet": pinned})}), files


def count_controlnet_parameters(files: ResolvedModel) -> int:
    """Its number of weights; 0 while it is not on this machine."""
    if files.folder is None:
        return 0
    paths = model_paths(files.folder, CONTROLNET)
    return sum(count_parameters(files.folder / path) for path in paths if path.endswith(".safetensors"))
