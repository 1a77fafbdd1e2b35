"""The resident diffusion model: loading, text and image encoding, the noise prediction. SD-1.x-shaped for now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from stylemill.engine.inputs import Pixels
from stylemill.errors import ModelError
from stylemill.model_files import refuse_other_architectures

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """UNet, VAE, text encoder and scheduler of one model, frozen, on one device.

    Weights and activations have `unet.dtype`; latents and everything computed on them have `latent_dtype`.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    device: torch.device

    @classmethod
    def load(cls, folder: Path, dtype: str, device: str) -> DiffusionModel:
        """Load a diffusers folder, safetensors only. Raises ModelError naming the part that will not load."""
        weights = DTYPES[dtype]
        transformers_logging.disable_progress_bar()  # a bar over the weights would tear the run's own
        try:
            unet = _load_part(UNet2DConditionModel, folder, "unet", weights)
            vae = _load_part(AutoencoderKL, folder, "vae", weights)
            if weights == torch.float16 and vae.config.force_upcast:
                vae = vae.float()  # such a VAE overflows in half precision (SDXL's does)
            text_encoder = _load_part(CLIPTextModel, folder, "text_encoder", weights)
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
            scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ModelError(f"{folder}: cannot be loaded as a Stable Diffusion 1.x model: {error}") from error
        refuse_other_architectures(folder, unet.config, text_encoder.config.to_dict())
        for part in (unet, vae, text_encoder):
            part.requires_grad_(False).eval().to(device)  # weight gradients would double the backward pass
        return cls(unet, vae, text_encoder, tokenizer, scheduler, torch.device(device))

    @property
    def latent_dtype(self) -> torch.dtype:
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def grid(self) -> int:
        """Pixels an image side must be a multiple of: one latent per 2^(VAE blocks − 1), halved by each UNet level."""
        return self.pixels_per_latent * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def pixels_per_latent(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def with_steps(self, steps: int) -> DiffusionModel:
        """This model with a scheduler of its own, set to `steps` timesteps."""
        # The spacing of the paper; with another, a step would not land on the timestep that comes next.
        scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
        return replace(self, scheduler=scheduler)

    @torch.no_grad()
    def encode_text(self, text: str) -> Tensor:
        """Text -> (tokens, dim), the text encoder's last hidden state. One text at a time: no batch mates."""
        ids = self.tokenizer(
            text,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        hidden: Tensor = self.text_encoder(ids.to(self.device))[0]
        return hidden[0].to(self.latent_dtype)

    @torch.no_grad()
    def encode_image(self, pixels: Pixels) -> Tensor:
        """(H, W, 3) uint8 -> clean latent (C, h, w): posterior mean × scaling factor of the image in [−1, 1]."""
        image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        mean: Tensor = self.vae.encode(image.to(self.device, self.vae.dtype)).latent_dist.mean
        return mean[0].to(self.latent_dtype) * float(self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode_image(self, latents: Tensor) -> list[Pixels]:
        """Latents (B, C, h, w) -> B images (H, W, 3) uint8."""
        image = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        image = (image.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(image.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def predict_noise(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        """ε(z, t, text): latents (B, C, h, w), text (B, tokens, dim) or (tokens, dim) for all -> (B, C, h, w)."""
        if text.ndim == 2:
            text = text.expand(len(latents), -1, -1)
        dtype = self.unet.dtype
        predicted: Tensor = self.unet(latents.to(dtype), timestep, text.to(dtype), return_dict=False)[0]
        return predicted.to(self.latent_dtype)


def _load_part(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    # float64 exists only in memory, for tests: nobody ships such weights.
    stored = torch.float32 if dtype == torch.float64 else dtype
    part = kind.from_pretrained(folder, subfolder=name, torch_dtype=stored, use_safetensors=True)
    return part if part.dtype == dtype else part.to(dtype)
