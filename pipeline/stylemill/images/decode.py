"""Decode the bytes of an image file safely, whatever they are.

A raster image becomes (H, W, 3) uint8 RGB, as a viewer shows it: EXIF rotation is applied, transparency is composited
on white, 16 bits are scaled to 8, and of an animation the first frame is taken. An image whose colours would have to be
guessed is refused. Colour profiles are not applied. Every function may be called from several threads at once.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stylemill.errors import ImageError

MIN_SIDE = 8  # pixels: one latent of the model. Smaller files are nearly always placeholders

# A closed list: Pillow also opens formats that start other programs (EPS), or that it finds in any text (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "QOI")
Image.init()  # registers the decoders at import, so that the first threads do not do it at the same time
_AVAILABLE = [name for name in _FORMATS if name in Image.OPEN]

# Patterns of the first bytes of other files that are often named as images, and what to do about each.
_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg", "is an SVG drawing; export it as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "is a PostScript drawing; export it as PNG"),
    (rb"%PDF", "is a PDF document; export the page as PNG"),
    (rb"\s*<(!doctype )?html", "is a web page, so its download failed; fetch the image again"),
    (rb"version https://git-lfs", "is a Git LFS pointer; fetch the image with 'git lfs pull'"),
    (rb"....ftyp(heic|heix|mif1|hevc)", "is a HEIC photo; convert it to JPEG or PNG"),
)


def open_image(
    data: bytes, name: str, max_pixels: int, largest: int | None = None, min_side: int = MIN_SIDE
) -> Image.Image:
    """Decode the bytes of an image in its own mode, with EXIF rotation applied. `name` names it in messages.

    With `largest`, a JPEG may be decoded at a fraction of its size, with sides of `largest` pixels or more.
    Raises ImageError where the bytes are no image, are damaged, or exceed `max_pixels` (width × height).
    """
    for pattern, advice in _OTHER_FILES:
        if re.match(pattern, data[:1024], re.DOTALL | re.IGNORECASE):
            raise ImageError(f"{name}: {advice}")
    try:
        image = Image.open(io.BytesIO(data), formats=_AVAILABLE)
        width, height = image.size
        if width * height > max_pixels:
            raise Image.DecompressionBombError(f"{width} × {height} pixels")
        if min(width, height) < min_side:
            raise ImageError(f"{name}: {width} × {height} pixels; a side has at least {min_side}; use a larger image")
        if largest is not None:
            # JPEG only: decodes at 1/2, 1/4 or 1/8 of the size. With `largest` at twice the final size, resampling
            # hides the difference.
            image.draft(None, (largest, largest))
        image.load()
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        advice = f"convert it to one of: {', '.join(_AVAILABLE)}"
        raise ImageError(f"{name}: not an image, or in a format that is not read; {advice}") from None
    except Image.DecompressionBombError as error:
        limit = f"over the limit of {max_pixels:,} pixels (inputs.max_pixels)"
        raise ImageError(f"{name}: {error}, {limit}; scale it down first") from error
    except Exception as error:  # decoders raise errors of many kinds for damaged bytes; none comes from a disk
        raise ImageError(f"{name}: truncated or damaged ({error}); write the file again") from error
    rotated = _apply_exif_rotation(image)
    rotated.format = image.format
    return rotated


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image of any mode as 8-bit RGB. Raises ImageError where the range of its values is not known."""
    try:
        return _convert_to_rgb(image)
    except ValueError as error:
        raise ImageError(f"{name}: its brightness is not defined ({error}); save it as 8-bit RGB or grey") from error


def _apply_exif_rotation(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # the pixels are intact; viewers ignore broken EXIF too
        return image


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, 32 bits or float, which Pillow's own conversion would clip at 255.

    Integers are read as 16-bit; floats as 0 to 1, or as 0 to 255 where any is above 1. Raises ValueError for values
    outside these ranges.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    top = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= top):  # also NaN
        raise ValueError(f"mode {image.mode} with values from {low:g} to {high:g}")
    return Image.fromarray((values * (255.0 / top) + 0.5).astype(np.uint8))
