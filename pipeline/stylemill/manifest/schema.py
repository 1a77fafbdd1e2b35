"""The schema of manifests: known columns, a row, references to images, and the problems a row can have."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import types as pt

from stylemill.config.paths import is_url
from stylemill.config.sampling import Sampling


@dataclass(frozen=True)
class ImageRef:
    """One image of a manifest: a path or URL, or the encoded bytes, or the bytes and their original name."""

    path: str | None
    data: bytes | None = field(default=None, repr=False)

    @cached_property
    def key(self) -> str:
        """Identifies an image within a manifest: by its bytes, if it has them, since two folders may have a `1.png`."""
        if self.data is not None:
            return f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        return self.path or ""

    @property
    def reference(self) -> str:
        """The name of this image in the output: the path as in the manifest, or else `sha256:<hex>` of the bytes."""
        return self.path or self.key

    @property
    def is_relative(self) -> bool:
        """Whether this is a file at a path relative to the manifest's folder."""
        return self.data is None and not is_url(self.path or "") and not Path(self.path or "").is_absolute()


@dataclass(frozen=True)
class Row:
    """One pair to stylize.

    `manifest_row` is its row in the manifest, and `output_row` its row in the output, both counted from 0. They differ
    where a job has several output rows for each manifest row.
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
    style_masks: tuple[str, ...] = ()  # one for each style, or none
    controls: tuple[ImageRef, ...] = ()  # one for each ControlNet of the job, or none
    image_number: int = 0  # of this output row among those of its manifest row

    def images(self) -> Iterator[tuple[str, ImageRef]]:
        """Every image of the row, with the name of its column."""
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

    @property
    def has_relative_paths(self) -> bool:
        return any(image.is_relative for _, image in self.images())


@dataclass(frozen=True)
class Problem:
    """What is wrong with one value of a manifest."""

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
    """Whether this is the type of a path, or of the struct `{bytes, path}` of images in Hugging Face datasets."""
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
    """A known column. `manifests/README.md` has its `types` and `meaning`."""

    name: str
    types: str
    meaning: str
    accepts: Callable[[Any], bool]  # takes an Arrow type
    required: bool = False


# A test compares them with the table in manifests/README.md.
_COLUMNS = (
    Column("pair_id", "string", "unique name of the pair; if absent or null, a hash of the row", _is_string),
    Column(
        "content",
        "string or struct `{bytes, path}`",
        "the image whose layout is kept: a path or URL, or the encoded image; null for none (texture, text to image)",
        _is_image,
    ),
    Column(
        "style",
        "string, struct `{bytes, path}`, or a list of either",
        "the image or images whose style is used; never null or empty",
        lambda kind: _is_image(kind.value_type) if is_list(kind) else _is_image(kind),
        required=True,
    ),
    Column(
        "prompt",
        "string",
        "the prompt for denoising; with `sampling.reuse_prediction` it must be null or empty",
        _is_string,
    ),
    Column("negative_prompt", "string", "the negative prompt of classifier-free guidance", _is_string),
    Column(
        "seed", "integer", "seed of the pair's initial latents, 0 or more; null: from the job's seed", pt.is_integer
    ),
    Column(
        "content_weight",
        "number",
        "λ of this pair, 0 or more; null: the job's",
        lambda kind: pt.is_floating(kind) or pt.is_integer(kind),
    ),
    Column("content_mask", "string", "path of the mask of the content", _is_string),
    Column(
        "style_mask",
        "string, or a list of them",
        "path of the mask of the style; one for each style",
        lambda kind: _is_text(kind.value_type) if is_list(kind) else _is_string(kind),
    ),
    Column(
        "control",
        "string, struct `{bytes, path}`, or a list of either",
        "the input of the job's ControlNet (edges, depth, pose); one for each ControlNet, where there are several",
        lambda kind: _is_image(kind.value_type) if is_list(kind) else _is_image(kind),
    ),
)
KNOWN_COLUMNS: dict[str, Column] = {column.name: column for column in _COLUMNS}

OUTPUT_COLUMNS = (
    "pair_id",
    "row",
    "image",
    "content",
    "style",
    "base",
    "width",
    "height",
    "seed",
    "prompt",
    "negative_prompt",
    "content_weight",
    "settings",
    "style_distance_before",
    "style_distance",
    "content_distance",
    "content_sha256",
    "style_sha256",
    "sha256",
    "model",
)


def schema_problems(schema: pa.Schema) -> list[str]:
    """Why a table with this schema is no manifest; empty if it is one."""
    problems = []
    for name in sorted({name for name in schema.names if schema.names.count(name) > 1}):
        problems.append(f"duplicate column '{name}'; keep one of them")
    for item in schema:
        known = KNOWN_COLUMNS.get(item.name)
        if known is None:
            if item.name in OUTPUT_COLUMNS:
                problems.append(f"column '{item.name}' has the name of an output column; rename it")
        # An optional column with only nulls may be written with the type null.
        elif not known.accepts(item.type) and (known.required or not pt.is_null(item.type)):
            hint = "; in pandas, astype('Int64') keeps integers with missing values" if item.name == "seed" else ""
            problems.append(f"column '{item.name}' is {item.type}, expected {known.types}{hint}")
    for known in KNOWN_COLUMNS.values():
        if known.required and known.name not in schema.names:
            problems.append(f"no column '{known.name}'; its columns are: {', '.join(schema.names) or 'none'}")
    return problems


def schema_warnings(schema: pa.Schema) -> list[str]:
    """Warnings about carried columns whose names are like those of known columns or settings."""
    warnings = []
    for name in carried_schema(schema).names:
        near = difflib.get_close_matches(name, KNOWN_COLUMNS, n=1, cutoff=0.8)
        if name in Sampling.model_fields:
            warnings.append(f"column '{name}' is only carried through: it is a setting of the job, not of a row")
        elif near:
            warnings.append(f"column '{name}' is only carried through; did you mean '{near[0]}'?")
    return warnings


def carried_schema(schema: pa.Schema) -> pa.Schema:
    """The columns that go to the output unchanged, with their Hugging Face metadata."""
    carried = pa.schema([item for item in schema if item.name not in KNOWN_COLUMNS])
    try:
        features: dict[str, Any] = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = {name: features[name] for name in carried.names if name in features}
    except (KeyError, TypeError, ValueError):
        features = {}
    if not features:
        return carried
    return carried.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
