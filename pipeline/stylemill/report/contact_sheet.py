"""The contact sheet of a run: contents down, styles across, one picture to judge a job by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from stylemill.config.inputs import DEFAULT_INPUT_SETTINGS, InputSettings
from stylemill.errors import ImageError, TransientError
from stylemill.images.encode import encode_image
from stylemill.images.read import load_image
from stylemill.manifest.read import Manifest
from stylemill.manifest.schema import ImageRef, Row
from stylemill.store.atomic import replace_bytes
from stylemill.store.object_store.reads import local_copy
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record

THUMB, LABEL, GAP = 160, 16, 6  # pixels
_SCAN = 16  # rows looked at for each cell of the sheet; pairs drawn at random fill a sheet only sparsely
_BUFFER_BYTES = 1 << 20  # read of a column at a time: a shard's images need not fit in memory
_GREY, _INK = (214, 214, 214), (70, 70, 70)

# What tells a line of the sheet apart: its images' keys. Without a content image, the prompt stands in its place.
Key = tuple[str, ...]


@dataclass
class _Grid:
    contents: dict[Key, Row] = field(default_factory=dict)  # the first row that shows it, in manifest order
    styles: dict[Key, Row] = field(default_factory=dict)
    cells: dict[tuple[Key, Key], int] = field(default_factory=dict)  # -> manifest row


def write_contact_sheet(
    paths: RunPaths,
    manifest: Manifest,
    records: Iterable[Record],
    limit: tuple[int, int] = (8, 8),
    inputs: InputSettings = DEFAULT_INPUT_SETTINGS,
) -> Path | None:
    """Draw the first committed pairs, at most `limit` = (contents, styles), and return the sheet's path.

    `records` come by shard, and by generation within one, as `Ledger.records` gives them; it may be lazy.

    Reads a bounded number of rows and images however large the run is. A failed pair is a hatched cell, an image that
    cannot be read a grey one, a combination that is no committed pair an empty one. None when nothing is committed.
    Raises StorageError when the sheet cannot be written.
    """
    grid, used = _lay_out(manifest, records, limit)
    if not grid.cells:
        return None
    outputs: dict[int, Image.Image] = {}
    for record in used:
        wanted = {row for row in grid.cells.values() if record.first_row <= row < record.stop_row}
        if record.data is not None:
            outputs |= _outputs(paths, paths.output / record.data.name, wanted - outputs.keys())
    brief = inputs.model_copy(update={"retries": 0, "timeout": min(inputs.timeout, 10.0)})  # grey is good enough here
    sheet = _draw(grid, outputs, manifest.base, manifest.num_rows, brief)
    replace_bytes(paths, paths.contact_sheet, encode_image(np.asarray(sheet), "jpeg", 88))
    return paths.contact_sheet


def _lay_out(manifest: Manifest, records: Iterable[Record], limit: tuple[int, int]) -> tuple[_Grid, list[Record]]:
    """Choose the contents, the styles and the row of each cell; also the records of the shards these rows are in."""
    grid, used = _Grid(), []
    cells = limit[0] * limit[1]
    left = _SCAN * cells
    for _, one_shard in groupby(records, lambda record: record.shard):
        generations = list(one_shard)
        start, stop = generations[0].first_row, generations[0].stop_row
        before = len(grid.cells)
        for row in islice(manifest.output_rows(start, stop), left):
            left -= 1
            content, style = _content_key(row), tuple(image.key for image in row.styles)
            if content not in grid.contents and len(grid.contents) < limit[0]:
                grid.contents[content] = row
            if style not in grid.styles and len(grid.styles) < limit[1]:
                grid.styles[style] = row
            if content in grid.contents and style in grid.styles:
                grid.cells.setdefault((content, style), row.output_row)
            if len(grid.cells) == cells:
                break
        if len(grid.cells) > before:
            used += generations
        if len(grid.cells) == cells or not left:
            break
    return grid, used


def _content_key(row: Row) -> Key:
    return (row.content.key,) if row.content is not None else ("prompt", row.prompt or "")


def _outputs(paths: RunPaths, file: Path, wanted: set[int]) -> dict[int, Image.Image]:
    """Thumbnails of the `wanted` rows that `file` holds; all grey where it cannot be read: `verify` says why."""
    found: dict[int, Image.Image] = {}
    try:
        with local_copy(paths, file) as copy, pq.ParquetFile(copy, buffer_size=_BUFFER_BYTES) as data:
            for batch in data.iter_batches(16, columns=["row", "image"], use_threads=False):
                for number, image in zip(batch["row"].to_pylist(), batch["image"], strict=True):
                    if number in wanted:
                        found[number] = _thumbnail(ImageRef(None, image["bytes"].as_py()), copy.parent)
                if wanted <= found.keys():
                    break
    except (OSError, pa.ArrowException):
        return dict.fromkeys(wanted, Image.new("RGB", (THUMB, THUMB), _GREY)) | found
    return found


def _thumbnail(image_ref: ImageRef, base: Path, inputs: InputSettings = DEFAULT_INPUT_SETTINGS) -> Image.Image:
    try:
        image = load_image(image_ref.path, image_ref.data, base, (THUMB, THUMB), "pad", 1, inputs)
        return Image.fromarray(np.asarray(image.pixels))
    except (ImageError, TransientError):
        return Image.new("RGB", (THUMB, THUMB), _GREY)


def _draw(
    grid: _Grid, outputs: Mapping[int, Image.Image], base: Path, pairs: int, inputs: InputSettings
) -> Image.Image:
    step = THUMB + GAP
    rows, columns = len(grid.contents) + 1, len(grid.styles) + 1
    sheet = Image.new("RGB", (columns * step + GAP, rows * (step + LABEL) + GAP), "white")
    draw = ImageDraw.Draw(sheet)

    def place(row: int, column: int) -> tuple[int, int]:
        return GAP + column * step, GAP + row * (step + LABEL)

    for column, row in enumerate(grid.styles.values(), start=1):
        at = place(0, column)
        sheet.paste(_side_by_side(row.styles, base, inputs), at)
        _write(draw, at, " + ".join(_short(image.reference) for image in row.styles))
    for line, row in enumerate(grid.contents.values(), start=1):
        at = place(line, 0)
        if row.content is not None:
            sheet.paste(_thumbnail(row.content, base, inputs), at)
        _write(draw, at, _short(row.content.reference) if row.content is not None else row.prompt or "(none)")
    failed = _failed_cell()
    for line, content in enumerate(grid.contents, start=1):
        for column, style in enumerate(grid.styles, start=1):
            number = grid.cells.get((content, style))
            if number is not None:
                sheet.paste(outputs.get(number, failed), place(line, column))
    _write(draw, place(0, 0), f"{len(grid.cells):,} of {pairs:,} pairs")
    return sheet


def _side_by_side(images: tuple[ImageRef, ...], base: Path, inputs: InputSettings) -> Image.Image:
    """Several styles share one thumbnail: the first four, in a square of their own each."""
    if len(images) == 1:
        return _thumbnail(images[0], base, inputs)
    half = THUMB // 2
    shared = Image.new("RGB", (THUMB, THUMB), "white")
    for index, image in enumerate(images[:4]):
        shared.paste(_thumbnail(image, base, inputs).resize((half, half)), (index % 2 * half, index // 2 * half))
    return shared


def _failed_cell() -> Image.Image:
    cell = Image.new("RGB", (THUMB, THUMB), "white")
    draw = ImageDraw.Draw(cell)
    for x in range(-THUMB, THUMB, 12):
        draw.line([(x, THUMB), (x + THUMB, 0)], fill=_GREY, width=3)
    draw.rectangle([0, 0, THUMB - 1, THUMB - 1], outline=_GREY)
    box = (THUMB // 2 - 26, THUMB // 2 - 10, THUMB // 2 + 26, THUMB // 2 + 10)
    draw.rectangle(box, fill="white")
    draw.text((THUMB // 2, THUMB // 2), "failed", fill=_INK, font=ImageFont.load_default(12), anchor="mm")
    return cell


def _short(reference: str) -> str:
    return reference[:15] + "…" if reference.startswith("sha256:") else reference.rsplit("/", 1)[-1]


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> None:
    """Write a label below the thumbnail at `at`, cut to its width."""
    font = ImageFont.load_default(11)
    line = " ".join(text.split())[:200]
    while draw.textlength(line, font) > THUMB:
        line = line.rstrip("…")[:-1] + "…"
    draw.text((at[0], at[1] + THUMB + 2), line, fill=_INK, font=font)
