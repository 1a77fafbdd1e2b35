"""Which architectures fit, and why others are refused. Torch-free.

Attention distillation reads self-attention layers of a UNet that denoises latents from text: Stable Diffusion 1.x, 2.x
and SDXL, and what was fine-tuned from them. Everything else is refused here with the reason, before it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from stylemill.errors import ModelError

FITTING = "name a Stable Diffusion 1.x, 2.x or SDXL model"


def explain_unsupported_layout(paths: Collection[str]) -> str | None:
    """Why an incomplete model that consists of these files is none that fits; None when it seems to be a torn one."""
    parts = {path.split("/")[0] for path in paths if "/" in path}
    if "unet" not in parts and "transformer" in parts:
        return f"a diffusion transformer (Flux, SD 3 and the like), not a UNet with self-attention layers; {FITTING}"
    if "unet" not in parts and {"prior", "decoder"} & parts:
        return f"a cascade of other models (Kandinsky, Stable Cascade and the like); {FITTING}"
    if "unet" in parts and "text_encoder" not in parts and "text_encoder_2" in parts:
        return "SDXL's refiner, or another model without SDXL's first text encoder; name the base model"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON configuration. Raises ModelError naming the file when there is none in it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a model's configuration")
    return config


def is_sdxl(unet: Mapping[str, Any]) -> bool:
    """Whether the UNet of this configuration also takes a pooled text and the image's size, as SDXL's does."""
    return unet.get("addition_embed_type") == "text_time"


def check_architecture(folder: Path) -> None:
    """Raise ModelError with the reason when the configurations in a whole model folder are those of another kind."""
    unet, vae = read_config(folder / "unet" / "config.json"), read_config(folder / "vae" / "config.json")
    encoders = ["text_encoder", "text_encoder_2"] if is_sdxl(unet) else ["text_encoder"]
    texts = [read_config(folder / name / "config.json") for name in encoders]
    index = read_config(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    for reason in (*_unet_misfits(unet), *_size_misfits(unet, texts, index), *_vae_misfits(unet, vae), *_texts(texts)):
        raise ModelError(f"{folder}: {reason}")


def _unet_misfits(unet: Mapping[str, Any]) -> Iterable[str]:
    kind = unet.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        yield f"its UNet is a {kind}, as models of video or without text have it; {FITTING}"
    takes, gives = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if takes != gives:
        uses = {9: "inpainting models", 8: "image-editing models", 7: "upscalers", 5: "depth-to-image models"}
        which = uses.get(takes, "models with a further input")
        yield f"the UNet takes {takes} channels, as {which} do, and gives {gives}; use the base model"
    if unet.get("addition_embed_type") not in (None, "text_time"):
        yield f"a UNet with addition_embed_type {unet['addition_embed_type']!r} (DeepFloyd, Kandinsky); {FITTING}"
    for key, who in (
        ("class_embed_type", "unCLIP and upscaling models"),
        ("num_class_embeds", "upscaling models"),
        ("encoder_hid_dim_type", "models prompted by images"),
        ("time_cond_proj_dim", "models distilled with a guidance input, such as full LCMs; LCM-LoRA on the base fits"),
        ("only_cross_attention", "upscaling models, whose layers have no self-attention"),
        ("dual_cross_attention", "models prompted twice"),
    ):
        if unet.get(key) not in (None, False):
            yield f"the UNet has {key} {unet[key]!r}, as {who}; {FITTING}"


def _size_misfits(unet: Mapping[str, Any], texts: list[dict[str, Any]], index: Mapping[str, Any]) -> Iterable[str]:
    reads, gives = unet.get("cross_attention_dim"), sum(text.get("hidden_size", 0) for text in texts)
    if isinstance(reads, int) and gives and reads != gives:
        yield f"the UNet reads text of {reads} channels, the text encoder gives {gives}; are the parts of one model?"
    if index.get("requires_aesthetics_score"):
        yield "SDXL's refiner, which is conditioned on an aesthetic score; name the base model"
    if is_sdxl(unet) and "projection_class_embeddings_input_dim" in unet and "projection_dim" in texts[-1]:
        told = unet["projection_class_embeddings_input_dim"] - texts[-1]["projection_dim"]
        count = told / unet.get("addition_time_embed_dim", 256)
        if count != 6:
            yield f"its UNet is told {count:g} numbers about the image, not SDXL's six (its refiner takes five)"


def _vae_misfits(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Iterable[str]:
    kind = vae.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        yield f"its VAE is a {kind}; only AutoencoderKL fits"
    if vae.get("latent_channels", 4) != unet.get("in_channels", 4):
        yield f"the VAE has {vae.get('latent_channels', 4)} latent channels, the UNet {unet.get('in_channels', 4)}"
    if vae.get("latents_mean") or vae.get("shift_factor"):
        yield "its VAE shifts latents (latents_mean, shift_factor), as Playground v2.5's does; such models do not fit"


def _texts(texts: list[dict[str, Any]]) -> Iterable[str]:
    for text in texts:
        if text.get("model_type", "clip_text_model") != "clip_text_model":
            yield f"its text encoder is a {text['model_type']}, not CLIP's; {FITTING}"


# What a ControlNet copies of the UNet that it was trained for, so that its outputs can be added to it.
_COPIED = ("cross_attention_dim", "block_out_channels", "down_block_types", "layers_per_block", "in_channels")


def check_controlnet_architecture(name: str, controlnet: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Raise ModelError unless a ControlNet of this configuration was trained for a UNet shaped like this one."""
    kind = controlnet.get("_class_name")
    if kind != "ControlNetModel":
        raise ModelError(f"controlnet {name!r}: is a {kind or 'model of no known class'}, not a ControlNetModel")
    for key in _COPIED:
        if key not in controlnet or key not in unet:  # a file of an older diffusers leaves out a default
            continue
        has, needs = (list(one) if isinstance(one := config[key], tuple) else one for config in (controlnet, unet))
        if has != needs:
            raise ModelError(
                f"controlnet {name!r}: was made for another architecture: its {key} is {has}, the UNet's {needs}"
            )
