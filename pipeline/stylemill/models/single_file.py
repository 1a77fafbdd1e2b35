"""A single-file checkpoint as a model: its weights with the configuration of a folder or hub repository. Torch-free."""

from __future__ import annotations

from pathlib import Path

from stylemill.config.model import CHECKPOINT_SUFFIXES
from stylemill.errors import ModelError
from stylemill.models.hub import (
    CONFIGURATION,
    ResolvedModel,
    fetch_model_folder,
    file_digest,
    model_paths,
    resolve_model,
)
from stylemill.models.safetensors_file import infer_config_id


def is_single_file(name: str) -> bool:
    """Whether a model's name means a checkpoint file, whether it is there or not."""
    return name.endswith(CHECKPOINT_SUFFIXES)


def resolve_single_file(name: str, config: str | None = None) -> ResolvedModel:
    """Pin a checkpoint file by the digests of its bytes and of its configuration, which is small and fetched at once.

    `config` is a diffusers folder (weights are not needed there), a hub id, or a hub id with its commit, "id@commit".
    Without it the checkpoint's tensors tell whose configuration it usually goes with, SD 1.5's or SDXL's. Raises
    ModelError for a file that is absent, pickled, cut short or of another architecture.
    """
    path = Path(name).expanduser()
    pinned = _pinned_config(path, config)
    folder = fetch_config_folder(name, pinned)
    digests = {part: file_digest(folder / part) for part in model_paths(folder, CONFIGURATION)}
    return ResolvedModel(name, folder, None, {"checkpoint": file_digest(path), **digests}, path, pinned)


def fetch_config_folder(name: str, config: str | None = None) -> Path:
    """The local folder with the configuration of a checkpoint file. With a pinned one no network when it is cached."""
    source, _, commit = _pinned_config(Path(name).expanduser(), config).partition("@")
    return fetch_model_folder(source, commit or None, CONFIGURATION)


def _pinned_config(path: Path, config: str | None) -> str:
    """The folder or "id@commit" that `config` means, or that such a checkpoint usually has."""
    if not path.is_file():
        raise ModelError(f"model '{path}': no such file")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"model '{path}': is pickled, which can run code when opened; if you trust it, convert it once: python -c "
            '"from diffusers import StableDiffusionPipeline as P; '
            f"P.from_single_file('{path}').save_pretrained('NEW_FOLDER')\""
        )
    usual = infer_config_id(path)  # also refuses what does not fit
    source = config or usual
    if source is None:
        raise ModelError(
            f"model '{path}': its tensors leave open how it is configured (Stable Diffusion 2.x predicts ε or v); "
            "name a diffusers folder or hub id of its family as model.config"
        )
    if "@" in source or Path(source).expanduser().is_dir():
        return source
    try:
        return f"{source}@{resolve_model(source, None, CONFIGURATION).commit}"
    except ModelError as error:
        raise ModelError(
            f"model '{path}': needs the configuration of its family, which a checkpoint does not hold: {error}; "
            "or name a diffusers folder of the same family as model.config"
        ) from error
