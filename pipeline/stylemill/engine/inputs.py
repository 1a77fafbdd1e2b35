"""What the engine is given: fitted images and the pairs made of them."""

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
    """One content or style image, fitted to the model's grid.

    `name` tells the images of a shard apart: equal names are one image and share their features.
    `pixels` is (H, W, 3) uint8 RGB. None stands for an image that could not be read: its pairs are failed from the
    start but keep their slots, so that their batch mates come out the same to the bit as in a later, whole run.
    `fitted` is the size that such an image would have, where it is not that of its pair.
    """

    name: str
    pixels: Pixels | None = field(repr=False)
    fitted: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; of an unreadable image as far as known."""
        return self.fitted if self.pixels is None else (self.pixels.shape[1], self.pixels.shape[0])

    @cached_property
    def digest(self) -> str:
        """Identity of the picture: sha256 over shape and pixels; empty for an unreadable one."""
        if self.pixels is None:
            return ""
        return sha256(repr(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class LabelImage:
    """Which label each pixel of an image bears: a mask, fitted as its image is.

    `name` tells the masks of a shard apart. `labels` is (H, W), 0 or more; −1 bears no label, as padding does. None
    stands for a mask that could not be read, as in `InputImage`.
    """

    name: str
    labels: Labels | None = field(repr=False)


@dataclass(frozen=True)
class Pair:
    """One content image (or none), one or more style images and what may vary inside a batch.

    `size` is width and height of the output in pixels and of the content image, multiples of the VAE's factor.
    `content_weight` overrides λ of the settings; `seed` alone decides the initial latents when it is given.
    `content_mask`, of the pair's size, may stand without a content: it lays out a texture; `style_masks` has one for
    each style. `controls`, of the pair's size, has one image for each ControlNet of the model.
    """

    styles: tuple[InputImage, ...]
    size: tuple[int, int]
    content: InputImage | None = None
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    content_weight: float | None = None
    image_number: int = 0  # without a seed of its own, image n of a pair starts as the job with seed + n would
    content_mask: LabelImage | None = None
    style_masks: tuple[LabelImage, ...] = ()
    controls: tuple[InputImage, ...] = ()
    idle: bool = False  # its image is not asked for: it only keeps its slot, zero-filled
    sized: bool = True  # False: nobody knows its sizes, since an image could not be read; it is failed, without a slot

    @property
    def images(self) -> tuple[InputImage, ...]:
        return self.styles if self.content is None else (self.content, *self.styles)
