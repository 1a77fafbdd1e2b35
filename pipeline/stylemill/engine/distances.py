"""Distances of sampled latents to their styles and contents, for the output rows.

Rows of all methods, schedulers, steps and λ can be compared: clean latents are measured at one timestep, with the null
prompt and without weights of layers. The losses of sampling could not: their timesteps and noise differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stylemill.engine.attention import Activations, Target
from stylemill.engine.batching import Batch, Block
from stylemill.engine.calls import ad_loss, content_loss
from stylemill.engine.objective import Objective
from stylemill.engine.sampler import active_batches
from stylemill.engine.state import SampleState, ShardInputs
from stylemill.engine.unet.tiling import circular_padding
from stylemill.engine.windows import Windows

TIMESTEP = 1  # the last one of 50 DDIM steps with "leading" spacing


@dataclass(frozen=True)
class Distances:
    """Distances of one pair, each summed over the layers, and the mean over the windows of a larger output.

    `style_before` and `style` are L_AD (eq. 4) to the pair's styles, before and after sampling. Before is the content
    image, or the initial noise of a pair without one. `content` is L_content (eq. 5), None without a content image.
    """

    style_before: float
    style: float
    content: float | None


def style_inputs(inputs: ShardInputs) -> ShardInputs:
    """The inputs without contents: of their features, all that is needed is in the passes of `measure_distances`."""
    return replace(inputs, pairs=[replace(pair, content=None) for pair in inputs.pairs])


@torch.no_grad()
def measure_distances(
    objective: Objective, state: SampleState, windows: Windows, blocks: Sequence[Block]
) -> list[Distances | None]:
    """The distances of each pair of a state after its last step; None where the pair failed.

    `blocks` are those of `style_inputs(windows.inputs)`. Takes a UNet pass for each style and each pair, one for each
    content of a micro-batch, and one for each pair without a content.
    """
    inputs = style_inputs(windows.inputs)
    sampled = windows.split(state)
    starts = windows.split(replace(state, latents_of=_starts(state.inputs))).latents_of
    found = torch.zeros(len(starts), 3, dtype=starts[0].dtype, device=starts[0].device)
    with circular_padding(windows.tiling, objective.calls.model.unet):
        for block in blocks:
            clean = {image: inputs.images[image] for image in block.images}
            features = objective.extract(inputs, block.batches, clean, TIMESTEP)
            for batch in active_batches(sampled, block):
                before = _activations_of_starts(objective, state.inputs, windows, batch, starts)
                after = _activations(objective, inputs, [sampled.latents_of[pair] for pair in batch])
                layers = zip(features.targets(inputs, batch), before, after, strict=True)
                found[list(batch)] = torch.stack([_layer_distances(*layer) for layer in layers]).sum(0)
    failures = state.failures
    means = torch.stack([found[numbers].mean(0) for numbers in windows.slices]).tolist()
    return [
        None if number in failures else Distances(before, after, None if pair.content is None else content)
        for number, (pair, (before, after, content)) in enumerate(zip(state.inputs.pairs, means, strict=True))
    ]


def _layer_distances(target: Target, before: Activations, after: Activations) -> Tensor:
    """Of each pair at one layer (B, 3): to the styles before and after, to the content."""
    style = target.style_k, target.style_v
    to_style = (ad_loss(one.q, one.out, *style, allowed=target.allowed) for one in (before, after))
    return torch.stack([*to_style, content_loss(after.q, before.q)], dim=1)


def _starts(inputs: ShardInputs) -> list[Tensor]:
    """The latents (C, h, w) of each pair before sampling: of its content, or its initial noise."""
    noise = iter(inputs.starts)
    return [next(noise) if pair.content is None else inputs.images[pair.content] for pair in inputs.pairs]


def _activations_of_starts(
    objective: Objective, inputs: ShardInputs, windows: Windows, batch: Batch, starts: Sequence[Tensor]
) -> list[Activations]:
    """The activations of each pair's start. Pairs of one content share its pass."""
    sources = []
    for number in batch:
        pair, window = windows.windows[number]
        content = inputs.pairs[pair].content
        sources.append((-1 - pair if content is None else content, window))
    unique = dict(zip(sources, batch, strict=True))
    places = [list(unique).index(source) for source in sources]
    layers = _activations(objective, inputs, [starts[number] for number in unique.values()])
    return [Activations(one.q[places], one.k, one.v, one.out[places]) for one in layers]


def _activations(objective: Objective, inputs: ShardInputs, latents: Sequence[Tensor]) -> list[Activations]:
    objective.passes["distance"] += len(latents)
    return objective.calls.activations(torch.stack(list(latents)), TIMESTEP, inputs.null_text)
