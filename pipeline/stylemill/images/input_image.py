"""Input images and masks as arrays: the result of reading them, and the input of the engine."""

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

    `name` identifies an image within its shard: equal names are one image and share their features. `pixels` is
    (H, W, 3) uint8 RGB, or None for an image that could not be read. The pairs of such an image have failed from the
    start, but keep their places in the micro-batches, so that the other pairs get the same bits as in a run that could
    read it.
    """

    name: str
    pixels: Pixels | None = field(repr=False)
    expected_size: tuple[int, int] | None = None  # width and height of an unreadable image, if not those of its pair
    source_size: tuple[int, int] | None = None  # width and height before fitting
    file_sha256: str | None = None  # of the file's bytes, before any decoding

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; of an unreadable image the expected size, or None where it is not known."""
        return self.expected_size if self.pixels is None else (self.pixels.shape[1], self.pixels.shape[0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape and pixels, hex; empty for an unreadable image."""
        if self.pixels is None:
            return ""
        return sha256(repr(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class LabelImage:
    """A mask: the label of each pixel of an image, fitted as its image is.

    `name` identifies a mask within its shard. `labels` is (H, W) int32 of 0 or more, with −1 for pixels without a label
    (padding); None for a mask that could not be read, as in `InputImage`.
    """

    name: str
    labels: Labels | None = field(repr=False)
