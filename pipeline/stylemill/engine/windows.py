"""Outputs larger than a window (MultiDiffusion, arXiv 2302.08113).

Each step is taken in overlapping windows of the latents, which the sampler takes for pairs of their own. Afterwards
every position gets the mean over the windows that contain it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from stylemill.config.sampling import Sampling, Tiling
from stylemill.engine.batching import window_corners
from stylemill.engine.state import PairInputs, SampleState, ShardInputs


@dataclass(frozen=True)
class Window:
    """A window onto latents (C, h, w); where these tile, it may extend beyond their end and continue at their start."""

    top: int
    left: int
    shape: tuple[int, int]  # (rows, columns)

    def crop(self, tensor: Tensor, scale: int = 1) -> Tensor:
        """The part of a tensor (…, h, w) in this window; of one (…, h · scale, w · scale), the corresponding part."""
        rows, columns = (
            _positions(start * scale, length * scale, size, tensor.device)
            for start, length, size in zip((self.top, self.left), self.shape, tensor.shape[-2:], strict=True)
        )
        return tensor[..., rows[:, None], columns]

    def parts(self, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
        """Yield index pairs, into latents of `shape` and into the window: one, or two along an axis where it wraps."""
        for rows, window_rows in _wrapped_slices(self.top, self.shape[0], shape[-2]):
            for columns, window_columns in _wrapped_slices(self.left, self.shape[1], shape[-1]):
                yield (..., rows, columns), (..., window_rows, window_columns)


@lru_cache(maxsize=4096)  # each copy of an index to the device would wait for it
def _positions(start: int, length: int, size: int, device: torch.device) -> Tensor:
    return (torch.arange(start, start + length) % size).to(device)


def _wrapped_slices(start: int, length: int, size: int) -> list[tuple[slice, slice]]:
    inside = min(length, size - start)
    slices = [(slice(start, start + inside), slice(0, inside))]
    return slices if inside == length else [*slices, (slice(0, length - inside), slice(inside, length))]


def windows_problem(pair: PairInputs, settings: Sampling) -> str | None:
    """Why a pair cannot be sampled in windows; None if it can, or if it needs none."""
    if settings.window is None or not pair.uses_content or max(pair.shape[1:]) <= settings.window:
        return None
    return (
        f"window {settings.window}: latents of {pair.shape[2]}×{pair.shape[1]} are sampled in windows, which cannot"
        " follow a content; set content_weight: 0, or take a smaller image.size"
    )


class Windows:
    """The windows of all pairs of a shard, which depend on their sizes alone.

    `inputs` has a pair for every window; a pair that fits into a window stays as it is. `tiling` is the axes along
    which the UNet's convolutions wrap around: along an axis with several windows, the windows wrap around instead.
    Raises ValueError if `tiling` would differ between pairs.
    """

    def __init__(self, inputs: ShardInputs, settings: Sampling) -> None:
        self.tiling = _unet_tiling(inputs, settings)
        windows_of = [_windows(pair.shape, settings) for pair in inputs.pairs]
        self.windows = [(pair, window) for pair, windows in enumerate(windows_of) for window in windows]
        self.one_each = len(self.windows) == len(inputs.pairs)
        self.inputs = inputs if self.one_each else self._split_inputs(inputs)
        ends = list(accumulate(map(len, windows_of), initial=0))
        self.slices = [slice(*limits) for limits in pairwise(ends)]  # of each pair's windows in `windows`

    def _split_inputs(self, inputs: ShardInputs) -> ShardInputs:
        masks, controls, pairs = list(inputs.masks), list(inputs.controls), []

        def append_cropped(tensors: list[Tensor], number: int, window: Window, scale: int = 1) -> int:
            tensors.append(window.crop(tensors[number], scale))
            return len(tensors) - 1

        for number, window in self.windows:
            pair = inputs.pairs[number]
            content_mask = tuple(append_cropped(masks, mask, window) for mask in pair.masks[:1])
            scaled = [(control, inputs.controls[control].shape[-1] // pair.shape[-1]) for control in pair.controls]
            pairs.append(
                replace(
                    pair,
                    shape=(pair.shape[0], *window.shape),
                    content=pair.content if window.shape == pair.shape[1:] else None,
                    masks=(*content_mask, *pair.masks[1:]),
                    controls=tuple(append_cropped(controls, control, window, scale) for control, scale in scaled),
                )
            )
        return replace(inputs, pairs=pairs, masks=masks, controls=controls)

    def split(self, state: SampleState) -> SampleState:
        """A state whose pairs are the windows of `state`, for one step."""
        if self.one_each:
            return state
        return replace(
            state,
            inputs=self.inputs,
            latents_of=[window.crop(state.latents_of[pair]) for pair, window in self.windows],
            lost_at=state.lost_at.new_full((len(self.windows),), -1),
            excluded={
                number: state.excluded[pair] for number, (pair, _) in enumerate(self.windows) if pair in state.excluded
            },
            lowered_scales={
                number: state.lowered_scales[pair]
                for number, (pair, _) in enumerate(self.windows)
                if pair in state.lowered_scales
            },
        )

    def merge(self, windowed: SampleState, state: SampleState) -> None:
        """Merge the windows, after their step, into the state that they were split from.

        A pair is lost if one of its windows is.
        """
        if self.one_each:
            return
        for number, scale in windowed.lowered_scales.items():
            state.record_lowered_scales({self.windows[number][0]: scale})
        for pair, numbers in enumerate(self.slices):
            lost = (windowed.lost_at[numbers] >= 0).any()
            newly_lost = lost & (state.lost_at[pair] < 0)
            state.lost_at[pair] = torch.where(newly_lost, state.step, state.lost_at[pair])
            windows = [window for _, window in self.windows[numbers]]
            mean = _mean(state.latents_of[pair], windows, windowed.latents_of[numbers])
            state.latents_of[pair] = torch.where(lost, 0, mean)


def _mean(z: Tensor, windows: Sequence[Window], latents: Sequence[Tensor]) -> Tensor:
    """The mean, at each position of z (C, h, w), over the latents of the windows that contain it."""
    total = torch.zeros_like(z)
    count = torch.zeros_like(z[:1])
    for window, window_latents in zip(windows, latents, strict=True):
        for whole_index, window_index in window.parts(z.shape):
            total[whole_index] += window_latents[window_index]
            count[whole_index] += 1
    return total / count


def _windows(shape: tuple[int, int, int], settings: Sampling) -> list[Window]:
    _, height, width = shape
    side = settings.window or max(height, width)
    size = min(side, height), min(side, width)
    return [Window(top, left, size) for top, left in window_corners((width, height), settings)]


def _unet_tiling(inputs: ShardInputs, settings: Sampling) -> Tiling:
    if settings.window is None or settings.tiling == "none":
        return settings.tiling
    shapes = [pair.shape for pair in inputs.pairs]
    larger = {(width > settings.window, height > settings.window) for _, height, width in shapes}
    if len(larger) > 1:
        raise ValueError(
            f"tiling {settings.tiling} and window {settings.window}: some outputs of the shard are larger than the"
            " window and others are not; give all of them one size"
        )
    larger_x, larger_y = larger.pop()
    along_x = settings.tiling in ("x", "both") and not larger_x
    along_y = settings.tiling in ("y", "both") and not larger_y
    return "both" if along_x and along_y else "x" if along_x else "y" if along_y else "none"
