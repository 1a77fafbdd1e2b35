"""A model with the dimensions of Stable Diffusion 1.5 and random weights, created in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stylemill.demo.untrained import write_demo_model
from stylemill.engine.unet.model import DiffusionModel


def random_sd15(device: str, dtype: torch.dtype, seed: int = 0) -> DiffusionModel:
    """The model, with the 860 million UNet parameters of torch's initialisation and the untrained model's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        demo = write_demo_model(Path(folder) / "demo")
        tokenizer = CLIPTokenizer.from_pretrained(demo, subfolder="tokenizer")
        scheduler = DDIMScheduler.from_pretrained(demo, subfolder="scheduler")
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    unet, vae, text_encoder = (p.to(dtype).eval().requires_grad_(False) for p in (unet, vae, text_encoder))
    return DiffusionModel(unet, vae, (text_encoder,), (tokenizer,), scheduler, torch.device(device))
