"""One row of a manifest: from plain values to a checked Row with a name."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stylemill.manifest.schema import ImageRef, Problem, Row

UNDECODABLE = object()  # stands for a string whose bytes are not UTF-8
_MAX_ID_BYTES = 200


def parse_row(number: int, values: Mapping[str, Any], occurrence: int = 1) -> tuple[Row | None, list[Problem]]:
    """Check one row's plain values; the Row is None when there are problems.

    A missing pair_id becomes a hash of what the row asks for, never of its position or of carried columns;
    `occurrence` tells identical rows apart.
    """
    problems: list[Problem] = []

    def bad(column: str, message: str) -> None:
        problems.append(Problem(number, column, message))

    for column, value in values.items():
        if value is UNDECODABLE:
            bad(column, "is not valid UTF-8")
    if problems:
        return None, problems

    def image(column: str, value: Any, item: str = "") -> ImageRef | None:
        ref = ImageRef(value) if isinstance(value, str) else None
        if isinstance(value, Mapping):
            ref = ImageRef(value.get("path") or None, value.get("bytes"))
        if ref is None:
            bad(column, f"{item}is null")
        elif not ref.path and ref.data is None:
            bad(column, f"{item}is empty: neither a path nor bytes")
        elif "\0" in (ref.path or ""):
            bad(column, f"{item}has a NUL character in its path")
        return ref

    def text(column: str) -> str | None:
        value: str | None = values.get(column)
        return value

    content = None if values.get("content") is None else image("content", values["content"])

    style = values.get("style")
    if isinstance(style, list) and not style:
        bad("style", "is an empty list; name at least one style image")
    items = style if isinstance(style, list) else [style]
    names = [f"item {index} " if isinstance(style, list) else "" for index in range(len(items))]
    styles = tuple(image("style", item, name) for item, name in zip(items, names, strict=True))

    # An empty list stands for "no masks": that is how Hugging Face datasets write a missing list.
    mask = values.get("style_mask") or []
    masks = tuple(mask) if isinstance(mask, list) else (mask,)
    if masks and len(masks) != len(items):
        bad("style_mask", f"has {len(masks)} masks for {len(items)} styles; give one for each")
    if any(not item or "\0" in item for item in masks):
        bad("style_mask", "has a null, an empty path or a NUL character")
    content_mask = text("content_mask")
    if content_mask is not None and (not content_mask or "\0" in content_mask):
        bad("content_mask", "is an empty path or has a NUL character")
    if (content_mask is None) != (not masks) and not any(problem.column.endswith("_mask") for problem in problems):
        lone, absent = ("style_mask", "content_mask") if masks else ("content_mask", "style_mask")
        bad(lone, f"stands without a {absent}; a row has both or neither")

    control = values.get("control")
    controls = tuple(
        image("control", item, f"item {index} " if isinstance(control, list) else "")
        for index, item in enumerate(control if isinstance(control, list) else [control])
        if control is not None
    )

    seed = values.get("seed")
    if seed is not None and not 0 <= seed < 2**63:
        bad("seed", f"is {seed}, expected 0 to 2^63 - 1")
    weight = values.get("content_weight")
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        bad("content_weight", f"is {weight}, expected a finite number, 0 or more")

    pair_id = text("pair_id")
    if pair_id is not None and (problem := _id_problem(pair_id)):
        bad("pair_id", problem)
    if problems:
        return None, problems

    row = Row(
        manifest_row=number,
        output_row=number,
        pair_id=pair_id or "",
        content=content,
        styles=tuple(style for style in styles if style is not None),
        prompt=text("prompt"),
        negative_prompt=text("negative_prompt"),
        seed=seed,
        content_weight=None if weight is None else float(weight),
        content_mask=content_mask,
        style_masks=masks,
        controls=tuple(item for item in controls if item is not None),
    )
    if pair_id is None:
        row = _named(row, occurrence)
    return row, []


def numbered(name: str, occurrence: int) -> str:
    return name if occurrence == 1 else f"{name}-{occurrence}"


def _named(row: Row, occurrence: int) -> Row:
    asked = {
        "content": row.content.key if row.content else None,
        "style": [style.key for style in row.styles],
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "seed": row.seed,
        "content_weight": row.content_weight,
        "content_mask": row.content_mask,
        "style_mask": list(row.style_masks),
        "control": [control.key for control in row.controls],
    }
    # Unset fields are left out, so that an optional column full of nulls renames nothing.
    asked = {name: value for name, value in asked.items() if value is not None and value != []}
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return replace(row, pair_id=numbered(name, occurrence))


def _id_problem(pair_id: str) -> str | None:
    """Ids become file names when images are exported, so none may reach outside a folder."""
    if not pair_id.strip():
        return "is empty"
    if pair_id in (".", "..") or "/" in pair_id or "\\" in pair_id:
        return f"{pair_id!r} could be a path; use no '/', '\\', '.' or '..' as an id"
    if any(unicodedata.category(character) == "Cc" for character in pair_id):
        return f"{pair_id!r} has a control character"
    if (size := len(pair_id.encode())) > _MAX_ID_BYTES:
        return f"{pair_id[:40]!r}… has {size} bytes, at most {_MAX_ID_BYTES} are allowed"
    return None
