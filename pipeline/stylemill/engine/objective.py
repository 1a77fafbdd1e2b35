"""The objective of attention distillation (arXiv 2502.20235): features of images, and the losses' gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.engine.attention import Target
from stylemill.engine.batching import Batch, micro_batches
from stylemill.engine.calls import UNetCalls
from stylemill.engine.masks import attention_masks
from stylemill.engine.state import ShardInputs, styles_and_contents
from stylemill.engine.unet.text import Text
from stylemill.errors import ModelError

# The gradient of a mean over a million elements is about 1e-6, below fp16's normal range. Division of the fp32 gradient
# by a power of two is exact.
LOSS_SCALE = {torch.float16: 2.0**16}
LOSS_SCALE_STEP = 16.0  # by which the scale of a pair is divided while its gradient overflows


def all_finite(x: Tensor) -> Tensor:
    """Whether the latents or gradient of each pair (B, C, h, w) have neither NaN nor Inf -> (B,)."""
    return x.isfinite().flatten(1).all(1)


@dataclass(frozen=True)
class Features:
    """Features of a block's images at one timestep; one dictionary, by image number, for each layer."""

    style_kv: list[dict[int, tuple[Tensor, Tensor]]]  # each (heads, tokens, head_dim)
    content_q: list[dict[int, Tensor]]
    levels: list[int]  # of the layers

    def targets(self, inputs: ShardInputs, batch: Batch) -> list[Target]:
        """The target of each layer for a micro-batch. Several styles of a pair are joined along their tokens."""
        pairs = [inputs.pairs[index] for index in batch]
        targets = []
        masks = attention_masks(inputs, pairs, self.levels)
        for kv, q, allowed in zip(self.style_kv, self.content_q, masks, strict=True):
            k, v = (
                torch.stack([torch.cat([kv[style][part] for style in pair.styles], dim=1) for pair in pairs])
                for part in (0, 1)
            )
            contents = [q[pair.content] for pair in pairs if pair.content is not None and pair.uses_content]
            targets.append(Target(k, v, torch.stack(contents) if contents else None, allowed))
        return targets


class Objective:
    """L_AD + λ L_content of each pair at the chosen layers, and its gradient with respect to the latents.

    With `reuse_prediction`, the passes of gradients compute ε too; otherwise None is in its place.
    Raises ModelError when `layer_weights` of the settings does not have one number for each layer.
    """

    def __init__(self, calls: UNetCalls, settings: Sampling, micro_batch: int, passes: Counter[str]) -> None:
        self.calls = calls
        self.layer_weights = settings.layer_weights or (1.0,) * len(calls.layers)
        self.query_scale = settings.query_scale
        self.with_noise = settings.reuse_prediction
        self.micro_batch = micro_batch
        self.passes = passes
        if len(self.layer_weights) != len(calls.layers):
            raise ModelError(
                f"sampling.layer_weights has {len(self.layer_weights)} numbers for {len(calls.layers)} layers"
            )

    @torch.no_grad()
    def extract(
        self, inputs: ShardInputs, batches: Sequence[Batch], latents: dict[int, Tensor], timestep: int
    ) -> Features:
        """Extract the features that the pairs of `batches` need: K and V of styles, Q of contents.

        `latents` has the noised or clean latents (C, h, w) of each image by its number. An image takes one UNet pass,
        even if several pairs use it, or use it both as style and as content.
        """
        styles, contents = styles_and_contents(inputs.pairs[index] for batch in batches for index in batch)
        layers = self.calls.layers
        features = Features([{} for _ in layers], [{} for _ in layers], [layer.level for layer in layers])
        numbers = list(latents)
        for batch in micro_batches([latent.shape for latent in latents.values()], self.micro_batch):
            images = [numbers[place] for place in batch]
            self.passes["feature"] += len(images)
            stacked = torch.stack([latents[image] for image in images])
            for layer, activations in enumerate(self.calls.activations(stacked, timestep, inputs.null_text)):
                for place, image in enumerate(images):
                    # Copies: a view would keep q, k and v of the whole batch in memory.
                    if image in styles:
                        features.style_kv[layer][image] = activations.k[place].clone(), activations.v[place].clone()
                    if image in contents:
                        features.content_q[layer][image] = activations.q[place].clone()
        return features

    def gradient(
        self, z: Tensor, timestep: int, null_text: Text, weights: Tensor, targets: list[Target]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """∂(L_AD + λ L_content)/∂z of each pair, which pairs' gradients overflowed, and ε; z (B, C, h, w), λ (B,).

        The losses of the pairs are summed, not averaged: a pair's gradient is the same at every batch size. With fp16
        weights the losses are scaled. A gradient has overflowed (B,) if it is not finite although the pair's loss is.
        Where the loss is NaN or Inf, so is the gradient. Nothing waits for the device.
        """
        scales = torch.full_like(weights, self.loss_scale)
        gradient, losses, epsilon = self._scaled_gradient(z, timestep, null_text, weights, targets, scales)
        return gradient, ~all_finite(gradient) & losses.isfinite() & (self.loss_scale > 1), epsilon

    def gradient_in_range(
        self,
        z: Tensor,
        timestep: int,
        null_text: Text,
        weights: Tensor,
        targets: list[Target],
        excluded: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, float], Tensor | None]:
        """As `gradient`, where overflowed pairs get a smaller loss scale, down to 1; each one's by its place in z.

        The pass is repeated until no gradient overflows, except those at the `excluded` places. The other pairs keep
        their gradients of the first pass; ε is that of the first pass. This waits for the device.
        """
        scale, lowered_scales = self.loss_scale, dict[int, float]()
        scales = torch.full_like(weights, scale)
        gradient, overflowed, epsilon = self.gradient(z, timestep, null_text, weights, targets)
        overflowed[list(excluded)] = False
        while scale > 1 and overflowed.any():
            scale /= LOSS_SCALE_STEP
            scales = torch.where(overflowed, scale, scales)
            lowered_scales |= {place: scale for place, again in enumerate(overflowed.tolist()) if again}
            repeated, *_ = self._scaled_gradient(z, timestep, null_text, weights, targets, scales)
            gradient = torch.where(overflowed[:, None, None, None], repeated, gradient)
            overflowed &= ~all_finite(repeated)
        return gradient, lowered_scales, epsilon

    @property
    def loss_scale(self) -> float:
        """By which losses are multiplied in a backward pass."""
        return LOSS_SCALE.get(self.calls.model.unet.dtype, 1.0)

    def _scaled_gradient(
        self, z: Tensor, timestep: int, null_text: Text, weights: Tensor, targets: list[Target], scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradient, loss and ε of each pair, whose losses have the `scales` (B,) in the backward pass."""
        self.passes["gradient"] += len(z)
        gradient, losses, epsilon = self.calls.gradient(
            z, timestep, null_text, targets, weights, self.layer_weights, self.query_scale, scales, self.with_noise
        )
        # The slope of |a − b| at NaN is 0: the pair would be sampled on without guidance, and look like a good one.
        return torch.where(losses.isfinite()[:, None, None, None], gradient, torch.nan), losses, epsilon
