"""Paths and URLs: which text is a URL, and how the paths of a job file are made absolute."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

EMBEDDED = "demo"  # the model that comes with the package; write a folder of this name as ./demo
_URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_MODEL_PATHS = ("name", "config", "controlnet", "loras")  # settings of the model that may name folders or files


def split_url(reference: str | PurePath) -> tuple[str, str] | None:
    """The scheme in lower case and the text after `://`; None for text that is no URL."""
    text = str(reference)
    if isinstance(reference, PurePath):
        text = re.sub("^([^:/]+):/+", r"\1://", text)  # pathlib turns two slashes into one
    match = _URL.fullmatch(text)
    return (match["scheme"].lower(), match["rest"]) if match else None


def is_url(reference: str | PurePath) -> bool:
    return split_url(reference) is not None


def is_utf8(path: str | PurePath) -> bool:
    """Whether a path is text. A file name may be any bytes, of which Python makes surrogates; Arrow takes none."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def make_paths_absolute(values: dict[str, Any], base: Path) -> None:
    """Make the paths in the `values` of a job absolute, in place; keys may be dotted (`model.name`).

    `base` is the folder of the job file, or the working directory for values of flags. Raises ValueError or
    RuntimeError for text that cannot be a path, and for a path that is not UTF-8.
    """
    for key in ("manifest", "output"):
        value = values.get(key)
        if isinstance(value, str) and value and not is_url(value):
            values[key] = _absolute(value, base)
    if isinstance(model := values.get("model"), dict):
        values["model"] = {
            key: _absolute_names(value, base) if key in _MODEL_PATHS else value for key, value in model.items()
        }
    for key in ("model", *(f"model.{setting}" for setting in _MODEL_PATHS)):
        if key in values and not isinstance(values[key], dict):
            values[key] = _absolute_names(values[key], base)


def _absolute_names(value: Any, base: Path) -> Any:
    """A name, settings with a name, or a list of these, with the names that are paths made absolute."""
    if isinstance(value, list):
        return [_absolute_names(item, base) for item in value]
    if isinstance(value, dict):
        return {key: _absolute_names(item, base) if key == "name" else item for key, item in value.items()}
    if not isinstance(value, str) or value in ("", EMBEDDED):
        return value
    # Hub ids look like relative paths. A name is a path only if it begins as one, or if the folder or file exists.
    is_path = value.startswith((".", "/", "~")) or (base / value).exists()
    return _absolute(value, base) if is_path else value


def _absolute(path: str, base: Path) -> str:
    absolute = str((base / Path(path).expanduser()).resolve())
    if not is_utf8(absolute):
        raise ValueError(f"{absolute!r} is not UTF-8; rename the file or folder")
    return absolute
