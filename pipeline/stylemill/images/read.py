"""Input images: safe decoding, fitting to the model's grid, and encoding of results.

Any raster image a viewer shows becomes (H, W, 3) uint8 RGB: EXIF rotation applied, transparency laid on white, the
first frame of an animation, 16-bit scaled to 8. What cannot be shown that way without a guess is refused. Colour
profiles are not applied. What a manifest names is not trusted: a job's `inputs` limit what a file may
cost and where it may lie. Every function may be called from many threads at once.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from stylemill.config.inputs import DEFAULT_INPUT_SETTINGS, Fit, InputSettings
from stylemill.config.paths import is_url
from stylemill.errors import ImageError, StorageError
from stylemill.images.download import fetch, shown

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
# The path itself is at fault: asking again gives the same answer. Any other error of the system may pass.
_PERMANENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    errno.ENXIO,  # a socket
}


@dataclass(frozen=True)
class FittedImage:
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB, on the model's grid
    sha256: str  # of the file's bytes, before any decoding
    source: tuple[int, int]  # width and height of what was fitted, in pixels


def load_image(
    path: str | None,
    data: bytes | None,
    base: str | Path,
    size: tuple[int, int],
    fit: Fit,
    grid: int = 1,
    limits: InputSettings = DEFAULT_INPUT_SETTINGS,
) -> FittedImage:
    """Read one image and bring it to `size` (width, height).

    `data`, where given, are the file's bytes and `path` only their name; otherwise `path` is a URL, or is read relative
    to `base`.
    crop: the largest centred part of the right shape. pad: the whole image, centred on white. stretch: the whole image,
    its shape not kept. keep: the image's own size and shape where it fits within `size`, else scaled down to fit; sides
    are rounded to multiples of `grid`, and what that takes off the shape is cropped.

    Raises ImageError where the image can never be read, TransientError where trying again may help.
    """
    name, data = read_bytes(path, data, base, limits)
    try:
        image = _rgb(open_image(data, name, limits.max_pixels, largest=2 * max(size)), name)
        fitted = _fit(image, kept_size(image.size, size, grid) if fit == "keep" else size, fit)
        return FittedImage(np.array(fitted), hashlib.sha256(data).hexdigest(), image.size)
    except MemoryError as error:
        raise StorageError(f"{name}: not enough memory to decode it; give the worker more memory") from error


def kept_size(own: tuple[int, int], most: tuple[int, int], grid: int) -> tuple[int, int]:
    """The size nearest to an image's `own` that fits within `most` and lies on the grid; never enlarged beyond it."""
    scale = min(1.0, most[0] / own[0], most[1] / own[1])
    sides = (max(1, round(side * scale / grid)) * grid for side in own)
    width, height = (min(side, limit // grid * grid) for side, limit in zip(sides, most, strict=True))
    return width, height


def read_bytes(
    path: str | None, data: bytes | None, base: str | Path, limits: InputSettings = DEFAULT_INPUT_SETTINGS
) -> tuple[str, bytes]:
    """The bytes of an image file, held whole, so that its digest and its pixels come from the same ones; and its name
    in messages. Raises as `load_image` does."""
    name = _name(path, data)
    if data is None:
        data = _read(path, Path(base), limits)
    if not data:
        raise ImageError(f"{name}: is empty (0 bytes); write the file again or remove its rows")
    if len(data) > limits.max_bytes:
        raise ImageError(_too_many_bytes(name, len(data), limits))
    return name, data


def encode_image(pixels: NDArray[np.uint8], image_format: Literal["png", "jpeg", "webp"], quality: int) -> bytes:
    """(H, W, 3) uint8 RGB as a file: the same pixels and settings give the same bytes, without metadata.

    `quality`, 1 to 100, is for jpeg (stored 4:4:4, so that fine strokes keep their colour) and webp; png is lossless.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 6},
        "jpeg": {"quality": quality, "subsampling": "4:4:4"},
        "webp": {"quality": quality, "method": 4},
    }
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, image_format, **options[image_format])
    return buffer.getvalue()


def _name(path: str | None, data: bytes | None) -> str:
    if path:
        return shown(path)
    if data is not None:
        return f"image bytes sha256:{hashlib.sha256(data).hexdigest()[:16]}…"
    return "image"


def _too_many_bytes(name: str, size: int, limits: InputSettings) -> str:
    limit = f"over the limit of {limits.max_bytes:,} (inputs.max_bytes)"
    return f"{name}: has {size:,} bytes, {limit}; store it smaller or compressed"


def _read(path: str | None, base: Path, limits: InputSettings) -> bytes:
    if not path:
        raise ImageError("image: the manifest gives neither a path nor bytes; fill in one of them")
    name = _name(path, None)
    if is_url(path):
        return fetch(path, limits)
    if limits.remote_only:
        raise ImageError(
            f"{name}: is a path of this machine, and inputs.remote_only allows none; name a URL, or embed the bytes"
        )
    full = base / path
    try:
        with open(full, "rb", opener=_open) as file:
            found = os.stat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ImageError(f"{name}: is not a regular file; name an image file")
            if found.st_size > limits.max_bytes:
                raise ImageError(_too_many_bytes(name, found.st_size, limits))
            return file.read(found.st_size or limits.max_bytes + 1)  # some of /proc have no size and no end
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder; name an image file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or a lone surrogate in the path
        if isinstance(error, OSError) and error.errno not in _PERMANENT:
            raise StorageError(f"{name}: cannot be read just now: {os.strerror(error.errno or 0)}") from error
        what = error.strerror if isinstance(error, OSError) else error
        where = _name(str(full), None)
        raise ImageError(f"{name}: {what} (looked for {where}); correct the path or its rights") from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would be waited for without end


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


def _rgb(image: Image.Image, name: str) -> Image.Image:
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


def _fit(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
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
