"""Seamless tiling: convolutions that see an image's other edge beyond its border instead of zeros."""

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
def circular(tiling: Tiling, *modules: Any) -> Iterator[None]:
    """Wrap the padding of every Conv2d below `modules` around along `tiling` (x, y or both) until the block ends.

    The other axis keeps its zeros. Nothing of a module's configuration changes: only the instance's own convolution is
    overlaid, and uncovered again whatever happens.
    """
    overlaid: list[tuple[Any, Any]] = []
    try:
        if tiling != "none":
            for conv, padded_outside in _convolutions(modules):
                overlaid.append((conv, vars(conv).get("_conv_forward")))
                # Below `forward`, so that whatever wraps that (hooks, adapters) works as before.
                conv._conv_forward = _convolve(conv, padded_outside, tiling)
        yield
    finally:
        for conv, before in reversed(overlaid):
            del conv._conv_forward
            if before is not None:
                conv._conv_forward = before


def _convolutions(modules: tuple[Any, ...]) -> Iterator[tuple[Any, bool]]:
    """Each convolution once, and whether its module has already padded one column and one row of zeros for it."""
    inside = [inner for module in modules for inner in module.modules()]
    outside = {id(inner.conv) for inner in inside if isinstance(inner, Downsample2D) and inner.padding == 0}
    found = {id(inner): inner for inner in inside if isinstance(inner, torch.nn.Conv2d)}
    for conv in found.values():
        if id(conv) in outside or any(conv._reversed_padding_repeated_twice):
            yield conv, id(conv) in outside


def _convolve(conv: Any, padded_outside: bool, tiling: Tiling) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    along_x, along_y = tiling in ("x", "both"), tiling in ("y", "both")

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if padded_outside:  # Downsample2D's F.pad(x, (0, 1, 0, 1)): its zeros make room for the other edge
            x = torch.cat([x[..., :-1], x[..., :1]], dim=-1) if along_x else x
            x = torch.cat([x[..., :-1, :], x[..., :1, :]], dim=-2) if along_y else x
        x = pad(x, (left, right, 0, 0), mode="circular" if along_x else "constant")
        x = pad(x, (0, 0, top, bottom), mode="circular" if along_y else "constant")
        return conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)

    return convolve
