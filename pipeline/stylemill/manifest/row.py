"""Parse one row of a manifest: from plain values to a checked Row with an id."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stylemill.manifest.schema import ImageRef, Problem, Row
from stylemill.plural import counted

UNDECODABLE = object()  # in the place of a string whose bytes are not UTF-8
_MAX_ID_BYTES = 200


def parse_row(number: int, values: Mapping[str, Any], occurrence: int = 1) -> tuple[Row | None, list[Problem]]:
    """Check the values of one row, by column. Returns the Row and no problems, or None and at least one problem.

    A row without a pair_id gets a hash of its known columns as its id, which does not depend on its position.
    `occurrence` (1, 2, …) gives identical rows different ids.
    """
    parser = _RowParser(number, values)
    row = parser.parse()
    if row is None or parser.problems:
        return None, parser.problems
    return (row if row.pair_id else _with_generated_id(row, occurrence)), []


def number_id(pair_id: str, occurrence: int) -> str:
    """The id of the second or a later one of identical rows."""
    return pair_id if occurrence == 1 else f"{pair_id}-{occurrence}"


class _RowParser:
    """Parses the values of one row, and collects their problems."""

    def __init__(self, number: int, values: Mapping[str, Any]) -> None:
        self._number = number
        self._values = values
        self.problems: list[Problem] = []

    def parse(self) -> Row | None:
        """The row; its values are valid only where there are no problems."""
        for column, value in self._values.items():
            if value is UNDECODABLE:
                self._report(column, "is not valid UTF-8")
        if self.problems:
            return None
        content = None if self._values.get("content") is None else self._image("content", self._values["content"])
        styles = self._styles()
        style_masks = self._style_masks(len(styles))
        return Row(
            manifest_row=self._number,
            output_row=self._number,
            content=content,
            styles=tuple(style for style in styles if style is not None),
            style_masks=style_masks,
            content_mask=self._content_mask(style_masks),
            controls=self._controls(),
            seed=self._seed(),
            content_weight=self._content_weight(),
            prompt=self._values.get("prompt"),
            negative_prompt=self._values.get("negative_prompt"),
            pair_id=self._pair_id(),
        )

    def _report(self, column: str, message: str) -> None:
        self.problems.append(Problem(self._number, column, message))

    def _image(self, column: str, value: Any, item: str = "") -> ImageRef | None:
        ref = ImageRef(value) if isinstance(value, str) else None
        if isinstance(value, Mapping):
            ref = ImageRef(value.get("path") or None, value.get("bytes"))
        if ref is None:
            self._report(column, f"{item}is null")
        elif not ref.path and ref.data is None:
            self._report(column, f"{item}is empty: neither a path nor bytes")
        elif "\0" in (ref.path or ""):
            self._report(column, f"{item}has a NUL character in its path")
        return ref

    def _images(self, column: str, value: Any) -> list[ImageRef | None]:
        """A list of images, or a single one."""
        if not isinstance(value, list):
            return [self._image(column, value)]
        return [self._image(column, item, f"item {index} ") for index, item in enumerate(value)]

    def _styles(self) -> list[ImageRef | None]:
        value = self._values.get("style")
        if value == []:
            self._report("style", "is an empty list; name at least one style image")
        return self._images("style", value)

    def _style_masks(self, styles: int) -> tuple[str, ...]:
        # An empty list is no masks: Hugging Face datasets write a missing list so.
        value = self._values.get("style_mask") or []
        masks = tuple(value) if isinstance(value, list) else (value,)
        if masks and len(masks) != styles:
            self._report(
                "style_mask", f"has {counted(len(masks), 'mask')} for {counted(styles, 'style')}; give one for each"
            )
        if any(not mask or "\0" in mask for mask in masks):
            self._report("style_mask", "has a null, an empty path or a NUL character")
        return masks

    def _content_mask(self, style_masks: tuple[str, ...]) -> str | None:
        mask: str | None = self._values.get("content_mask")
        if mask is not None and (not mask or "\0" in mask):
            self._report("content_mask", "is an empty path or has a NUL character")
        has_problem = any(problem.column.endswith("_mask") for problem in self.problems)
        if (mask is None) != (not style_masks) and not has_problem:
            given, absent = ("style_mask", "content_mask") if style_masks else ("content_mask", "style_mask")
            self._report(given, f"is given without {absent}; a row has both or neither")
        return mask

    def _controls(self) -> tuple[ImageRef, ...]:
        value = self._values.get("control")
        images = [] if value is None else self._images("control", value)
        return tuple(image for image in images if image is not None)

    def _seed(self) -> int | None:
        seed: int | None = self._values.get("seed")
        if seed is not None and not 0 <= seed < 2**63:
            self._report("seed", f"is {seed}, expected 0 to 2^63 - 1")
        return seed

    def _content_weight(self) -> float | None:
        weight = self._values.get("content_weight")
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            self._report("content_weight", f"is {weight}, expected a finite number, 0 or more")
        return None if weight is None else float(weight)

    def _pair_id(self) -> str:
        """The given id; empty where there is none."""
        pair_id: str | None = self._values.get("pair_id")
        if pair_id is not None and (problem := _id_problem(pair_id)):
            self._report("pair_id", problem)
        return pair_id or ""


def _with_generated_id(row: Row, occurrence: int) -> Row:
    identity = {
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
    # Without the unset values, so that an optional column of nulls does not change the ids.
    identity = {name: value for name, value in identity.items() if value is not None and value != []}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return replace(row, pair_id=number_id(digest, occurrence))


def _id_problem(pair_id: str) -> str | None:
    """Why a pair_id is not allowed; None if it is. Ids become the names of files, so none may be a path."""
    if not pair_id.strip():
        return "is empty"
    if pair_id in (".", "..") or "/" in pair_id or "\\" in pair_id:
        return f"{pair_id!r} could be a path; use no '/', '\\', '.' or '..' as an id"
    if any(unicodedata.category(character) == "Cc" for character in pair_id):
        return f"{pair_id!r} has a control character"
    if (size := len(pair_id.encode())) > _MAX_ID_BYTES:
        return f"{pair_id[:40]!r}… has {size} bytes, at most {_MAX_ID_BYTES} are allowed"
    return None
