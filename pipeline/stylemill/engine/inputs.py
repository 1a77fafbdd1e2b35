"""What the engine is given: pairs of input images."""

from __future__ import annotations

from dataclasses import dataclass

from stylemill.images.input_image import InputImage, LabelImage


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
    placeholder: bool = False  # its image is not asked for: it only keeps its slot, zero-filled
    size_known: bool = (
        True  # False: nobody knows its sizes, since an image could not be read; it is failed, without a slot
    )

    @property
    def images(self) -> tuple[InputImage, ...]:
        return self.styles if self.content is None else (self.content, *self.styles)
