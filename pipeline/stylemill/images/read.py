"""Read an input image: get the bytes from a path, a URL or the manifest itself, decode them, and fit the pixels.

A manifest is not trusted: a job's `inputs` limit where its files may be and how large they may be.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import numpy as np

from stylemill.config.inputs import DEFAULT_INPUT_SETTINGS, Fit, InputSettings
from stylemill.config.paths import is_url
from stylemill.errors import ImageError, StorageError
from stylemill.images.decode import open_image, to_rgb
from stylemill.images.download import fetch
from stylemill.images.fit import fit_image, kept_size
from stylemill.images.input_image import InputImage
from stylemill.images.messages import display_name

# The path is wrong, and another attempt gives the same result. Any other error of the system may pass.
_PERMANENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    errno.ENXIO,  # a socket
}


def load_image(
    path: str | None,
    data: bytes | None,
    base: str | Path,
    size: tuple[int, int],
    fit: Fit,
    grid: int = 1,
    inputs: InputSettings = DEFAULT_INPUT_SETTINGS,
    name: str | None = None,
) -> InputImage:
    """Read one image and fit it to `size` (width, height in pixels).

    `path` is a URL, or a path relative to `base`. With `data`, the bytes of the file, `path` is only a name.
    `fit` is one of: crop, the largest centred part with the shape of `size`; pad, the whole image centred on white;
    stretch, the whole image without its own shape; keep, the image's own shape and size, scaled down where it exceeds
    `size`. With keep, sides are rounded to multiples of `grid`, and the image is cropped to the rounded shape.
    `name` is the name of the result; without it, the name that messages use.

    Raises ImageError where the image can never be read, TransientError where another attempt may help.
    """
    message_name = image_name(path, data)
    data = read_bytes(path, data, base, inputs)
    try:
        image = to_rgb(open_image(data, message_name, inputs.max_pixels, largest=2 * max(size)), message_name)
        fitted = fit_image(image, kept_size(image.size, size, grid) if fit == "keep" else size, fit)
    except MemoryError as error:
        raise StorageError(f"{message_name}: not enough memory to decode it; give the worker more memory") from error
    return InputImage(
        name or message_name, np.array(fitted), source_size=image.size, file_sha256=hashlib.sha256(data).hexdigest()
    )


def image_name(path: str | None, data: bytes | None) -> str:
    """How messages name an image: by its path or URL, or else by the digest of its bytes."""
    if path:
        return display_name(path)
    if data is not None:
        return f"image bytes sha256:{hashlib.sha256(data).hexdigest()[:16]}…"
    return "image"


def read_bytes(
    path: str | None, data: bytes | None, base: str | Path, inputs: InputSettings = DEFAULT_INPUT_SETTINGS
) -> bytes:
    """All bytes of an image file, so that its digest and its pixels come from the same bytes.

    The arguments and errors are those of `load_image`.
    """
    if data is None:
        data = _read_path(path, Path(base), inputs)
    if not data:
        raise ImageError(f"{image_name(path, data)}: is empty (0 bytes); write the file again or remove its rows")
    if len(data) > inputs.max_bytes:
        raise _too_many_bytes(image_name(path, data), len(data), inputs)
    return data


def _read_path(path: str | None, base: Path, inputs: InputSettings) -> bytes:
    if not path:
        raise ImageError("image: the manifest gives neither a path nor bytes; fill in one of them")
    if is_url(path):
        return fetch(path, inputs)
    if inputs.remote_only:
        advice = "name a URL, or embed the bytes"
        raise ImageError(
            f"{display_name(path)}: is a path of this machine, and inputs.remote_only allows none; {advice}"
        )
    return _read_file(path, base, inputs)


def _read_file(path: str, base: Path, inputs: InputSettings) -> bytes:
    name = display_name(path)
    full = base / path
    try:
        with open(full, "rb", opener=_open_without_waiting) as file:
            status = os.stat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{name}: is not a regular file; name an image file")
            if status.st_size > inputs.max_bytes:
                raise _too_many_bytes(name, status.st_size, inputs)
            return file.read(status.st_size or inputs.max_bytes + 1)  # some files in /proc have no size and no end
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder; name an image file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or a lone surrogate in the path
        if isinstance(error, OSError) and error.errno not in _PERMANENT:
            raise StorageError(f"{name}: cannot be read just now: {os.strerror(error.errno or 0)}") from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(
            f"{name}: {reason} (looked for {display_name(str(full))}); correct the path or its permissions"
        ) from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe waits for a writer otherwise


def _too_many_bytes(name: str, size: int, inputs: InputSettings) -> ImageError:
    limit = f"over the limit of {inputs.max_bytes:,} (inputs.max_bytes)"
    return ImageError(f"{name}: has {size:,} bytes, {limit}; store it smaller or compressed")
