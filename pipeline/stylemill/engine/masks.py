"""Controllable synthesis: which style tokens a target token may attend to, by the labels of the pair's masks.

A label image is resized to the latent grid and on to a layer's by nearest neighbour, as torch's
F.interpolate(mode="nearest") does: position i of n takes pixel floor(i · N / n) of N.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from stylemill.config.inputs import label_name
from stylemill.engine.attention import Layer
from stylemill.engine.inputs import Pair
from stylemill.engine.state import PairInputs, ShardInputs
from stylemill.images.input_image import LabelImage


def masks_problem(pair: Pair) -> str | None:
    """Why the masks of a pair cannot be used as they are given; None where they can, or where there are none."""
    if pair.content_mask is None and not pair.style_masks:
        return None
    if pair.content_mask is None or len(pair.style_masks) != len(pair.styles):
        have = f"{int(pair.content_mask is not None)} content mask and {len(pair.style_masks)} style masks"
        return f"has {have} for {len(pair.styles)} styles; give a content mask and one mask for each style, or none"
    if any(mask.labels is None for mask in (pair.content_mask, *pair.style_masks)):
        return "a mask of this pair could not be read"
    return None


Placed = tuple[str, tuple[int, int]]  # a mask by its name, on a latent grid (h, w)


def placed_masks(pair: Pair, grids: Sequence[tuple[int, int]]) -> list[tuple[Placed, LabelImage]]:
    """The masks of a pair, for the grids of its latents and of each style; none where one is lacking."""
    if pair.content_mask is None or len(pair.style_masks) != len(pair.styles):
        return []
    masks = (pair.content_mask, *pair.style_masks)
    return [((mask.name, grid), mask) for mask, grid in zip(masks, grids, strict=True)]


def unique_masks(masks_of: Iterable[Iterable[tuple[Placed, LabelImage]]]) -> dict[Placed, LabelImage]:
    """Each mask of a shard once. Raises ValueError where two different ones have one name."""
    found: dict[Placed, LabelImage] = {}
    for key, mask in (placed for own in masks_of for placed in own):
        known = found.setdefault(key, mask)
        if known is not mask and not np.array_equal(known.labels, mask.labels):  # type: ignore[arg-type]
            raise ValueError(f"two different masks of a shard have the name {mask.name!r}")
    return found


def to_grid(mask: LabelImage, grid: tuple[int, int]) -> Tensor:
    """The labels of a mask on a latent grid (h, w), int32. An unreadable mask stands in as unlabelled."""
    if mask.labels is None:
        return torch.full(grid, -1, dtype=torch.int32)
    return nearest(torch.from_numpy(np.ascontiguousarray(mask.labels, np.int32)), grid)


def nearest(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W) -> (h, w), without a detour over floats: labels are names, not amounts."""
    rows, columns = (
        torch.arange(few, device=labels.device) * many // few for few, many in zip(grid, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def absent_label(inputs: ShardInputs, pair: PairInputs, layers: Sequence[Layer]) -> str | None:
    """Names the first label of the target that no style token bears, at the first layer's grid where that is so."""
    levels = sorted({layer.level for layer in layers})
    for level in levels if pair.masks else ():
        target, style = _tokens(inputs, pair, level)
        missing = sorted({label for label in target.tolist() if label >= 0} - set(style.tolist()))
        if missing:
            height, width = (side >> level for side in pair.shape[1:])
            where = "" if level == levels[0] else f"; they are lost when the masks are resized to {width}×{height}"
            names = ", ".join(map(label_name, missing))
            return (
                f"label {names} of content_mask stands in none of this pair's style masks on the {width}×{height} grid "
                f"of an attention layer{where}: draw it (larger) in a style mask, or take it out of content_mask"
            )
    return None


def attention_masks(inputs: ShardInputs, pairs: Sequence[PairInputs], levels: Sequence[int]) -> list[Tensor | None]:
    """For layers at `levels`, which style tokens each target token may attend to: (B, 1, N, Ns) bool, None for all.

    A target token attends to the style tokens of its own label, an unlabelled one (−1) to all, and nobody but those
    to an unlabelled style token. Layers of one level share a tensor. It is made anew for each micro-batch: at 64 × 64
    latents it holds 4096² bools, 16 MiB a pair and style, while the labels that it follows from take 16 KiB.
    """
    if not pairs or not pairs[0].masks:
        return [None] * len(levels)
    of_level = {
        level: torch.stack([_allowed(*_tokens(inputs, pair, level)) for pair in pairs])[:, None]
        for level in set(levels)
    }
    return [of_level[level] for level in levels]


def _tokens(inputs: ShardInputs, pair: PairInputs, level: int) -> tuple[Tensor, Tensor]:
    """Labels of the target's tokens (N,) and of all styles' tokens, joined as K and V are (Ns,)."""
    target, *styles = (
        nearest(labels, (labels.shape[0] >> level, labels.shape[1] >> level)).flatten()
        for labels in (inputs.masks[mask] for mask in pair.masks)
    )
    return target, torch.cat(styles)


def _allowed(target: Tensor, style: Tensor) -> Tensor:
    allowed = (target[:, None] == style) | (target[:, None] < 0)
    # A pair that lacks a label is failed from the start and keeps its slot: a row of nothing would make it NaN.
    return allowed | ~allowed.any(1, keepdim=True)
