"""Outputs larger than a window (MultiDiffusion, arXiv 2302.08113): a step is taken in overlapping windows of the
latents, each a pair of its own to the sampler, and every position then takes the mean of the windows over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from stylemill.config.sampling import Sampling, Tiling
from stylemill.engine.batching import uses_content
from stylemill.engine.state import PairInputs, SampleState, ShardInputs


@dataclass(frozen=True)
class View:
    """One window onto latents (C, h, w). Where tiling lets these begin again at their end, it may reach beyond it."""

    top: int
    left: int
    shape: tuple[int, int]  # (rows, columns)

    def of(self, tensor: Tensor, scale: int = 1) -> Tensor:
        """What the window shows of a tensor (…, h, w), or of one `scale` times as large."""
        rows, columns = (
            (torch.arange(start * scale, (start + length) * scale) % size).to(tensor.device)
            for start, length, size in zip((self.top, self.left), self.shape, tensor.shape[-2:], strict=True)
        )
        return tensor[..., rows[:, None], columns]

    def parts(self, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
        """Where each part of the window lies in latents of `shape`, and where in itself; two an axis if it wraps."""
        for rows, inner_rows in _unwrapped(self.top, self.shape[0], shape[-2]):
            for columns, inner_columns in _unwrapped(self.left, self.shape[1], shape[-1]):
                yield (..., rows, columns), (..., inner_rows, inner_columns)


def _unwrapped(start: int, length: int, size: int) -> list[tuple[slice, slice]]:
    inside = min(length, size - start)
    parts = [(slice(start, start + inside), slice(0, inside))]
    return parts if inside == length else [*parts, (slice(0, length - inside), slice(inside, length))]


def windows_problem(pair: PairInputs, settings: Sampling) -> str | None:
    """Why a pair cannot be made in windows; None where it can, or where it needs none."""
    if settings.window is None or not uses_content(pair) or max(pair.shape[1:]) <= settings.window:
        return None
    return (
        f"window {settings.window}: latents of {pair.shape[2]}×{pair.shape[1]} are made in windows, and these follow no"
        " content; set content_weight: 0, or take a smaller image.size"
    )


class Windows:
    """How the pairs of a shard are cut; a function of their sizes alone. A pair within the window is one, as it is.

    `inputs` are those given, with a pair for every window. `tiling` is what is left of the setting for the UNet: along
    an axis that is cut, the windows wrap around, and a window itself has edges.
    Raises ValueError where tiling would have to be one thing for one pair and another for the next.
    """

    def __init__(self, inputs: ShardInputs, settings: Sampling) -> None:
        self.tiling = _left_to_the_unet(inputs, settings)
        views_of = [_views(pair.shape, settings) for pair in inputs.pairs]
        self.views = [(pair, view) for pair, views in enumerate(views_of) for view in views]
        self.whole = len(self.views) == len(inputs.pairs)
        self.inputs = inputs if self.whole else self._cut_inputs(inputs)
        ends = list(accumulate(map(len, views_of), initial=0))
        self.places = [slice(*limits) for limits in pairwise(ends)]  # of each pair's windows among all

    def _cut_inputs(self, inputs: ShardInputs) -> ShardInputs:
        masks, controls, pairs = list(inputs.masks), list(inputs.controls), []

        def cropped(tensors: list[Tensor], place: int, view: View, scale: int = 1) -> int:
            tensors.append(view.of(tensors[place], scale))
            return len(tensors) - 1

        for place, view in self.views:
            pair = inputs.pairs[place]
            content_mask = tuple(cropped(masks, mask, view) for mask in pair.masks[:1])
            scaled = [(control, inputs.controls[control].shape[-1] // pair.shape[-1]) for control in pair.controls]
            pairs.append(
                replace(
                    pair,
                    shape=(pair.shape[0], *view.shape),
                    content=pair.content if view.shape == pair.shape[1:] else None,
                    masks=(*content_mask, *pair.masks[1:]),
                    controls=tuple(cropped(controls, control, view, scale) for control, scale in scaled),
                )
            )
        return replace(inputs, pairs=pairs, masks=masks, controls=controls)

    def cut(self, state: SampleState) -> SampleState:
        """A state whose pairs are the windows, to take one step with."""
        if self.whole:
            return state
        count, losses = len(self.views), state.losses
        return replace(
            state,
            inputs=self.inputs,
            latents_of=[view.of(state.latents_of[pair]) for pair, view in self.views],
            lost_at=state.lost_at.new_full((count,), -1),
            losses=losses.new_full((count, *losses.shape[1:]), torch.nan),
            excluded={
                place: state.excluded[pair] for place, (pair, _) in enumerate(self.views) if pair in state.excluded
            },
        )

    def join(self, work: SampleState, state: SampleState) -> None:
        """Put the step that the windows have taken back into the state that they were cut from."""
        if self.whole:
            return
        for pair, places in enumerate(self.places):
            lost = (work.lost_at[places] >= 0).any()
            newly = lost & (state.lost_at[pair] < 0)
            state.lost_at[pair] = torch.where(newly, state.step, state.lost_at[pair])
            views = [view for _, view in self.views[places]]
            state.latents_of[pair] = torch.where(lost, 0, _mean(state.latents_of[pair], views, work.latents_of[places]))
            first, last = work.losses[places].mean(0)
            noted = state.losses[pair]
            state.losses[pair] = torch.stack(
                [torch.where(noted[0].isnan(), first, noted[0]), torch.where(last.isnan(), noted[1], last)]
            )


def _mean(z: Tensor, views: Sequence[View], made: Sequence[Tensor]) -> Tensor:
    """At each position of z (C, h, w), the mean of what the windows over it have made of it."""
    total = torch.zeros_like(z)
    count = torch.zeros_like(z[:1])
    for view, window in zip(views, made, strict=True):
        for here, there in view.parts(z.shape):
            total[here] += window[there]
            count[here] += 1
    return total / count


def _views(shape: tuple[int, int, int], settings: Sampling) -> list[View]:
    _, height, width = shape
    side, tops, lefts = (
        settings.window or max(height, width),
        settings.window_starts(height, "y"),
        settings.window_starts(width, "x"),
    )
    return [View(top, left, (min(side, height), min(side, width))) for top in tops for left in lefts]


def _left_to_the_unet(inputs: ShardInputs, settings: Sampling) -> Tiling:
    if settings.window is None or settings.tiling == "none":
        return settings.tiling
    cut = {(width > settings.window, height > settings.window) for _, height, width in (p.shape for p in inputs.pairs)}
    if len(cut) > 1:
        raise ValueError(
            f"tiling {settings.tiling} and window {settings.window}: outputs of one shard lie on both sides of the"
            " window's size; give them one size"
        )
    cut_x, cut_y = cut.pop()
    along_x = settings.tiling in ("x", "both") and not cut_x
    along_y = settings.tiling in ("y", "both") and not cut_y
    return "both" if along_x and along_y else "x" if along_x else "y" if along_y else "none"
