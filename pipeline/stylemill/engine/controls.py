"""The control images of a pair, for the ControlNets of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stylemill.engine.inputs import Pair
from stylemill.engine.unet.controlnet import LoadedControlNet
from stylemill.images.input_image import InputImage

ControlKey = tuple[str, tuple[int, int]]  # the name of a control image and its width and height in pixels


def controls_problem(pair: Pair, controlnets: Sequence[LoadedControlNet]) -> str | None:
    """Why a pair cannot be denoised with these ControlNets; None if it can."""
    if not controlnets:
        return None  # the manifest may have control images that a job without ControlNets does not use
    if len(pair.controls) != len(controlnets):
        have, needs = len(pair.controls) or "none", f"{len(controlnets)} control image{'s' * (len(controlnets) > 1)}"
        return f"model.controlnet needs {needs} (column 'control', one for each), and this pair has {have}"
    if any(image.pixels is None for image in pair.controls):
        return "a control image of this pair could not be read"
    return None


def controls_or_blanks(pair: Pair, count: int) -> list[InputImage]:
    """The pair's control image for each of `count` ControlNets; blank images if it does not have as many.

    Such a pair is excluded, and the blank images keep its slot.
    """
    if len(pair.controls) == count:
        return [*pair.controls]
    return [InputImage(f"no control of {pair.size}", None)] * count


def unique_controls(images: Iterable[tuple[tuple[int, int], InputImage]]) -> dict[ControlKey, InputImage]:
    """Each control image of a shard once. Raises ValueError if two different images have the same name."""
    unique: dict[ControlKey, InputImage] = {}
    for size, image in images:
        if unique.setdefault((image.name, size), image).digest != image.digest:
            raise ValueError(
                f"two different control images of a shard have the name {image.name!r}; give each its own name"
            )
    return unique


def control_tensor(image: InputImage, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8; zeros of `size` (width, height) for an image that could not be read."""
    if image.pixels is None:
        return torch.zeros(3, size[1], size[0], dtype=torch.uint8)
    return torch.from_numpy(image.pixels.copy()).permute(2, 0, 1).contiguous()
