"""The input of the engine: pairs of images."""

from __future__ import annotations

from dataclasses import dataclass

from stylemill.images.input_image import InputImage, LabelImage


@dataclass(frozen=True)
class Pair:
    """One content image (or none), one or more style images, and the settings that may differ within a shard.

    `size` is the width and height of the output, and of the content image, in pixels: multiples of the model's grid.
    `content_weight` overrides λ of the settings. `seed`, if given, alone decides the initial latents; without it, image
    `image_number` of a pair starts from the latents of a job with seed + `image_number`.
    `content_mask`, of the pair's size, needs no content image: it is then the layout of a texture. `style_masks` has
    one mask for each style. `controls`, of the pair's size, has one image for each ControlNet of the model.

    A `placeholder` gets no image; it keeps its slot, zero-filled, so that the micro-batches of other pairs do not
    change. With `size_known` False, because an image could not be read, the pair has failed and has no slot.
    """

    styles: tuple[InputImage, ...]
    size: tuple[int, int]
    content: InputImage | None = None
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    content_weight: float | None = None
    image_number: int = 0
    content_mask: LabelImage | None = None
    style_masks: tuple[LabelImage, ...] = ()
    controls: tuple[InputImage, ...] = ()
    placeholder: bool = False
    size_known: bool = True

    @property
    def images(self) -> tuple[InputImage, ...]:
        return self.styles if self.content is None else (self.content, *self.styles)
