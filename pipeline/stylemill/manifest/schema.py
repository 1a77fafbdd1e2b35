"""What a manifest holds: its known columns, a row of it, and the problems a row can have."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyarrow import types as pt

from stylemill.config.sampling import Sampling


@dataclass(frozen=True)
class ImageRef:
    """One image of a manifest: a path (or URI) to read, or the encoded bytes, or bytes and the name they had."""

    path: str | None
    data: bytes | None = field(default=None, repr=False)

    @cached_property
    def key(self) -> str:
        """What tells two images of a manifest apart. Bytes go before the path: two folders may both hold `001.png`."""
        if self.data is not None:
            return f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        return self.path or ""

    @property
    def reference(self) -> str:
        """How the output names this image: the path as the manifest writes it, else `sha256:<hex>` of the bytes."""
        return self.path or self.key


@dataclass(frozen=True)
class Row:
    """One pair to stylize.

    `manifest_row` is its row in the manifest, `output_row` its row in the output, both counted from 0. They differ
    where a job makes several images of each pair.
    """

    manifest_row: int
    output_row: int
    pair_id: str
    content: ImageRef | None
    styles: tuple[ImageRef, ...]
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    content_weight: float | None = None
    content_mask: str | None = None
    style_masks: tuple[str, ...] = ()  # none, or one a style
    controls: tuple[ImageRef, ...] = ()  # none, or one a ControlNet of the job
    image_number: int = 0  # which of the images of one manifest row

    def images(self) -> Iterator[tuple[str, ImageRef]]:
        """Every image the row needs, with the column that names it."""
        if self.content is not None:
            yield "content", self.content
        for style in self.styles:
            yield "style", style
        if self.content_mask is not None:
            yield "content_mask", ImageRef(self.content_mask)
        for mask in self.style_masks:
            yield "style_mask", ImageRef(mask)
        for control in self.controls:
            yield "control", control


@dataclass(frozen=True)
class Problem:
    row: int  # counted from 0
    column: str
    message: str

    def __str__(self) -> str:
        return f"row {self.row}, column '{self.column}': {self.message}"


def _is_string(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        return _is_string(kind.value_type)
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _is_image(kind: pa.DataType) -> bool:
    """A path, or the struct `{bytes, path}` that Hugging Face datasets store images in."""
    if not pt.is_struct(kind):
        return _is_string(kind)
    fields = {item.name: item.type for item in kind}
    return (
        bool(fields)
        and fields.keys() <= {"bytes", "path"}
        and all(
            pt.is_null(item) or _is_binary(item) if name == "bytes" else _is_text(item) for name, item in fields.items()
        )
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_null(kind) or _is_string(kind)


def is_list(kind: pa.DataType) -> bool:
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


@dataclass(frozen=True)
class Column:
    name: str
    types: str
    meaning: str
    accepts: Callable[[Any], bool]
    required: bool = False


# Compared with the table of manifests/README.md by a test.
_COLUMNS = (
    Column("pair_id", "string", "names the pair; unique; made from the row's content when absent or null", _is_string),
    Column(
        "content",
        "string or struct `{bytes, path}`",
        "the image whose layout is kept: a path or URI, or the encoded image; null for none (texture, text to image)",
        _is_image,
    ),
    Column(
        "style",
        "string, struct `{bytes, path}`, or a list of either",
        "the image or images whose look is taken; never null or empty",
        lambda kind: _is_image(kind.value_type) if is_list(kind) else _is_image(kind),
        required=True,
    ),
    Column("prompt", "string", "text that guides denoising", _is_string),
    Column("negative_prompt", "string", "text that guidance leads away from", _is_string),
    Column("seed", "integer", "of the pair's initial latents, 0 or more; null: from the job's seed", pt.is_integer),
    Column(
        "content_weight",
        "number",
        "λ of this pair, 0 or more; null: the job's",
        lambda kind: pt.is_floating(kind) or pt.is_integer(kind),
    ),
    Column("content_mask", "string", "path of the label image of the content", _is_string),
    Column(
        "style_mask",
        "string, or a list of them",
        "path of the label image of the style; one for each style",
        lambda kind: _is_text(kind.value_type) if is_list(kind) else _is_string(kind),
    ),
    Column(
        "control",
        "string, struct `{bytes, path}`, or a list of either",
        "the image that the job's ControlNet denoises by (edges, depth, pose); one for each, where there are several",
        lambda kind: _is_image(kind.value_type) if is_list(kind) else _is_image(kind),
    ),
)
KNOWN: dict[str, Column] = {column.name: column for column in _COLUMNS}

OUTPUT_COLUMNS = (
    "pair_id",
    "row",
    "image",
    "content",
    "style",
    "width",
    "height",
    "seed",
    "settings",
    "ad_loss_first",
    "ad_loss_last",
    "content_loss_first",
    "content_loss_last",
    "content_sha256",
    "style_sha256",
    "sha256",
    "model",
)


def schema_problems(schema: pa.Schema) -> list[str]:
    """What keeps a table of this schema from being a manifest; empty when nothing does."""
    problems = []
    for name in sorted({name for name in schema.names if schema.names.count(name) > 1}):
        problems.append(f"column '{name}' stands there more than once; keep one")
    for item in schema:
        known = KNOWN.get(item.name)
        if known is None:
            if item.name in OUTPUT_COLUMNS:
                problems.append(f"column '{item.name}' has the name of an output column; rename it")
        # A table library that sees only nulls in an optional column writes it as type null.
        elif not known.accepts(item.type) and (known.required or not pt.is_null(item.type)):
            hint = "; in pandas, astype('Int64') keeps integers beside missing values" if item.name == "seed" else ""
            problems.append(f"column '{item.name}' is {item.type}, expected {known.types}{hint}")
    for known in KNOWN.values():
        if known.required and known.name not in schema.names:
            problems.append(f"no column '{known.name}'; its columns are: {', '.join(schema.names) or 'none'}")
    return problems


def schema_warnings(schema: pa.Schema) -> list[str]:
    """Carried columns that look as if they were meant to be read."""
    warnings = []
    for name in carried_schema(schema).names:
        near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8)
        if name in Sampling.model_fields:
            warnings.append(f"column '{name}' is only carried through: this setting is the job's, not a row's")
        elif near:
            warnings.append(f"column '{name}' is only carried through; was '{near[0]}' meant?")
    return warnings


def carried_schema(schema: pa.Schema) -> pa.Schema:
    """The columns that go through to the output as they are, with what Hugging Face metadata says of them."""
    carried = pa.schema([item for item in schema if item.name not in KNOWN])
    try:
        features: dict[str, Any] = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = {name: features[name] for name in carried.names if name in features}
    except (KeyError, TypeError, ValueError):
        features = {}
    if not features:
        return carried
    return carried.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
