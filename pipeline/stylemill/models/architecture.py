"""Which architectures are supported, and why others are rejected. Torch-free.

Attention distillation reads self-attention layers of a UNet that denoises latents from text. Stable Diffusion 1.x, 2.x,
SDXL and models fine-tuned from them are supported. Others are rejected before they are loaded, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stylemill.errors import ModelError

SUPPORTED = "use a Stable Diffusion 1.x, 2.x or SDXL model"  # ends error messages
Config = Mapping[str, Any]  # the content of a component's config.json


def explain_unsupported_layout(paths: Collection[str]) -> str | None:
    """Why a model with these files (relative paths) is not supported; None if its layout shows no reason."""
    components = {path.split("/")[0] for path in paths if "/" in path}
    if "unet" not in components and "transformer" in components:
        return f"a diffusion transformer (such as Flux or SD 3), not a UNet with self-attention layers; {SUPPORTED}"
    if "unet" not in components and {"prior", "decoder"} & components:
        return f"a cascade of several models (such as Kandinsky or Stable Cascade); {SUPPORTED}"
    if "unet" in components and "text_encoder" not in components and "text_encoder_2" in components:
        return "SDXL's refiner, or another model without SDXL's first text encoder; use the base model"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """The content of a JSON configuration file. Raises ModelError when it cannot be read or is not a JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a model configuration; expected a JSON object")
    return config


def is_sdxl(unet: Config) -> bool:
    """Whether the UNet with this configuration is SDXL's: it also takes a pooled text embedding and the image size."""
    return unet.get("addition_embed_type") == "text_time"


def pixels_per_latent(vae: Config) -> int:
    """The side of a latent in pixels: each block of the VAE but the last halves the image."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def pixel_grid(latent_side: int, levels: int) -> int:
    """The number of pixels that an image's sides must be multiples of, for latents of `latent_side` pixels.

    Each of the UNet's `levels` but the last halves the latent grid.
    """
    return int(latent_side * 2 ** (levels - 1))


def check_architecture(folder: Path) -> None:
    """Raise ModelError when the configurations of a complete model folder are not those of a supported model."""
    unet, vae = read_config(folder / "unet" / "config.json"), read_config(folder / "vae" / "config.json")
    encoders = ["text_encoder", "text_encoder_2"] if is_sdxl(unet) else ["text_encoder"]
    texts = [read_config(folder / name / "config.json") for name in encoders]
    index = read_config(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    for problem in (
        *_unet_problems(unet),
        *_conditioning_problems(unet, texts, index),
        *_vae_problems(unet, vae),
        *_text_encoder_problems(texts),
    ):
        raise ModelError(f"{folder}: {problem}")


_INPUT_CHANNELS = {9: "inpainting models", 8: "image-editing models", 7: "upscalers", 5: "depth-to-image models"}
_UNET_OPTIONS = (  # options that no supported UNet sets, and which models set them
    ("class_embed_type", "unCLIP and upscaling models"),
    ("num_class_embeds", "upscaling models"),
    ("encoder_hid_dim_type", "models with image prompts"),
    ("time_cond_proj_dim", "models with a guidance input, such as full LCMs (LCM-LoRA on a base model is supported)"),
    ("only_cross_attention", "upscaling models, whose layers have no self-attention"),
    ("dual_cross_attention", "models with two prompts"),
)


def _unet_problems(unet: Config) -> Iterator[str]:
    class_name = unet.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        yield f"its UNet is a {class_name}, as in video models and models without text input; {SUPPORTED}"
    inputs, outputs = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if inputs != outputs:
        models = _INPUT_CHANNELS.get(inputs, "models with additional inputs")
        yield f"the UNet takes {inputs} channels, as {models} do, and returns {outputs}; use the base model"
    if unet.get("addition_embed_type") not in (None, "text_time"):
        embedding = unet["addition_embed_type"]
        yield f"the UNet has addition_embed_type {embedding!r}, as in DeepFloyd IF or Kandinsky; {SUPPORTED}"
    for option, models in _UNET_OPTIONS:
        if unet.get(option) not in (None, False):
            yield f"the UNet has {option} {unet[option]!r}, as in {models}; {SUPPORTED}"


def _conditioning_problems(unet: Config, texts: Sequence[Config], index: Config) -> Iterator[str]:
    expected, actual = unet.get("cross_attention_dim"), sum(text.get("hidden_size", 0) for text in texts)
    if isinstance(expected, int) and actual and expected != actual:
        yield (
            f"the UNet reads text of {expected} channels, the text encoder returns {actual}; check that both belong to "
            "one model"
        )
    if index.get("requires_aesthetics_score"):
        yield "SDXL's refiner, which takes an aesthetic score; use the base model"
    if is_sdxl(unet) and "projection_class_embeddings_input_dim" in unet and "projection_dim" in texts[-1]:
        dimension = unet["projection_class_embeddings_input_dim"] - texts[-1]["projection_dim"]
        count = dimension / unet.get("addition_time_embed_dim", 256)
        if count != 6:
            yield f"the UNet takes {count:g} time_ids; SDXL's takes six (its refiner takes five); use the base model"


def _vae_problems(unet: Config, vae: Config) -> Iterator[str]:
    class_name = vae.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        yield f"the class of its VAE is {class_name}; only AutoencoderKL is supported"
    channels, expected = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if channels != expected:
        yield f"the VAE has {channels} latent channels, the UNet {expected}; check that both belong to one model"
    if vae.get("latents_mean") or vae.get("shift_factor"):
        yield "the VAE shifts latents (latents_mean, shift_factor), as Playground v2.5's does; this is not supported"


def _text_encoder_problems(texts: Sequence[Config]) -> Iterator[str]:
    for text in texts:
        if text.get("model_type", "clip_text_model") != "clip_text_model":
            yield f"the model_type of its text encoder is {text['model_type']}, not CLIP's; {SUPPORTED}"


# Settings that a ControlNet shares with its UNet, because its outputs are added to the UNet's.
_SHARED_WITH_UNET = ("cross_attention_dim", "block_out_channels", "down_block_types", "layers_per_block", "in_channels")


def check_controlnet_architecture(name: str, controlnet: Config, unet: Config) -> None:
    """Raise ModelError unless a ControlNet with this configuration fits a UNet with that one.

    `name` is the ControlNet's name in the error message.
    """
    class_name = controlnet.get("_class_name")
    if class_name != "ControlNetModel":
        raise ModelError(
            f"controlnet {name!r}: is a {class_name or 'model without a class name'}, not a ControlNetModel"
        )
    for key in _SHARED_WITH_UNET:
        if key not in controlnet or key not in unet:  # older versions of diffusers do not write every default
            continue
        actual, expected = (
            list(value) if isinstance(value := config[key], tuple) else value for config in (controlnet, unet)
        )
        if actual != expected:
            raise ModelError(
                f"controlnet {name!r}: was trained for another architecture: its {key} is {actual}, the UNet's is "
                f"{expected}"
            )
