"""A loaded diffusion model of Stable Diffusion 1.x, 2.x or SDXL: encoding and decoding, and the noise prediction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn.functional import conv2d, scaled_dot_product_attention
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from stylemill.engine.kernels import constant
from stylemill.engine.unet.controlnet import LoadedControlNet
from stylemill.engine.unet.loading import load_parts
from stylemill.engine.unet.text import Text
from stylemill.errors import ModelError
from stylemill.images.input_image import Pixels
from stylemill.models import architecture

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

_NO_KERNEL = re.compile("not implemented|not support|unsupported|no kernel", re.IGNORECASE)


def check_dtype(dtype: str, device: str) -> None:
    """Raise ModelError if torch has no convolution or attention for `dtype` on `device`."""
    try:
        x = torch.zeros(1, 1, 8, 8, dtype=DTYPES[dtype], device=device)
        scaled_dot_product_attention(conv2d(x, x[..., :3, :3], padding=1), x, x)
    except RuntimeError as error:
        if not _NO_KERNEL.search(str(error)):  # the device is full, or failed
            raise
        raise ModelError(
            f"the device {device} of this worker cannot compute in {dtype} ({str(error).splitlines()[0]}); all workers"
            " of a run use one dtype: run on devices that have it, or set another model.dtype and another output"
        ) from error


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """UNet, VAE, text encoders and scheduler of one model, frozen, on one device. SDXL has two text encoders.

    Weights and activations have `unet.dtype`; latents and everything computed on them have `latent_dtype`.
    """

    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    device: torch.device
    controlnets: tuple[LoadedControlNet, ...] = ()

    @classmethod
    def load(cls, folder: Path, dtype: str, device: str, checkpoint: Path | None = None) -> DiffusionModel:
        """Load a diffusers folder, or the weights of a single-file checkpoint whose configuration that folder has.

        Raises ModelError with the reason if a part cannot be loaded.
        """
        weights = DTYPES[dtype]
        transformers_logging.disable_progress_bar()  # it would be drawn over the progress bar of the run
        try:
            unet, vae, text_encoders = load_parts(folder, checkpoint, weights)
            names = ("tokenizer", "tokenizer_2")[: len(text_encoders)]
            tokenizers = tuple(CLIPTokenizer.from_pretrained(folder, subfolder=name) for name in names)
            scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"{checkpoint or folder}: cannot be loaded as a Stable Diffusion model: {error}"
            ) from error
        for part in (unet, vae, *text_encoders):
            part.requires_grad_(False).eval().to(device)  # gradients of weights would double the backward pass
        return cls(unet, vae, text_encoders, tokenizers, scheduler, torch.device(device))

    @property
    def latent_dtype(self) -> torch.dtype:
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet also takes a pooled text and the image's size, as SDXL's does."""
        return architecture.is_sdxl(self.unet.config)

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def grid(self) -> int:
        """The number of pixels that an image's sides must be multiples of."""
        return architecture.pixel_grid(self.pixels_per_latent, len(self.unet.config.block_out_channels))

    @property
    def pixels_per_latent(self) -> int:
        return architecture.pixels_per_latent(self.vae.config)

    @torch.no_grad()
    def encode_text(self, text: str) -> Text:
        """Encode one text, in a batch of its own.

        SD: the last hidden state. SDXL: the penultimate ones of both encoders side by side, and the second's pooled
        vector. The empty text is encoded like any other: the zeros that SDXL's pipeline uses instead
        (`force_zeros_for_empty_prompt`) are not the null prompt of attention distillation.
        """
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            length = tokenizer.model_max_length
            tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            encoded = encoder(tokens.input_ids.to(self.device), output_hidden_states=self.is_sdxl)
            hidden.append(encoded.hidden_states[-2][0] if self.is_sdxl else encoded.last_hidden_state[0])
            pooled = encoded.text_embeds[0] if self.is_sdxl and encoder is self.text_encoders[-1] else None
        return Text(torch.cat(hidden, dim=-1), pooled).to(self.latent_dtype)

    def truncated_text(self, text: str) -> str:
        """The end of `text` that `encode_text` truncates, by the first tokenizer; "" for a text of usual length."""
        tokenizer = self.tokenizers[0]
        tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        capacity = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        return str(tokenizer.decode(tokens[capacity:])).strip() if len(tokens) > capacity else ""

    @torch.no_grad()
    def encode_image(self, pixels: Pixels) -> Tensor:
        """(H, W, 3) uint8 -> clean latent (C, h, w): posterior mean × scaling factor of the image in [−1, 1].

        NaN or Inf where the VAE overflows.
        """
        image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        mean: Tensor = self.vae.encode(image.to(self.device, self.vae.dtype)).latent_dist.mean
        return mean[0].to(self.latent_dtype) * float(self.vae.config.scaling_factor)

    def has_several_tiles(self, latents: Tensor) -> bool:
        """Whether latents (…, h, w) are larger than the tiles in which the VAE can decode them."""
        return max(latents.shape[-2:]) > int(self.vae.tile_latent_min_size)

    @torch.no_grad()
    def decode_image(self, latents: Tensor, in_tiles: bool = False) -> Pixels | None:
        """Latents (C, h, w) -> image (H, W, 3) uint8; None if the decoder gives NaN or Inf.

        `in_tiles` takes less memory, and changes the image a little.
        """
        dtype = self.vae.decoder.conv_in.weight.dtype  # a refined decoder's differs from the model's
        decode = self.vae.tiled_decode if in_tiles else self.vae.decode
        image = decode((latents[None] / self.vae.config.scaling_factor).to(dtype)).sample[0]
        finite = image.isfinite().all()  # in uint8, NaN would be black
        image = (image.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels: Pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        return pixels if finite else None

    def predict_noise(self, latents: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
        """ε: latents (B, C, h, w), a timestep without dimensions, the UNet's other arguments -> (B, C, h, w)."""
        predicted: Tensor = self.unet(latents.to(self.unet.dtype), timestep, **conditions, return_dict=False)[0]
        return predicted.to(self.latent_dtype)

    def conditions(self, latents: Tensor, text: Text) -> dict[str, Any]:
        """The UNet's keyword arguments for a text; for SDXL also the pooled text, the image's size and no cropping.

        `text` is a batch of B texts for latents (B, C, h, w), or one for all.
        """
        text = text.expand(len(latents))
        conditions: dict[str, Any] = {"encoder_hidden_states": text.hidden.to(self.unet.dtype).contiguous()}
        if text.pooled is not None:
            height, width = (side * self.pixels_per_latent for side in latents.shape[-2:])
            original_size, crop_corner, target_size = (height, width), (0, 0), (height, width)
            # In float32 whatever the dtype of the weights: bfloat16 would round the size of an image.
            time_ids = constant((*original_size, *crop_corner, *target_size), torch.float32, self.device)
            conditions["added_cond_kwargs"] = {
                "text_embeds": text.pooled.to(self.unet.dtype).contiguous(),
                "time_ids": time_ids.repeat(len(latents), 1),
            }
        return conditions
