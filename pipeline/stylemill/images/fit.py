"""Fit an image to a size: crop, pad, stretch, or keep its own size and shape."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from stylemill.config.inputs import Fit


def kept_size(source: tuple[int, int], limit: tuple[int, int], grid: int) -> tuple[int, int]:
    """The size of an image with `fit: keep`: nearest to its `source` size, within `limit`, a multiple of `grid`.

    All sizes are (width, height) in pixels. An image is scaled down where it exceeds the limit, and never scaled up,
    except to the next multiple of `grid`.
    """
    scale = min(1.0, limit[0] / source[0], limit[1] / source[1])
    sides = (max(1, round(side * scale / grid)) * grid for side in source)
    width, height = (min(side, longest // grid * grid) for side, longest in zip(sides, limit, strict=True))
    return width, height


@dataclass(frozen=True)
class Placement:
    """Which part of an image is kept, and where the result has it."""

    box: tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the image
    corner: tuple[int, int]  # left and upper, in pixels of the result
    inner: tuple[int, int]  # width and height, in pixels of the result


def place_image(image_size: tuple[int, int], size: tuple[int, int], fit: Fit) -> Placement:
    """How an image of `image_size` is fitted to `size`, both (width, height) in pixels."""
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
    """Resize an RGB image to `size` (width, height); what `pad` adds is white."""
    placement = place_image(image.size, size, fit)
    # reducing_gap shrinks very large images by a whole factor first; at 3 no difference can be seen.
    resized = image.resize(placement.inner, Image.Resampling.LANCZOS, box=placement.box, reducing_gap=3.0)
    if placement.inner == size:
        return resized
    canvas = Image.new("RGB", size, "white")
    canvas.paste(resized, placement.corner)
    return canvas
