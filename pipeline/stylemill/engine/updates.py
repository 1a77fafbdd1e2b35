"""Updates of latents: Adam steps, and AdaIN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adam_step(z: Tensor, gradient: Tensor, moments: Tensor, count: int, learning_rate: float) -> tuple[Tensor, Tensor]:
    """One step of Adam (betas 0.9 and 0.999, eps 1e-8): the new z, and its moments (2, …); `count` starts at 1.

    This is torch.optim.Adam in functional form: the moments are part of a checkpoint, and a micro-batch needs no
    optimizer object for each of its pairs.
    """
    first = moments[0].lerp(gradient, 1 - 0.9)
    second = moments[1] * 0.999 + gradient * gradient * (1 - 0.999)
    root = second.sqrt() / (1 - 0.999**count) ** 0.5 + 1e-8
    return z - learning_rate / (1 - 0.9**count) * first / root, torch.stack([first, second])


def adain(z: Tensor, styles: Sequence[Sequence[Tensor]]) -> Tensor:
    """Give each pair of z (B, C, h, w) the channel means and standard deviations of its style latents (C, h, w).

    Several styles of a pair are pooled over all their positions. AdaIN: Huang and Belongie, arXiv 1703.06868.
    """
    return torch.stack([_adain(latent, own_styles) for latent, own_styles in zip(z, styles, strict=True)])


def _adain(latent: Tensor, styles: Sequence[Tensor]) -> Tensor:
    pooled = torch.cat([style.flatten(1) for style in styles], dim=1)  # (C, all style positions)
    flat = latent.flatten(1)  # (C, h * w)
    normal = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6)
    return (normal * pooled.std(1, keepdim=True) + pooled.mean(1, keepdim=True)).view_as(latent)
