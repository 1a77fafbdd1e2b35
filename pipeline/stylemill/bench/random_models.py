"""Models with the dimensions of Stable Diffusion 1.5 and SDXL and random weights, created in memory: no download."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stylemill.demo.untrained import write_demo_model
from stylemill.engine.unet.model import DiffusionModel

SIZE = {"sd15": 512, "sdxl": 1024}  # the side of an image in pixels


def random_model(family: str, device: str, dtype: torch.dtype, seed: int = 0) -> DiffusionModel:
    """The model of `family` (sd15 or sdxl) with torch's initialisation and the untrained model's tokenizers."""
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = _sd15() if family == "sd15" else _sdxl()
    # Not diffusers' own `to`, which warns about modules that are meant to stay in float32.
    unet, vae, *text_encoders = (torch.nn.Module.to(p, dtype).eval().requires_grad_(False) for p in parts)
    with tempfile.TemporaryDirectory() as folder:
        demo = write_demo_model(Path(folder) / "demo")
        scheduler = DDIMScheduler.from_pretrained(demo, subfolder="scheduler")
        tokenizers = tuple(CLIPTokenizer.from_pretrained(demo, subfolder="tokenizer") for _ in text_encoders)
    return DiffusionModel(unet, vae, tuple(text_encoders), tokenizers, scheduler, torch.device(device))


def _sd15() -> tuple[torch.nn.Module, ...]:
    return (
        UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64),
        _vae(0.18215),
        CLIPTextModel(_text_config(768, 12)),
    )


def _sdxl() -> tuple[torch.nn.Module, ...]:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),  # the number of heads
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
    )
    second = CLIPTextModelWithProjection(_text_config(1280, 20, layers=32))
    return unet, _vae(0.13025), CLIPTextModel(_text_config(768, 12)), second


def _text_config(width: int, heads: int, layers: int = 12) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        projection_dim=width,
    )


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=scaling_factor,
        sample_size=512,
    )
