"""The weights of a model, from a diffusers folder or a single-file checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stylemill.models.architecture import is_sdxl, read_config


def load_parts(folder: Path, checkpoint: Path | None, dtype: torch.dtype) -> tuple[Any, Any, tuple[Any, ...]]:
    """Load UNet, VAE and text encoders, safetensors only.

    Without `checkpoint` they come from a diffusers folder, with it from that file, configured by the folder.
    """
    # SDXL's VAE overflows in half precision; its configuration marks this.
    upcast = dtype == torch.float16 and read_config(folder / "vae" / "config.json").get("force_upcast")
    vae_dtype = torch.float32 if upcast else dtype
    sdxl = is_sdxl(read_config(folder / "unet" / "config.json"))
    if checkpoint is not None:
        return _from_checkpoint(checkpoint, folder, sdxl, dtype, vae_dtype)
    kinds = {"text_encoder": CLIPTextModel} | ({"text_encoder_2": CLIPTextModelWithProjection} if sdxl else {})
    return (
        _load_part(UNet2DConditionModel, folder, "unet", dtype),
        _load_part(AutoencoderKL, folder, "vae", vae_dtype),
        tuple(_load_part(kind, folder, name, dtype) for name, kind in kinds.items()),
    )


def _load_part(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    part = kind.from_pretrained(folder, subfolder=name, torch_dtype=_stored(dtype), use_safetensors=True)
    return _cast(part, dtype)


def _from_checkpoint(
    checkpoint: Path, folder: Path, sdxl: bool, dtype: torch.dtype, vae_dtype: torch.dtype
) -> tuple[Any, Any, tuple[Any, ...]]:
    # Not at the top: the pipelines import all their image processors, with warnings.
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    local = {"config": str(folder), "local_files_only": True}
    kind = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    unused = {"feature_extractor": None, "image_encoder": None} | ({} if sdxl else {"safety_checker": None})
    with _quiet():
        vae = AutoencoderKL.from_single_file(str(checkpoint), subfolder="vae", torch_dtype=_stored(vae_dtype), **local)
        pipeline = kind.from_single_file(str(checkpoint), vae=vae, torch_dtype=_stored(dtype), **unused, **local)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2] if sdxl else [pipeline.text_encoder]
    return _cast(pipeline.unet, dtype), _cast(vae, vae_dtype), tuple(_cast(encoder, dtype) for encoder in encoders)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bar of diffusers, which would be drawn over the run's, and warnings of casts without effect."""
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _cast(part: Any, dtype: torch.dtype) -> Any:
    return part if part.dtype == dtype else part.to(dtype)


def _stored(dtype: torch.dtype) -> torch.dtype:
    # No file has float64 weights; tests use them in memory.
    return torch.float32 if dtype == torch.float64 else dtype
