"""Controllable synthesis: the masks of a pair, and which style tokens each target token may attend to by their labels.

A label image is resized to the latent grid, and from there to a layer's grid, by nearest neighbour, as torch's
F.interpolate(mode="nearest") does: position i of n takes pixel floor(i · N / n) of N.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stylemill.config.inputs import label_name
from stylemill.engine.attention import Layer
from stylemill.engine.inputs import Pair
from stylemill.engine.state import PairInputs, ShardInputs
from stylemill.images.input_image import LabelImage

MaskKey = tuple[str, tuple[int, int]]  # the name of a mask and a latent grid (h, w)


def masks_problem(pair: Pair) -> str | None:
    """Why the masks of a pair cannot be used; None if they can, or if the pair has none."""
    if pair.content_mask is None and not pair.style_masks:
        return None
    if pair.content_mask is None or len(pair.style_masks) != len(pair.styles):
        given = f"{int(pair.content_mask is not None)} content mask and {len(pair.style_masks)} style masks"
        return f"has {given} for {len(pair.styles)} styles; give a content mask and one mask for each style, or none"
    if any(mask.labels is None for mask in (pair.content_mask, *pair.style_masks)):
        return "a mask of this pair could not be read"
    return None


def masks_on_grids(pair: Pair, grids: Sequence[tuple[int, int]]) -> list[tuple[MaskKey, LabelImage]]:
    """The content mask and the style masks of a pair, each with its grid of `grids`; none if one is missing."""
    if pair.content_mask is None or len(pair.style_masks) != len(pair.styles):
        return []
    masks = (pair.content_mask, *pair.style_masks)
    return [((mask.name, grid), mask) for mask, grid in zip(masks, grids, strict=True)]


def unique_masks(masks_of: Iterable[Iterable[tuple[MaskKey, LabelImage]]]) -> dict[MaskKey, LabelImage]:
    """Each mask of a shard once. Raises ValueError if two different masks have the same name."""
    unique: dict[MaskKey, LabelImage] = {}
    for key, mask in (item for masks in masks_of for item in masks):
        first = unique.setdefault(key, mask)
        if first is not mask and not np.array_equal(first.labels, mask.labels):  # type: ignore[arg-type]
            raise ValueError(f"two different masks of a shard have the name {mask.name!r}; give each its own name")
    return unique


def resize_labels(mask: LabelImage, grid: tuple[int, int]) -> Tensor:
    """The labels of a mask on a latent grid (h, w), int32; −1, no label, everywhere if the mask could not be read."""
    if mask.labels is None:
        return torch.full(grid, -1, dtype=torch.int32)
    return nearest(torch.from_numpy(np.ascontiguousarray(mask.labels, np.int32)), grid)


def nearest(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize labels (H, W) to `grid` (h, w), in integers: a float32 cannot hold every label."""
    rows, columns = (
        torch.arange(small, device=labels.device) * large // small
        for small, large in zip(grid, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def missing_label(inputs: ShardInputs, pair: PairInputs, layers: Sequence[Layer]) -> str | None:
    """Why a pair cannot be sampled because a label of its content mask is in none of its style masks; None if it can.

    Checked on the grid of each layer, from fine to coarse.
    """
    levels = sorted({layer.level for layer in layers})
    for level in levels if pair.masks else ():
        target, style = _token_labels(inputs, pair, level)
        missing = sorted({label for label in target.tolist() if label >= 0} - set(style.tolist()))
        if missing:
            height, width = (side >> level for side in pair.shape[1:])
            lost = "" if level == levels[0] else f"; they are lost when the masks are resized to {width}×{height}"
            names = ", ".join(map(label_name, missing))
            return (
                f"label {names} of content_mask is in none of this pair's style masks on the {width}×{height} grid of "
                f"an attention layer{lost}: draw it, or draw it larger, in a style mask, or remove it from content_mask"
            )
    return None


def attention_masks(inputs: ShardInputs, pairs: Sequence[PairInputs], levels: Sequence[int]) -> list[Tensor | None]:
    """For layers at `levels`, which style tokens each target token may attend to: (B, 1, N, Ns) bool, None for all.

    A target token attends to the style tokens with its own label, a target token without a label (−1) to all of them.
    Style tokens without a label are attended to by target tokens without one only. Layers of one level share a tensor.
    The tensors are made for each micro-batch and not kept: at 64 × 64 latents, one has 4096² bools, which is 16 MiB
    for each pair and style, while the labels on the latent grid take 16 KiB.
    """
    if not pairs or not pairs[0].masks:
        return [None] * len(levels)
    by_level = {
        level: torch.stack([_allowed(*_token_labels(inputs, pair, level)) for pair in pairs])[:, None]
        for level in set(levels)
    }
    return [by_level[level] for level in levels]


def _token_labels(inputs: ShardInputs, pair: PairInputs, level: int) -> tuple[Tensor, Tensor]:
    """Labels of the target's tokens (N,), and of all styles' tokens (Ns,) in the order in which K and V are joined."""
    target, *styles = (_at_level(labels, level) for labels in (inputs.masks[mask] for mask in pair.masks))
    return target, torch.cat(styles)


@lru_cache(maxsize=256)  # resized once a shard, and not for each micro-batch of each step; keyed by the tensor itself
def _at_level(labels: Tensor, level: int) -> Tensor:
    """The labels on a latent grid (h, w), resized to the grid of layers at `level`, flat."""
    return nearest(labels, (labels.shape[0] >> level, labels.shape[1] >> level)).flatten()


def _allowed(target: Tensor, style: Tensor) -> Tensor:
    allowed = (target[:, None] == style) | (target[:, None] < 0)
    # Only an excluded pair, which keeps its slot, can lack a label: a token that may attend to nothing would give NaN.
    return allowed | ~allowed.any(1, keepdim=True)
