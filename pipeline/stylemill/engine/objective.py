"""Features of a block's images, the gradient they pull a latent along, and the two small laws applied to latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.engine.attention import Layer, Reading, Target, reading
from stylemill.engine.batching import Batch, uses_content
from stylemill.engine.losses import ad_loss, content_loss
from stylemill.engine.masks import attention_masks
from stylemill.engine.state import ShardInputs
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.unet.text import Text
from stylemill.errors import ModelError

# The gradient of a mean over a million elements is about 1e-6, below fp16's normal range; a power of two is undone
# exactly on the fp32 gradient.
LOSS_SCALE = {torch.float16: 2.0**16}


@dataclass(frozen=True)
class Features:
    """Features at one timestep, by layer and image: K, V of styles and Q of contents, each (heads, tokens, dim)."""

    style_kv: list[dict[int, tuple[Tensor, Tensor]]]
    content_q: list[dict[int, Tensor]]
    levels: list[int]  # of the layers

    def targets(self, inputs: ShardInputs, batch: Batch) -> list[Target]:
        """The targets of a micro-batch, layer by layer. Several styles of a pair are joined along their tokens."""
        pairs = [inputs.pairs[index] for index in batch]
        found = []
        allowed = attention_masks(inputs, pairs, self.levels)
        for kv, q, may in zip(self.style_kv, self.content_q, allowed, strict=True):
            k, v = (
                torch.stack([torch.cat([kv[style][part] for style in pair.styles], dim=1) for pair in pairs])
                for part in (0, 1)
            )
            contents = [q[pair.content] for pair in pairs if pair.content is not None and uses_content(pair)]
            found.append(Target(k, v, torch.stack(contents) if contents else None, may))
        return found


@dataclass(frozen=True)
class LossGradient:
    """Where the losses pull z: their gradient (B, C, h, w), and the losses, (B, 2): AD, and content or NaN."""

    gradient: Tensor
    losses: Tensor


class Objective:
    """Extracts features once per image and computes per-pair gradients of L_AD + λ L_content against them."""

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
        """Read what the pairs of `batches` need of their images, whose (noised or clean) latents are given.

        An image is read once, whatever the number of its pairs and roles: K and V of styles, Q of contents.
        """
        pairs = [inputs.pairs[index] for batch in batches for index in batch]
        contents = {pair.content for pair in pairs if uses_content(pair)}
        styles = {style for pair in pairs for style in pair.styles}
        features: Features = Features(
            [{} for _ in self.layers], [{} for _ in self.layers], [layer.level for layer in self.layers]
        )
        for images in _alike(latents, self.micro_batch):
            self.passes["feature"] += len(images)
            stacked = torch.stack([latents[image] for image in images])
            for layer, read in enumerate(self._read(stacked, timestep, inputs.null_text)):
                for place, image in enumerate(images):
                    # Copies: a view would keep the q, k and v of the whole batch alive.
                    if image in styles:
                        features.style_kv[layer][image] = read.k[place].clone(), read.v[place].clone()
                    if image in contents:
                        features.content_q[layer][image] = read.q[place].clone()
        return features

    def gradient(
        self, z: Tensor, timestep: int, null_text: Text, weights: Tensor, targets: list[Target]
    ) -> LossGradient:
        """∂(L_AD + λ L_content)/∂z of each pair, z (B, C, h, w), λ = weights (B,).

        Per-pair losses are summed, never averaged over the batch: a pair's gradient is the same at every batch size.
        """
        self.passes["gradient"] += len(z)
        scale = LOSS_SCALE.get(self.model.unet.dtype, 1.0)
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            ad = content = torch.zeros(len(z), dtype=z.dtype, device=z.device)
            readings = self._read(z, timestep, null_text)
            for read, target, weight in zip(readings, targets, self.layer_weights, strict=True):
                style = target.style_k, target.style_v
                ad = ad + weight * ad_loss(read.q, read.out, *style, self.query_scale, target.allowed)
                if target.content_q is not None:
                    content = content + weight * content_loss(read.q, target.content_q)
            (gradient,) = torch.autograd.grad(((ad + weights * content) * scale).sum(), z)
        if targets[0].content_q is None:
            content = torch.full_like(content, torch.nan)
        return LossGradient(gradient / scale, torch.stack([ad, content], dim=1).detach())

    def _read(self, z: Tensor, timestep: int, null_text: Text) -> list[Reading]:
        with reading(self.layers) as readings:
            self.model.predict_noise(z, timestep, null_text)
        return readings


def _alike(latents: dict[int, Tensor], size: int) -> list[list[int]]:
    """Image numbers in lists of at most `size` with latents of one shape."""
    by_shape: dict[torch.Size, list[int]] = {}
    for image, latent in latents.items():
        by_shape.setdefault(latent.shape, []).append(image)
    return [group[i : i + size] for group in by_shape.values() for i in range(0, len(group), size)]


def adam_step(z: Tensor, gradient: Tensor, moments: Tensor, count: int, learning_rate: float) -> tuple[Tensor, Tensor]:
    """One step of Adam (betas 0.9 and 0.999, eps 1e-8): z and its moments (2, …) after step number `count` from 1.

    torch.optim.Adam in functional form: its moments are part of a checkpoint, and pairs need no optimizer each.
    """
    first = moments[0].lerp(gradient, 1 - 0.9)
    second = moments[1] * 0.999 + gradient * gradient * (1 - 0.999)
    root = second.sqrt() / (1 - 0.999**count) ** 0.5 + 1e-8
    return z - learning_rate / (1 - 0.9**count) * first / root, torch.stack([first, second])


def adain(z: Tensor, styles: list[list[Tensor]]) -> Tensor:
    """Give each pair of z (B, C, h, w) the channel means and deviations of its style latents, pooled over styles."""
    return torch.stack([_adain_one(one, own) for one, own in zip(z, styles, strict=True)])


def _adain_one(z: Tensor, styles: list[Tensor]) -> Tensor:
    pooled = torch.cat([style.flatten(1) for style in styles], dim=1)  # (C, all style positions)
    flat = z.flatten(1)
    normal = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6)
    return (normal * pooled.std(1, keepdim=True) + pooled.mean(1, keepdim=True)).view_as(z)
