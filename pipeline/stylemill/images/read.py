"""Read an input image: its bytes from a path, a URL or the manifest itself, decoded and fitted.

What a manifest names is not trusted: a job's `inputs` limit what a file may cost and where it may lie.
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

# The path itself is at fault: asking again gives the same answer. Any other error of the system may pass.
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
    limits: InputSettings = DEFAULT_INPUT_SETTINGS,
    name: str | None = None,
) -> InputImage:
    """Read one image and fit it to `size` (width, height). `name` is that of the result; by default, as in messages.

    `data`, where given, are the file's bytes and `path` only their name; otherwise `path` is a URL, or is read relative
    to `base`.
    crop: the largest centred part of the right shape. pad: the whole image, centred on white. stretch: the whole image,
    its shape not kept. keep: the image's own size and shape where it fits within `size`, else scaled down to fit; sides
    are rounded to multiples of `grid`, and what that takes off the shape is cropped.

    Raises ImageError where the image can never be read, TransientError where trying again may help.
    """
    shown_name, data = read_bytes(path, data, base, limits)
    try:
        image = to_rgb(open_image(data, shown_name, limits.max_pixels, largest=2 * max(size)), shown_name)
        fitted = fit_image(image, kept_size(image.size, size, grid) if fit == "keep" else size, fit)
    except MemoryError as error:
        raise StorageError(f"{shown_name}: not enough memory to decode it; give the worker more memory") from error
    return InputImage(
        name or shown_name, np.array(fitted), source_size=image.size, file_sha256=hashlib.sha256(data).hexdigest()
    )


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


def _name(path: str | None, data: bytes | None) -> str:
    if path:
        return display_name(path)
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
