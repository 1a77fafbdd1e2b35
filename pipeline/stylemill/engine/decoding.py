"""Decoding the latents of a shard: by the VAE's decoder, or by one that is refined on each pair's style."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor

from stylemill.config.sampling import Tiling
from stylemill.engine.memory import translate_out_of_memory
from stylemill.engine.state import PairFailure, SampleState, ShardInputs
from stylemill.engine.unet.decoder_refinement import DecoderCache, refined_decoder
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.unet.tiling import circular_padding
from stylemill.errors import DeviceMemoryError
from stylemill.images.input_image import Pixels

REFINEMENT_FAILED = (
    "refining the VAE's decoder on the pair's first style gave NaN or Inf weights; lower sampling.refine_decoder_lr"
)
_log = logging.getLogger(__name__)


class ImageDecoder:
    """Decodes latents by the VAE, one image at a time, so that an image does not depend on others of its shard.

    `in_tiles` becomes True for good when a whole image does not fit into the memory: from then on images larger than
    the VAE's tile are decoded in tiles that overlap.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.in_tiles = False

    def decode(self, latents: Tensor, tiling: Tiling) -> Pixels | None:
        """Latents (C, h, w) -> image (H, W, 3) uint8; None if the decoder gives NaN or Inf. Raises DeviceMemoryError.

        An image that tiles (`tiling`) is never decoded in tiles: its opposite edges would no longer fit together.
        """
        splits = tiling == "none" and self.model.has_several_tiles(latents)
        advice = "take a smaller image.size"
        if tiling != "none":
            advice += f" or sampling.tiling: none (an image with tiling {tiling} cannot be decoded in tiles)"
        if not (self.in_tiles and splits):
            try:
                return self._decode(latents, False, advice)
            except DeviceMemoryError:
                if not splits:
                    raise
        image = self._decode(latents, True, advice)
        if not self.in_tiles:
            _log.warning("out of memory: from now on images are decoded in tiles")
            self.in_tiles = True
        return image

    def _decode(self, latents: Tensor, in_tiles: bool, advice: str) -> Pixels | None:
        decode = partial(self.model.decode_image, latents, in_tiles)
        return translate_out_of_memory(decode, f"decoding an image{' in tiles' * in_tiles}", advice)


def decode_shard(
    decoder: ImageDecoder, state: SampleState, numerics: Mapping[str, str | int], decoders: DecoderCache
) -> list[Pixels | None]:
    """The image of each pair, (H, W, 3) uint8; None where the pair failed.

    A pair whose decoder, or image, has NaN or Inf is excluded in `state`. Raises DeviceMemoryError.
    """
    images: dict[int, Pixels | None] = {}
    inputs, model, in_tiles = state.inputs, decoder.model, decoder.in_tiles
    for style, pairs in _pairs_by_style(state).items():
        with (
            _decoder_for(model, inputs, style, numerics, decoders) as finite,
            circular_padding(inputs.tiling, model.vae.decoder),
        ):
            if not finite:
                state.excluded |= dict.fromkeys(pairs, PairFailure("decode", REFINEMENT_FAILED))
                continue
            for pair in pairs:
                images[pair] = decoder.decode(state.latents_of[pair], inputs.tiling)
                if images[pair] is None:
                    state.excluded[pair] = PairFailure("decode", _not_finite(model, refined=style is not None))
    if decoder.in_tiles and not in_tiles:  # all images of a shard are decoded in one way, as its numerics say
        return decode_shard(decoder, state, numerics, decoders)
    return [images.get(pair) for pair in range(len(state.latents_of))]


def _not_finite(model: DiffusionModel, refined: bool) -> str:
    if refined:
        return "the VAE's decoder, refined on the pair's first style, gave NaN or Inf; lower sampling.refine_decoder_lr"
    if model.vae.dtype == torch.float16:
        return "the VAE's decoder gave NaN or Inf in float16; set model.dtype to bfloat16 or float32"
    return "the VAE's decoder gave NaN or Inf; lower sampling.learning_rate, or check the weights of the VAE"


def _pairs_by_style(state: SampleState) -> dict[int | None, list[int]]:
    """The pairs that did not fail, by the style that their decoder is refined on: their first; None: no refinement."""
    failures, pairs_of = state.failures, dict[int | None, list[int]]()
    for number, pair in enumerate(state.inputs.pairs):
        if number not in failures:
            pairs_of.setdefault(pair.styles[0] if state.inputs.refine_steps else None, []).append(number)
    return pairs_of


@contextmanager
def _decoder_for(
    model: DiffusionModel,
    inputs: ShardInputs,
    style: int | None,
    numerics: Mapping[str, str | int],
    cache: DecoderCache,
) -> Iterator[bool]:
    if style is None:
        yield True
        return
    others = ("micro_batch", "kernels", "decoding")  # of the UNet, and of whole images
    relevant = {name: value for name, value in numerics.items() if name not in others}
    settings = {"steps": inputs.refine_steps, "rate": inputs.refine_rate, **relevant}
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    key = f"{inputs.digests[style][:32]}-{digest[:16]}"
    image, pixels = inputs.images[style], inputs.pixels[style]
    with refined_decoder(model, image, pixels, inputs.refine_steps, inputs.refine_rate, key, cache) as finite:
        yield finite
