"""Input images as pixels: what reading gives and the engine takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB
Labels = npt.NDArray[np.int32]  # (H, W); −1 is no label


@dataclass(frozen=True, eq=False)
class InputImage:
    """One content, style or control image, fitted to the model's grid.

    `name` tells the images of a shard apart: equal names are one image and share their features. `pixels` is (H, W, 3)
    uint8 RGB, or None for an image that could not be read: its pairs have failed from the start, but keep their slots,
    so that the other pairs of their micro-batches come out the same to the bit as in a later run with that image.
    """

    name: str
    pixels: Pixels | None = field(repr=False)
    expected_size: tuple[int, int] | None = None  # width and height of an unreadable image, if not those of its pair
    source_size: tuple[int, int] | None = None  # width and height before fitting
    file_sha256: str | None = None  # of the file's bytes, before any decoding

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; of an unreadable image as far as known."""
        return self.expected_size if self.pixels is None else (self.pixels.shape[1], self.pixels.shape[0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shape and pixels, which identifies the picture; empty for an unreadable image."""
        if self.pixels is None:
            return ""
        return sha256(repr(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class LabelImage:
    """A mask: the label of each pixel of an image, fitted as its image is.

    `name` tells the masks of a shard apart. `labels` is (H, W), 0 or more; −1 is no label, as in padding. None stands
    for a mask that could not be read, as in `InputImage`.
    """

    name: str
    labels: Labels | None = field(repr=False)
