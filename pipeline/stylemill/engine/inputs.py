"""What the engine is given: fitted images and the pairs made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


@dataclass(frozen=True, eq=False)
class InputImage:
    """One content or style image, fitted to the model's grid.

    `name` tells the images of a shard apart: equal names are one image and share their features.
    `pixels` is (H, W, 3) uint8 RGB. None stands for an image that could not be read: its pairs are failed from the
    start but keep their slots, so that their batch mates come out the same to the bit as in a later, whole run.
    """

    name: str
    pixels: Pixels | None = field(repr=False)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; None for an unreadable image."""
        return None if self.pixels is None else (self.pixels.shape[1], self.pixels.shape[0])

    @cached_property
    def digest(self) -> str:
        """Identity of the picture: sha256 over shape and pixels; empty for an unreadable one."""
        if self.pixels is None:
            return ""
        return sha256(repr(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True)
class Pair:
    """One content image (or none), one or more style images and what may vary inside a batch.

    `size` is width and height of the output in pixels and of the content image, multiples of the VAE's factor.
    `content_weight` overrides λ of the settings; `seed` alone decides the initial latents when it is given.
    """

    styles: tuple[InputImage, ...]
    size: tuple[int, int]
    content: InputImage | None = None
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    content_weight: float | None = None

    @property
    def images(self) -> tuple[InputImage, ...]:
        return self.styles if self.content is None else (self.content, *self.styles)
