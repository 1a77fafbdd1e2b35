"""Seamless tiling: convolutions padded with the opposite edge of the image instead of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from torch import Tensor
from torch.nn.functional import conv2d, pad

from stylemill.config.sampling import Tiling


@contextmanager
def circular_padding(tiling: Tiling, *modules: Any) -> Iterator[None]:
    """Pad every Conv2d in `modules` circularly along the axes of `tiling` (x, y or both) until the block ends.

    An axis that does not tile keeps its zeros. The modules' configuration does not change: `_conv_forward` of each
    instance is replaced, and restored at the end, also after an error.
    """
    replaced: list[tuple[Any, Any]] = []
    try:
        if tiling != "none":
            for conv, padded_outside in _convolutions(modules):
                replaced.append((conv, vars(conv).get("_conv_forward")))
                # Not `forward`: hooks and adapters that wrap `forward` still work.
                conv._conv_forward = _circular_convolution(conv, padded_outside, tiling)
        yield
    finally:
        for conv, before in reversed(replaced):
            del conv._conv_forward
            if before is not None:
                conv._conv_forward = before


def _convolutions(modules: tuple[Any, ...]) -> Iterator[tuple[Any, bool]]:
    """Each padded convolution once, and whether its Downsample2D pads one column and one row of zeros before it."""
    inner_modules = [inner for module in modules for inner in module.modules()]
    padded_outside = {
        id(inner.conv) for inner in inner_modules if isinstance(inner, Downsample2D) and inner.padding == 0
    }
    convolutions = {id(inner): inner for inner in inner_modules if isinstance(inner, torch.nn.Conv2d)}
    for conv in convolutions.values():
        if id(conv) in padded_outside or any(conv._reversed_padding_repeated_twice):
            yield conv, id(conv) in padded_outside


def _circular_convolution(
    conv: Any, padded_outside: bool, tiling: Tiling
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    along_x, along_y = tiling in ("x", "both"), tiling in ("y", "both")

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if padded_outside:  # replace the zeros of Downsample2D's F.pad(x, (0, 1, 0, 1))
            x = torch.cat([x[..., :-1], x[..., :1]], dim=-1) if along_x else x
            x = torch.cat([x[..., :-1, :], x[..., :1, :]], dim=-2) if along_y else x
        x = pad(x, (left, right, 0, 0), mode="circular" if along_x else "constant")
        x = pad(x, (0, 0, top, bottom), mode="circular" if along_y else "constant")
        return conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)

    return convolve
