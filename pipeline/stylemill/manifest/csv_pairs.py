"""Read a CSV of pairs, whose header names columns of a manifest."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stylemill.errors import ManifestError
from stylemill.manifest.schema import KNOWN_COLUMNS, OUTPUT_COLUMNS
from stylemill.manifest.sources import absolute_path, relative_to_manifest

_IMAGE_COLUMNS = ("content", "style", "content_mask", "style_mask", "control")
_NUMBERS: dict[str, type[int] | type[float]] = {"seed": int, "content_weight": float}  # all others are text


def read_header(path: Path) -> list[str]:
    """The column names of a CSV of pairs. Raises ManifestError where a manifest cannot have them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error
    for name in header:
        if header.count(name) > 1 or not name.strip():
            raise ManifestError(f"{path}: column {name!r} of the header is repeated or has no name")
        if name not in KNOWN_COLUMNS and name in OUTPUT_COLUMNS:
            raise ManifestError(f"{path}: column '{name}' has the name of an output column; rename it")
    if "style" not in header:
        raise ManifestError(f"{path}: no column 'style' in the header; it has: {', '.join(header) or 'nothing'}")
    return header


def read_pairs(path: Path, manifest_folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV of pairs as values of a manifest in `manifest_folder`; empty cells are left out.

    Raises ManifestError with the line of a bad value.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for cells in reader:
                where = f"{path}: line {reader.line_num}"
                if None in cells or None in cells.values():
                    raise ManifestError(f"{where}: has another number of values than the header")
                yield {
                    name: _parse_cell(name, text, path, manifest_folder, where)
                    for name, text in cells.items()
                    if text != ""
                }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error


def _parse_cell(name: str, text: str, path: Path, manifest_folder: Path, where: str) -> Any:
    if name in _IMAGE_COLUMNS:
        return relative_to_manifest(absolute_path(text, path), manifest_folder)
    try:
        return _NUMBERS[name](text) if name in _NUMBERS else text
    except ValueError:
        raise ManifestError(f"{where}, column '{name}': {text!r}, expected {KNOWN_COLUMNS[name].types}") from None
