"""LoRAs, added to the weights once and for all: W + scale · α/r · B A. Nothing of them is left to slow a step down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylemill.config.model import Lora
from stylemill.engine.unet.model import DiffusionModel
from stylemill.errors import ModelError

# How the two factors are called by kohya's trainer, by diffusers before PEFT, and by PEFT.
_FACTOR = re.compile(r"\.(?:lora\.|lora_linear_layer\.|lora_)(down|up|A|B)\.weight$")
# And by diffusers of 2023, whose converter still brings kohya's names to these.
_OLDEST = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.")


class Change(NamedTuple):
    """What is added to the weight of one module: `scale` · up @ down, flattened to matrices."""

    module: Any
    down: Tensor  # (r, in)
    up: Tensor  # (out, r)
    scale: float


def fuse_lora(model: DiffusionModel, file: Path, lora: Lora) -> None:
    """Add a LoRA to the weights of the UNet and, where it has some for them, of the text encoders, in place.

    Raises ModelError, before any weight is changed, for a LoRA of another architecture or kind.
    """
    # Here and not above: it brings the image processors of all pipelines along, and warnings about them.
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    loader = StableDiffusionXLLoraLoaderMixin if model.is_sdxl else StableDiffusionLoraLoaderMixin
    try:
        tensors, alphas, metadata = loader.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            unet_config=model.unet.config,
            return_lora_metadata=True,
        )
    except Exception as error:  # its converters raise what they happen to stumble on
        raise ModelError(f"lora {lora.name!r}: cannot be read as a LoRA of this model: {error}") from error
    for change in _changes(model, lora, tensors, {**_alphas(lora, metadata or {}), **(alphas or {})}):
        weight = change.module.weight
        # In float64: the sum is rounded to the weight's precision alone, and so the same with any number of threads.
        delta = change.up.to(weight.device, torch.float64) @ change.down.to(weight.device, torch.float64)
        weight.data = (weight.double() + change.scale * delta.view_as(weight)).to(weight.dtype)


def _alphas(lora: Lora, metadata: dict[str, Any]) -> dict[str, Any]:
    """α of each part as PEFT notes it in a file's metadata: for the whole of it."""
    for key, value in metadata.items():
        if value and key.endswith((".alpha_pattern", ".use_rslora", ".use_dora")):
            raise ModelError(f"lora {lora.name!r}: not a plain LoRA, for it was trained with {key} {value}")
    return {key.removesuffix(".lora_alpha"): value for key, value in metadata.items() if key.endswith(".lora_alpha")}


def _split(key: str) -> tuple[str, str | None]:
    """A key's module, by the name of today, and which factor of its change the key is: down, up or neither."""

    def today(found: re.Match[str]) -> str:
        of_unet = "to_out.0" if found[1] == "out" else f"to_{found[1]}"
        return f".{of_unet if key.startswith('unet.') else f'{found[1]}_proj'}.lora."

    name = _OLDEST.sub(today, key)
    if not (found := _FACTOR.search(name)):
        return _module_name(name), None
    return _module_name(name[: found.start()]), "up" if found[1] in ("up", "B") else "down"


def _changes(model: DiffusionModel, lora: Lora, tensors: dict[str, Tensor], alphas: dict[str, Any]) -> list[Change]:
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, factor = _split(key)
        if factor is None:
            raise ModelError(f"lora {lora.name!r}: not a plain LoRA, for it has {key}; DoRA, LoHa and LoKr do not fit")
        factors.setdefault(name, {})[factor] = tensor
    if not factors:
        raise ModelError(f"lora {lora.name!r}: has no weights that diffusers knows as those of a LoRA")
    known = {_split(key.removesuffix(".alpha"))[0]: float(alpha) for key, alpha in alphas.items()}
    modules = _modules(model)
    changes = []
    for name, pair in factors.items():
        module = modules.get(name)
        if module is None or pair.keys() != {"down", "up"}:
            what = "this model has not" if module is None else "only one of its two factors is there"
            raise ModelError(f"lora {lora.name!r}: was made for another architecture: it changes {name}, and {what}")
        down, up = pair["down"].flatten(1), pair["up"].flatten(1)
        rank, (has, needs) = len(down), ((len(up), down.shape[1]), (len(module.weight), module.weight[0].numel()))
        if has != needs or up.shape[1] != rank:
            raise ModelError(
                f"lora {lora.name!r}: was made for another architecture: its {name} has the shape {has[0]}×{has[1]}, "
                f"the model's {needs[0]}×{needs[1]}"
            )
        alpha = known.get(name, known.get(name.split(".")[0], rank))
        changes.append(Change(module, down, up, lora.scale * alpha / rank))
    return changes


def _modules(model: DiffusionModel) -> dict[str, Any]:
    """Every module with a matrix or kernels, by the name that a LoRA has for it."""
    parts = {"unet": model.unet, **dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))}
    return {
        _module_name(f"{part}.{name}"): module
        for part, whole in parts.items()
        for name, module in whole.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() > 1
    }


def _module_name(name: str) -> str:
    # transformers has had its text model with and without this level.
    return name.replace("text_encoder.text_model.", "text_encoder.").replace("_2.text_model.", "_2.")
