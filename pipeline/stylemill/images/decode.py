"""Decode the bytes of an image file safely, whatever they are.

Any raster image a viewer shows becomes (H, W, 3) uint8 RGB: EXIF rotation applied, transparency laid on white, the
first frame of an animation, 16-bit scaled to 8. What cannot be shown that way without a guess is refused. Colour
profiles are not applied. Every function may be called from many threads at once.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stylemill.errors import ImageError

MIN_SIDE = (
    8  # pixels; below one latent of the model there is nothing to see, and such files are nearly always placeholders
)

# Named one by one: Pillow also opens formats that start other programs (EPS) or that any text passes for (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "QOI")
Image.init()  # registers the decoders here, once, rather than in the first threads that need them
_AVAILABLE = [name for name in _FORMATS if name in Image.OPEN]

# Begins of files that are often found in the place of an image, and what helps.
_IMPOSTORS: tuple[tuple[bytes, str], ...] = (
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
    """Decode the bytes of an image in its own mode, EXIF rotation applied. Raises ImageError.

    A JPEG may be decoded smaller, with sides of `largest` pixels or more.
    """
    for begin, advice in _IMPOSTORS:
        if re.match(begin, data[:1024], re.DOTALL | re.IGNORECASE):
            raise ImageError(f"{name}: {advice}")
    try:
        image = Image.open(io.BytesIO(data), formats=_AVAILABLE)
        width, height = image.size
        if width * height > max_pixels:
            raise Image.DecompressionBombError(f"{width} × {height} pixels")
        if min(width, height) < min_side:
            raise ImageError(f"{name}: {width} × {height} pixels; a side has at least {min_side}; use a larger image")
        if largest is not None:
            # JPEG only: decodes at 1/2, 1/4 or 1/8. With twice the pixels asked for left, whichever way it is rotated,
            # resampling hides the difference.
            image.draft(None, (largest, largest))
        image.load()
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        advice = f"convert it to one of: {', '.join(_AVAILABLE)}"
        raise ImageError(f"{name}: not an image, or of a format that is not read; {advice}") from None
    except Image.DecompressionBombError as error:
        limit = f"over the limit of {max_pixels:,} pixels (inputs.max_pixels)"
        raise ImageError(f"{name}: {error}, {limit}; scale it down first") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes; none of it comes from a disk
        raise ImageError(f"{name}: truncated or damaged ({error}); write the file again") from error
    rotated = _rotated(image)
    rotated.format = image.format
    return rotated


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return _to_rgb(image)
    except ValueError as error:
        raise ImageError(f"{name}: has no certain colours ({error}); save it as 8-bit RGB or grey") from error


def _rotated(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # the pixels are good; viewers ignore broken EXIF too
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or float, where Pillow's own conversion would clip at 255.

    Integers are taken as 16-bit; floats as 0 to 1, or as 0 to 255 where any is above 1. Raises ValueError beyond.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    top = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= top):  # also NaN
        raise ValueError(f"{image.mode} values from {low:g} to {high:g} have no agreed brightness")
    return Image.fromarray((values * (255.0 / top) + 0.5).astype(np.uint8))
