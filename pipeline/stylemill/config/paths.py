"""Paths and URLs: which text is a URL, and the paths of a job file made absolute."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

from stylemill.config.model import EMBEDDED

_URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)


def split_url(reference: str | PurePath) -> tuple[str, str] | None:
    """The scheme (lower case) and the rest after `//`; None for anything that is no URL."""
    text = str(reference)
    if isinstance(reference, PurePath):
        text = re.sub("^([^:/]+):/+", r"\1://", text)  # pathlib makes one slash of two
    match = _URL.fullmatch(text)
    return (match["scheme"].lower(), match["rest"]) if match else None


def is_url(reference: str | PurePath) -> bool:
    return split_url(reference) is not None


def make_paths_absolute(values: dict[str, Any], base: Path) -> None:
    """Make the paths among the `values` of a job absolute, in place.

    Paths of a job file are relative to its folder, those of flags to the working directory: that is `base`. Raises
    ValueError or RuntimeError for text that cannot be a path.
    """
    for key in ("manifest", "output"):
        if isinstance(values.get(key), str) and values[key] and not is_url(values[key]):
            values[key] = str((base / Path(values[key]).expanduser()).resolve())
    if "model.name" in values:
        values["model.name"] = _model_path(values["model.name"], base)
    model = values.get("model")
    if isinstance(model, dict) and "name" in model:
        values["model"] = {**model, "name": _model_path(model["name"], base)}
        if isinstance(model.get("config"), str):
            values["model"]["config"] = _model_path(model["config"], base)
    elif isinstance(model, str):
        values["model"] = _model_path(model, base)
    if "model.config" in values:
        values["model.config"] = _model_path(values["model.config"], base)
    for name in ("controlnet", "loras"):
        for owner, key in ((values, f"model.{name}"), (values.get("model"), name)):
            if isinstance(owner, dict) and key in owner:
                owner[key] = _named_paths(owner[key], base)


def _model_path(name: Any, base: Path) -> Any:
    if not isinstance(name, str) or name in ("", EMBEDDED):
        return name
    # Hub ids look like relative paths: only a leading dot or slash, or a folder that is there, makes it a path.
    if name.startswith((".", "/", "~")) or (base / name).exists():
        return str((base / Path(name).expanduser()).resolve())
    return name


def _named_paths(value: Any, base: Path) -> Any:
    if isinstance(value, list):
        return [_named_paths(one, base) for one in value]
    if isinstance(value, dict) and "name" in value:
        return {**value, "name": _model_path(value["name"], base)}
    return _model_path(value, base)
