"""Single-file checkpoints: weights in one file, configuration from a folder or hub repository. Torch-free."""

from __future__ import annotations

from pathlib import Path

from stylemill.config.model import CHECKPOINT_SUFFIXES
from stylemill.errors import ModelError
from stylemill.models.architecture import SUPPORTED
from stylemill.models.file_sets import CONFIGURATION
from stylemill.models.folder import file_digest, model_paths
from stylemill.models.resolve import ResolvedModel, fetch_model_folder, resolve_model
from stylemill.models.safetensors_file import read_tensor_shapes

# The configuration of a checkpoint whose job names none comes from these repositories. Their weights are not loaded.
SD_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"

CHECKPOINT_UNET = "model.diffusion_model."  # before the names of the UNet's tensors
_FIRST_CONVOLUTION = f"{CHECKPOINT_UNET}input_blocks.0.0.weight"
_VAE = "first_stage_model."
_SD_TEXT, _SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
_SDXL_TEXT, _SDXL_TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_REFINER_TEXT = "conditioner.embedders.0.model."
_TEXT_ENCODERS = (_SD_TEXT, _SD2_TEXT, _SDXL_TEXT, _SDXL_TEXT_2, _REFINER_TEXT)
_UNSUPPORTED = (  # part of a tensor's name, and what has such tensors
    ("lora_", "a LoRA, not a model; name the model here and the LoRA in model.loras"),
    (".lora_A.", "a LoRA, not a model; name the model here and the LoRA in model.loras"),
    ("double_blocks.", f"a diffusion transformer (Flux), not a UNet with self-attention layers; {SUPPORTED}"),
    ("joint_blocks.", f"a diffusion transformer (SD 3), not a UNet with self-attention layers; {SUPPORTED}"),
    ("control_model.", f"a ControlNet, not a text-to-image model; {SUPPORTED}"),
    ("time_stack.", f"a video model; {SUPPORTED}"),
)


def is_single_file(name: str) -> bool:
    """Whether a model's name means a checkpoint file. The file need not exist."""
    return name.endswith(CHECKPOINT_SUFFIXES)


def resolve_single_file(name: str, config: str | None = None) -> ResolvedModel:
    """Resolve a checkpoint file to the digests of its bytes and of its configuration files.

    `config` is a diffusers folder (which needs no weights), a hub id, or a hub id with its commit, "id@commit". Without
    it, the checkpoint's tensors decide between the configurations of SD 1.5 and SDXL. A configuration on the hub is
    small and is downloaded here. Raises ModelError when the file is absent, pickled, truncated or not supported.
    """
    path = Path(name).expanduser()
    pinned = _pin_config(path, config)
    folder = fetch_config_folder(name, pinned)
    digests = {part: file_digest(folder / part) for part in model_paths(folder, CONFIGURATION)}
    return ResolvedModel(name, folder, None, {"checkpoint": file_digest(path), **digests}, path, pinned)


def fetch_config_folder(name: str, config: str | None = None) -> Path:
    """The local folder with the configuration of a checkpoint file; `config` is as for `resolve_single_file`.

    With a commit in `config`, a cached configuration is used without network. Raises ModelError.
    """
    source, _, commit = _pin_config(Path(name).expanduser(), config).partition("@")
    return fetch_model_folder(source, commit or None, CONFIGURATION)


def infer_config_id(path: Path) -> str | None:
    """The hub id whose configuration fits a checkpoint, inferred from the names of its tensors.

    None when they do not tell, as for Stable Diffusion 2.x, which predicts ε or v. Raises ModelError when the file
    cannot be read or is not a supported checkpoint.
    """
    shapes = read_tensor_shapes(path)
    for part, reason in _UNSUPPORTED:
        if any(part in name for name in shapes):
            raise ModelError(f"{path}: {reason}")
    first = shapes.get(_FIRST_CONVOLUTION)
    if first is None:
        raise ModelError(
            f"{path}: has no {_FIRST_CONVOLUTION}; it is not a checkpoint in Stable Diffusion's original layout"
        )
    if len(first) == 4 and first[1] != 4:
        raise ModelError(f"{path}: its UNet takes {first[1]} channels, as inpainting models do; use the base model")
    text_encoders = {prefix for prefix in _TEXT_ENCODERS for name in shapes if name.startswith(prefix)}
    if {_SDXL_TEXT, _SDXL_TEXT_2} <= text_encoders:
        return SDXL_CONFIG
    if _REFINER_TEXT in text_encoders:
        raise ModelError(f"{path}: SDXL's refiner, which has only one text encoder; use the base model")
    if not text_encoders or not any(name.startswith(_VAE) for name in shapes):
        raise ModelError(f"{path}: contains a UNet without a VAE or text encoder; use a complete checkpoint")
    return SD_CONFIG if _SD_TEXT in text_encoders else None


def _pin_config(path: Path, config: str | None) -> str:
    """The source of a checkpoint's configuration: a folder, or "id@commit"."""
    if not path.is_file():
        raise ModelError(f"model '{path}': no such file")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"model '{path}': is pickled, which can run code when opened; if you trust it, convert it once: python -c "
            '"from diffusers import StableDiffusionPipeline as P; '
            f"P.from_single_file('{path}').save_pretrained('NEW_FOLDER')\""
        )
    inferred = infer_config_id(path)  # also with a `config`, because it rejects unsupported checkpoints
    source = config or inferred
    if source is None:
        raise ModelError(
            f"model '{path}': its tensors do not tell its configuration (Stable Diffusion 2.x predicts ε or v); "
            "name a diffusers folder or hub id of the same family as model.config"
        )
    if "@" in source or Path(source).expanduser().is_dir():
        return source
    try:
        return f"{source}@{resolve_model(source, None, CONFIGURATION).commit}"
    except ModelError as error:
        raise ModelError(
            f"model '{path}': needs the configuration of its family, which a single file does not contain: {error}; "
            "or name a diffusers folder of the same family as model.config"
        ) from error
