"""LoRAs, added to the model's weights when it is loaded: W + scale · α/r · B A. A step then takes no longer than
without them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylemill.config.model import Lora
from stylemill.engine.unet.model import DiffusionModel
from stylemill.errors import ModelError

# Names of the two factors in files of kohya's trainer, of diffusers before PEFT, and of PEFT.
_FACTOR = re.compile(r"\.(?:lora\.|lora_linear_layer\.|lora_)(down|up|A|B)\.weight$")
# And of diffusers of 2023; its converter still turns kohya's names into these.
_NAME_OF_2023 = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.")


class WeightUpdate(NamedTuple):
    """What is added to the weight of one module: `scale` · up @ down, flattened to matrices."""

    module: Any
    down: Tensor  # (r, in)
    up: Tensor  # (out, r)
    scale: float


def fuse_lora(model: DiffusionModel, file: Path, lora: Lora) -> None:
    """Add a LoRA to the weights of the UNet, and of the text encoders if it has factors for them, in place.

    Raises ModelError, before any weight is changed, for a LoRA of another architecture or kind.
    """
    # Not at the top: this imports the image processors of all pipelines, with warnings.
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
    except Exception as error:  # its converters raise errors of many types for files that they do not expect
        raise ModelError(f"lora {lora.name!r}: cannot be read as a LoRA of this model: {error}") from error
    alphas = {**_alphas_in_metadata(lora, metadata or {}), **(alphas or {})}
    for update in _weight_updates(model, lora, tensors, alphas):
        weight = update.module.weight
        # In float64: the product's low bits can depend on the number of threads, and rounding to the dtype drops them.
        delta = update.up.to(weight.device, torch.float64) @ update.down.to(weight.device, torch.float64)
        weight.data = (weight.double() + update.scale * delta.view_as(weight)).to(weight.dtype)


def _alphas_in_metadata(lora: Lora, metadata: dict[str, Any]) -> dict[str, Any]:
    """α of each part of the model, from the metadata that PEFT writes."""
    for key, value in metadata.items():
        if value and key.endswith((".alpha_pattern", ".use_rslora", ".use_dora")):
            raise ModelError(f"lora {lora.name!r}: not a plain LoRA: it was trained with {key} {value}")
    return {key.removesuffix(".lora_alpha"): value for key, value in metadata.items() if key.endswith(".lora_alpha")}


def _split_key(key: str) -> tuple[str, str | None]:
    """The module's name in `_modules` and the factor, "down" or "up", that a tensor's key means; None for neither."""

    def current_name(match: re.Match[str]) -> str:
        of_unet = "to_out.0" if match[1] == "out" else f"to_{match[1]}"
        return f".{of_unet if key.startswith('unet.') else f'{match[1]}_proj'}.lora."

    name = _NAME_OF_2023.sub(current_name, key)
    if not (match := _FACTOR.search(name)):
        return _module_name(name), None
    return _module_name(name[: match.start()]), "up" if match[1] in ("up", "B") else "down"


def _weight_updates(
    model: DiffusionModel, lora: Lora, tensors: dict[str, Tensor], alphas: dict[str, Any]
) -> list[WeightUpdate]:
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, factor = _split_key(key)
        if factor is None:
            raise ModelError(f"lora {lora.name!r}: not a plain LoRA: it has {key}; DoRA, LoHa and LoKr do not fit")
        factors.setdefault(name, {})[factor] = tensor
    if not factors:
        raise ModelError(f"lora {lora.name!r}: has no weights that diffusers recognizes as those of a LoRA")
    alpha_of = {_split_key(key.removesuffix(".alpha"))[0]: float(alpha) for key, alpha in alphas.items()}
    modules = _modules(model)
    updates = []
    for name, pair in factors.items():
        module = modules.get(name)
        if module is None or pair.keys() != {"down", "up"}:
            problem = "which this model does not have" if module is None else "and has only one of its two factors"
            raise ModelError(f"lora {lora.name!r}: was made for another architecture: it changes {name}, {problem}")
        down, up = pair["down"].flatten(1), pair["up"].flatten(1)
        rank, (has, needs) = len(down), ((len(up), down.shape[1]), (len(module.weight), module.weight[0].numel()))
        if has != needs or up.shape[1] != rank:
            raise ModelError(
                f"lora {lora.name!r}: was made for another architecture: its {name} has the shape {has[0]}×{has[1]}, "
                f"the model's {needs[0]}×{needs[1]}"
            )
        alpha = alpha_of.get(name, alpha_of.get(name.split(".")[0], rank))
        updates.append(WeightUpdate(module, down, up, lora.scale * alpha / rank))
    return updates


def _modules(model: DiffusionModel) -> dict[str, Any]:
    """Every module with a matrix or kernels, by the name that a LoRA has for it."""
    parts = {"unet": model.unet, **dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))}
    return {
        _module_name(f"{part_name}.{name}"): module
        for part_name, part in parts.items()
        for name, module in part.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() > 1
    }


def _module_name(name: str) -> str:
    # Some versions of transformers have a module `text_model` between a text encoder and its layers.
    return name.replace("text_encoder.text_model.", "text_encoder.").replace("_2.text_model.", "_2.")
