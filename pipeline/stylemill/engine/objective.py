"""The objective of attention distillation: features of images, losses against them, and the losses' gradient.

Equations are those of arXiv 2502.20235.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.engine.attention import Activations, Layer, Target, ideal_attention, record_attention
from stylemill.engine.batching import Batch, micro_batches
from stylemill.engine.masks import attention_masks
from stylemill.engine.state import ShardInputs
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.unet.text import Text
from stylemill.errors import ModelError

# The gradient of a mean over a million elements is about 1e-6, below fp16's normal range. Division of the fp32 gradient
# by a power of two is exact.
LOSS_SCALE = {torch.float16: 2.0**16}
LOSS_SCALE_STEP = 16.0  # by which the scale of a pair is divided while its gradient overflows


def ad_loss(
    q: Tensor,
    out: Tensor,
    style_k: Tensor,
    style_v: Tensor,
    query_scale: float = 1.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """L_AD of one layer (eq. 4): distance of the attention output to the ideal attention -> (B,)."""
    return _mean_l1(out, ideal_attention(q, style_k, style_v, query_scale, allowed))


def content_loss(q: Tensor, content_q: Tensor) -> Tensor:
    """L_content of one layer (eq. 5): distance of the queries to the content's queries -> (B,)."""
    return _mean_l1(q, content_q)


def _mean_l1(a: Tensor, b: Tensor) -> Tensor:
    """mean |a − b| of each pair over heads, tokens and channels: (B, heads, N, d) -> (B,).

    Computed in fp32 at least: in half precision, the mean of a million terms would be inexact.
    """
    difference = a - b if a.dtype == torch.float64 else a.float() - b.float()
    return difference.abs().mean(dim=(1, 2, 3))


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


class LossGradient(NamedTuple):
    """The gradient (B, C, h, w) of the losses.

    `lowered_scales` has the loss scale of each place in the batch whose gradient overflowed at the usual one.
    """

    gradient: Tensor
    lowered_scales: dict[int, float]


class Objective:
    """L_AD + λ L_content of each pair at the chosen layers, and its gradient with respect to the latents.

    Raises ModelError when `layer_weights` of the settings does not have one number for each layer.
    """

    def __init__(
        self,
        model: DiffusionModel,
        layers: Sequence[Layer],
        settings: Sampling,
        micro_batch: int,
        passes: Counter[str],
    ) -> None:
        self.model = model
        self.layers = layers
        self.layer_weights = settings.layer_weights or (1.0,) * len(layers)
        self.query_scale = settings.query_scale
        self.micro_batch = micro_batch
        self.passes = passes
        if len(self.layer_weights) != len(layers):
            raise ModelError(f"sampling.layer_weights has {len(self.layer_weights)} numbers for {len(layers)} layers")

    @torch.no_grad()
    def extract(
        self, inputs: ShardInputs, batches: Sequence[Batch], latents: dict[int, Tensor], timestep: int
    ) -> Features:
        """Extract the features that the pairs of `batches` need: K and V of styles, Q of contents.

        `latents` has the noised or clean latents (C, h, w) of each image by its number. An image takes one UNet pass,
        even if several pairs use it, or use it both as style and as content.
        """
        pairs = [inputs.pairs[index] for batch in batches for index in batch]
        contents = {pair.content for pair in pairs if pair.uses_content}
        styles = {style for pair in pairs for style in pair.styles}
        features = Features(
            [{} for _ in self.layers], [{} for _ in self.layers], [layer.level for layer in self.layers]
        )
        numbers = list(latents)
        for batch in micro_batches([latent.shape for latent in latents.values()], self.micro_batch):
            images = [numbers[place] for place in batch]
            self.passes["feature"] += len(images)
            stacked = torch.stack([latents[image] for image in images])
            for layer, activations in enumerate(self.activations(stacked, timestep, inputs.null_text)):
                for place, image in enumerate(images):
                    # Copies: a view would keep q, k and v of the whole batch in memory.
                    if image in styles:
                        features.style_kv[layer][image] = activations.k[place].clone(), activations.v[place].clone()
                    if image in contents:
                        features.content_q[layer][image] = activations.q[place].clone()
        return features

    def gradient(
        self,
        z: Tensor,
        timestep: int,
        null_text: Text,
        weights: Tensor,
        targets: list[Target],
        excluded: Sequence[int] = (),
    ) -> LossGradient:
        """∂(L_AD + λ L_content)/∂z of each pair; z (B, C, h, w), λ = `weights` (B,).

        The losses of the pairs are summed, not averaged: a pair's gradient is the same at every batch size. With fp16
        weights the losses are scaled. Where the gradient of a pair overflows although its losses are finite, the pass
        is repeated with a smaller scale for that pair, down to 1; the others keep their gradients of the first pass.
        It is not repeated for the `excluded` places in the batch.
        Where the losses are NaN or Inf, so is the gradient.
        """
        scale = LOSS_SCALE.get(self.model.unet.dtype, 1.0)
        scales = torch.full_like(weights, scale)
        gradient, losses = self._scaled_gradient(z, timestep, null_text, weights, targets, scales)
        overflowed = ~all_finite(gradient) & losses.isfinite()
        if excluded:
            overflowed[list(excluded)] = False
        lowered_scales: dict[int, float] = {}
        while scale > 1 and overflowed.any():  # this waits for the device; without a scale nothing is waited for
            scale /= LOSS_SCALE_STEP
            scales = torch.where(overflowed, scale, scales)
            lowered_scales |= {place: scale for place, again in enumerate(overflowed.tolist()) if again}
            repeated, _ = self._scaled_gradient(z, timestep, null_text, weights, targets, scales)
            gradient = torch.where(overflowed[:, None, None, None], repeated, gradient)
            overflowed &= ~all_finite(repeated)
        # The slope of |a − b| at NaN is 0: the pair would be sampled on without guidance, and look like a good one.
        return LossGradient(torch.where(losses.isfinite()[:, None, None, None], gradient, torch.nan), lowered_scales)

    def _scaled_gradient(
        self, z: Tensor, timestep: int, null_text: Text, weights: Tensor, targets: list[Target], scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient and the loss of each pair, whose losses have the `scales` (B,) in the backward pass."""
        self.passes["gradient"] += len(z)
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            ad = content = torch.zeros(len(z), dtype=z.dtype, device=z.device)
            layers = self.activations(z, timestep, null_text)
            for activations, target, weight in zip(layers, targets, self.layer_weights, strict=True):
                style = target.style_k, target.style_v
                ad = ad + weight * ad_loss(activations.q, activations.out, *style, self.query_scale, target.allowed)
                if target.content_q is not None:
                    content = content + weight * content_loss(activations.q, target.content_q)
            losses = ad + weights * content
            (gradient,) = torch.autograd.grad((losses * scales).sum(), z)
        return gradient / scales[:, None, None, None], losses.detach()

    def activations(self, z: Tensor, timestep: int, null_text: Text) -> list[Activations]:
        """What each layer computes of z (B, C, h, w)."""
        with record_attention(self.layers) as activations:
            self.model.predict_noise(z, timestep, null_text)
        return activations
