"""Decoding the latents of a shard: by the VAE's decoder, or by one that is refined on each pair's style."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import groupby

import torch

from stylemill.engine.batching import Batch, micro_batches
from stylemill.engine.state import SampleState, ShardInputs
from stylemill.engine.unet.decoder_refinement import DecoderCache, refined_decoder
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.unet.tiling import circular_padding
from stylemill.images.input_image import Pixels

REFINEMENT_FAILED = (
    "refining the VAE's decoder on the pair's first style gave NaN or Inf weights; lower sampling.refine_decoder_lr"
)


def decode_shard(
    model: DiffusionModel,
    state: SampleState,
    micro_batch: int,
    numerics: Mapping[str, str | int],
    decoders: DecoderCache,
) -> list[Pixels | None]:
    """The image of each pair, (H, W, 3) uint8; None where the pair failed.

    A pair whose style cannot be used to refine the decoder is excluded in `state`.
    """
    images: dict[int, Pixels] = {}
    failures = state.failures
    for style, batches in _batches_by_style(state.inputs, micro_batch):
        pairs = [pair for batch in batches for pair in batch]
        if all(pair in failures for pair in pairs):  # for example, because the style could not be read
            continue
        with (
            _decoder_for(model, state.inputs, style, numerics, decoders) as finite,
            circular_padding(state.inputs.tiling, model.vae.decoder),
        ):
            if not finite:
                state.excluded |= {pair: REFINEMENT_FAILED for pair in pairs if pair not in failures}
                continue
            for batch in batches:
                decoded = model.decode_image(torch.stack([state.latents_of[pair] for pair in batch]))
                images |= zip(batch, decoded, strict=True)
    return [None if pair in failures else images.get(pair) for pair in range(len(state.latents_of))]


def _batches_by_style(inputs: ShardInputs, size: int) -> Iterator[tuple[int | None, list[Batch]]]:
    """Each style that a decoder is refined on and the micro-batches that it decodes; None and all without refinement.

    The first style of a pair counts. As in sampling, micro-batches follow from the manifest rows alone.
    """
    kinds = inputs.kinds()
    if not inputs.refine_steps:
        yield None, micro_batches(kinds, size)
        return

    def first_style(batch: Batch) -> int:
        return inputs.pairs[batch[0]].styles[0]

    by_style = [
        None if kind is None else (pair.styles[0], kind) for pair, kind in zip(inputs.pairs, kinds, strict=True)
    ]
    for style, batches in groupby(sorted(micro_batches(by_style, size), key=first_style), first_style):
        yield style, list(batches)


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
    settings = {"steps": inputs.refine_steps, "rate": inputs.refine_rate, **numerics}
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    key = f"{inputs.digests[style][:32]}-{digest[:16]}"
    image, pixels = inputs.images[style], inputs.pixels[style]
    with refined_decoder(model, image, pixels, inputs.refine_steps, inputs.refine_rate, key, cache) as finite:
        yield finite
