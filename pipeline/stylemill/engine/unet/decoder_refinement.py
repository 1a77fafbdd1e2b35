"""Refining the VAE's decoder on a style image, for sharper texture; the model's own decoder comes back untouched."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from stylemill.engine.batching import Batch, micro_batches
from stylemill.engine.state import Arrays, ShardInputs
from stylemill.engine.unet.model import DiffusionModel

UNSOUND = "refining the VAE's decoder on its style became NaN or Inf; lower refine_decoder_lr"


class DecoderCache(Protocol):
    """Refined decoders of one model, as the tensors that differ from the model's own.

    Never needed: what is not found is made again, to the same bytes.
    """

    def get(self, key: str) -> Arrays | None:
        """The tensors that were put under `key`, if they are still there."""

    def put(self, key: str, arrays: Arrays) -> None:
        """Keep the tensors, or do not."""


class RecentDecoders:
    """A DecoderCache in memory: the few used last, since one of Stable Diffusion's size takes 200 MB."""

    def __init__(self, capacity: int = 4) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[str, Arrays] = OrderedDict()

    def get(self, key: str) -> Arrays | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, arrays: Arrays) -> None:
        self._kept[key] = arrays
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)


def by_decoder(inputs: ShardInputs, size: int) -> Iterator[tuple[int | None, list[Batch]]]:
    """The micro-batches that one decoder serves, and the style it is refined on; None and all without refinement.

    The first style of a pair decides. Who shares a batch follows from the manifest rows alone, as in sampling.
    """
    if not inputs.refine_steps:
        yield None, micro_batches(inputs, size)
        return

    def first_style(batch: Batch) -> int:
        return inputs.pairs[batch[0]].styles[0]

    for style, batches in groupby(sorted(micro_batches(inputs, size, by_style=True), key=first_style), first_style):
        yield style, list(batches)


@contextmanager
def refined(
    model: DiffusionModel,
    inputs: ShardInputs,
    style: int | None,
    numerics: Mapping[str, str | int],
    cache: DecoderCache,
) -> Iterator[bool]:
    """Let the VAE decode with the decoder refined on `style` until the block ends; whether that decoder is sound.

    Refined and used in float32, whatever the model's precision. With None nothing changes.
    """
    if style is None:
        yield True
        return
    with own_decoder(model.vae, model.latent_dtype):
        key = f"{inputs.digests[style][:32]}-{_settings_digest(inputs, numerics)[:16]}"
        tensors = cache.get(key)
        if tensors is None:
            image = inputs.pixels[style].to(model.device)  # (H, W, 3) uint8
            target = (image.to(model.latent_dtype) / 127.5 - 1).permute(2, 0, 1)[None]
            latent = inputs.images[style][None] / model.vae.config.scaling_factor
            tensors = refine(model.vae, latent, target, inputs.refine_steps, inputs.refine_rate)
            cache.put(key, tensors)
        model.vae.decoder.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, strict=False)
        yield all(parameter.isfinite().all() for parameter in model.vae.decoder.parameters())


@contextmanager
def own_decoder(vae: Any, dtype: torch.dtype) -> Iterator[None]:
    """Put a copy in `dtype` in the place of the VAE's decoder, which comes back untouched whatever happens."""
    parts = {name: getattr(vae, name) for name in ("post_quant_conv", "decoder") if getattr(vae, name) is not None}
    try:
        for name, part in parts.items():
            setattr(vae, name, copy.deepcopy(part).to(dtype))
        yield
    finally:
        for name, part in parts.items():
            setattr(vae, name, part)


def refine(vae: Any, latent: Tensor, image: Tensor, steps: int, rate: float) -> Arrays:
    """Fine-tune `vae.decoder`, in place, to decode `latent` (1, C, h, w) to `image` (1, 3, H, W) in [−1, 1].

    Adam on the mean |difference|, the decoder alone; returns its tensors that changed, by name.
    """
    before = {name: tensor.clone() for name, tensor in vae.decoder.state_dict().items()}
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=rate)
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


def _settings_digest(inputs: ShardInputs, numerics: Mapping[str, str | int]) -> str:
    """What a refined decoder depends on besides its style and the model."""
    settings = {"steps": inputs.refine_steps, "rate": inputs.refine_rate, **numerics}
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
