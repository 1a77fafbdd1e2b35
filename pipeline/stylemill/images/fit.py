"""Fit an image to a size: crop, pad, stretch, or keep its own size and shape."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from stylemill.config.inputs import Fit


def kept_size(own: tuple[int, int], most: tuple[int, int], grid: int) -> tuple[int, int]:
    """The size nearest to an image's `own` that fits within `most` and lies on the grid; never enlarged beyond it."""
    scale = min(1.0, most[0] / own[0], most[1] / own[1])
    sides = (max(1, round(side * scale / grid)) * grid for side in own)
    width, height = (min(side, limit // grid * grid) for side, limit in zip(sides, most, strict=True))
    return width, height


@dataclass(frozen=True)
class Placement:
    """Which part of an image is kept, and where it comes to lie."""

    box: tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the image
    corner: tuple[int, int]  # left and upper, in pixels of the result
    inner: tuple[int, int]  # width and height there


def placement(image_size: tuple[int, int], size: tuple[int, int], fit: Fit) -> Placement:
    """How an image of `image_size` is brought to `size`, both (width, height)."""
    (width, height), (image_width, image_height) = size, image_size
    x = y = 0.0
    corner, inner = (0, 0), size
    if fit == "pad":
        scale = min(width / image_width, height / image_height)
        inner = max(1, round(image_width * scale)), max(1, round(image_height * scale))
        corner = (width - inner[0]) // 2, (height - inner[1]) // 2
    elif fit in ("crop", "keep"):
        scale = max(width / image_width, height / image_height)
        x, y = max(0.0, (image_width - width / scale) / 2), max(0.0, (image_height - height / scale) / 2)
    return Placement((x, y, image_width - x, image_height - y), corner, inner)


def fit_image(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    place = placement(image.size, size, fit)
    resized = _resize(image, place.inner, place.box)
    if place.inner == size:
        return resized
    canvas = Image.new("RGB", size, "white")
    canvas.paste(resized, place.corner)
    return canvas


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    # reducing_gap shrinks very large images by a whole factor first; at 3 the result is the same to the eye.
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
