"""What the header of a safetensors file tells: whether the file is whole, and what it is a checkpoint of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from stylemill.errors import ModelError
from stylemill.models.architecture import FITTING

# Where a single-file checkpoint's configuration is taken from when the job names none. Its weights are not loaded.
SD_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"

_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_SD, _SD_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
_SDXL_FIRST, _SDXL_SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_REFINER = "conditioner.embedders.0.model."
_TEXT_ENCODERS = (_SD, _SD_2, _SDXL_FIRST, _SDXL_SECOND, _REFINER)
_OTHERS = (  # part of a tensor's name -> what has such tensors
    ("lora_", "a LoRA, not a model; name the model here and the LoRA in model.loras"),
    (".lora_A.", "a LoRA, not a model; name the model here and the LoRA in model.loras"),
    ("double_blocks.", f"a diffusion transformer (Flux), not a UNet with self-attention layers; {FITTING}"),
    ("joint_blocks.", f"a diffusion transformer (SD 3), not a UNet with self-attention layers; {FITTING}"),
    ("control_model.", f"a ControlNet, not a model that makes pictures; {FITTING}"),
    ("time_stack.", f"a video model; {FITTING}"),
)


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file. Raises ModelError when the file is cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
        if path.stat().st_size != 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0):
            raise ValueError("size differs from the header's")
        return {key: tuple(entry["shape"]) for key, entry in tensors.items()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # the last: a header of brackets
        raise ModelError(f"{path}: truncated or not safetensors ({error}); copy or download it again") from error


def count_parameters(path: Path) -> int:
    """Number of scalars in a safetensors file, from its header alone."""
    return sum(math.prod(shape) for shape in read_tensor_shapes(path).values())


def infer_config_id(path: Path) -> str | None:
    """The hub id whose configuration a single-file checkpoint usually goes with, by the names of its tensors.

    None when they leave it open. Raises ModelError for what is no checkpoint that fits.
    """
    tensors = read_tensor_shapes(path)
    for part, reason in _OTHERS:
        if any(part in name for name in tensors):
            raise ModelError(f"{path}: {reason}")
    first = tensors.get(_FIRST_CONVOLUTION)
    if first is None:
        raise ModelError(f"{path}: has no {_FIRST_CONVOLUTION}; it is no checkpoint in Stable Diffusion's own layout")
    if len(first) == 4 and first[1] != 4:
        raise ModelError(f"{path}: its UNet takes {first[1]} channels, as inpainting models do; use the base model")
    holds = {prefix for prefix in _TEXT_ENCODERS for name in tensors if name.startswith(prefix)}
    if {_SDXL_FIRST, _SDXL_SECOND} <= holds:
        return SDXL_CONFIG
    if _REFINER in holds:
        raise ModelError(f"{path}: SDXL's refiner, with one text encoder only; name the base model")
    if not holds or not any(name.startswith("first_stage_model.") for name in tensors):
        raise ModelError(f"{path}: holds a UNet without its VAE or text encoder; name a whole checkpoint")
    return SD_CONFIG if _SD in holds else None  # Stable Diffusion 2.x predicts ε or v
