"""Refinement: the VAE's decoder fine-tuned on a style image, for sharper texture. The model's own decoder stays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy.typing as npt
import torch
from cachetools import LRUCache
from torch import Tensor

from stylemill.engine.memory import translate_out_of_memory
from stylemill.engine.unet.model import DiffusionModel

Weights = dict[str, npt.NDArray[Any]]  # tensors by name


class DecoderCache(Protocol):
    """Refined decoders of one model, each as the tensors in which it differs from the model's own decoder.

    A decoder that is not in the cache is refined again, to the same bytes.
    """

    def get(self, key: str) -> Weights | None:
        """The tensors that were stored under `key`, or None if they are not kept."""

    def put(self, key: str, weights: Weights) -> None:
        """Store the tensors under `key`; an implementation may skip this."""


class RecentDecoders:
    """A DecoderCache in memory with the `capacity` decoders used last; one of Stable Diffusion's size takes 200 MB."""

    def __init__(self, capacity: int = 4) -> None:
        self._decoders: LRUCache[str, Weights] = LRUCache(capacity)

    def get(self, key: str) -> Weights | None:
        return self._decoders.get(key)

    def put(self, key: str, weights: Weights) -> None:
        self._decoders[key] = weights


@contextmanager
def refined_decoder(
    model: DiffusionModel,
    latent: Tensor,
    image: Tensor,
    steps: int,
    learning_rate: float,
    key: str,
    cache: DecoderCache,
) -> Iterator[bool]:
    """Let the VAE decode with a decoder refined on one image, until the block ends; yields whether it is finite.

    `latent` (C, h, w) is the encoded image, `image` its pixels (H, W, 3) uint8. The decoder comes from `cache` if that
    has it under `key`. It is refined and used in float32, whatever the model's precision. Raises DeviceMemoryError.
    """
    with copied_decoder(model.vae, model.latent_dtype):
        weights = cache.get(key)
        if weights is None:
            pixels = (image.to(model.device).to(model.latent_dtype) / 127.5 - 1).permute(2, 0, 1)[None]
            unscaled = latent[None] / model.vae.config.scaling_factor
            weights = translate_out_of_memory(
                partial(fine_tune_decoder, model.vae, unscaled, pixels, steps, learning_rate),
                "refining the VAE's decoder on a style",
                "take a smaller image.style_size or sampling.refine_decoder_steps: 0",
            )
            cache.put(key, weights)
        model.vae.decoder.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=False)
        yield all(parameter.isfinite().all() for parameter in model.vae.decoder.parameters())


@contextmanager
def copied_decoder(vae: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let the VAE use a copy of its decoder in `dtype` until the block ends; the original is then put back."""
    originals = {name: getattr(vae, name) for name in ("post_quant_conv", "decoder") if getattr(vae, name) is not None}
    try:
        for name, part in originals.items():
            setattr(vae, name, copy.deepcopy(part).to(dtype))
        yield
    finally:
        for name, part in originals.items():
            setattr(vae, name, part)


def fine_tune_decoder(vae: Any, latent: Tensor, image: Tensor, steps: int, learning_rate: float) -> Weights:
    """Fine-tune `vae.decoder`, in place, to decode `latent` (1, C, h, w) to `image` (1, 3, H, W) in [−1, 1].

    Adam on the mean absolute difference; only the decoder's parameters change. Returns its changed tensors by name.
    """
    before = {name: tensor.clone() for name, tensor in vae.decoder.state_dict().items()}
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (vae.decode(latent).sample - image).abs().mean()
            loss.backward()
            optimizer.step()
    vae.decoder.requires_grad_(False)
    return {
        name: tensor.cpu().numpy()
        for name, tensor in vae.decoder.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
