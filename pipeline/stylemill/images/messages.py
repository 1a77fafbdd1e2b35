"""What messages about input images have in common: the name of an image, and the errors of every kind of download."""

from __future__ import annotations

import re

from stylemill.config.inputs import InputSettings
from stylemill.config.paths import is_url
from stylemill.errors import DownloadError, ImageError

_MAX_NAME = 200  # characters


def display_name(path: str) -> str:
    """A path or URL as messages show it: one short line, without the secrets that a URL may contain."""
    if is_url(path):
        path = re.sub(r"//[^/?#]*@", "//…@", path.partition("#")[0])
        path, query, _ = path.partition("?")
        path += "?…" if query else ""
    path = "".join(character if character.isprintable() else "�" for character in path)
    return path if len(path) <= _MAX_NAME else path[:_MAX_NAME] + "…"


def one_line(error: BaseException) -> str:
    """The text of an error on one short line. It may contain text of the server."""
    return display_name(" ".join(str(error).split()))


def too_large(name: str, inputs: InputSettings) -> ImageError:
    return ImageError(f"{name}: is larger than the limit of {inputs.max_bytes:,} bytes (inputs.max_bytes)")


def interrupted(name: str, error: BaseException) -> DownloadError:
    """The error of a download that `error` ended before all bytes arrived."""
    if isinstance(error, TimeoutError):
        return DownloadError(f"{name}: the download took longer than inputs.timeout")
    return DownloadError(f"{name}: the download broke off ({type(error).__name__}: {one_line(error)})")
