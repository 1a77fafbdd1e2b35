"""The contact sheet of a run: one image with content images down, style images across and output images between."""

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
_ROWS_PER_CELL = 16  # output rows read for each cell, at most: randomly drawn pairs fill few of the cells
_BUFFER_BYTES = 1 << 20  # so that a column is read in parts: a shard's images need not fit in memory
_GREY, _INK = (214, 214, 214), (70, 70, 70)

# Identifies a content or style header of the sheet by the keys of its images; without a content image, by the prompt.
HeaderKey = tuple[str, ...]


@dataclass
class _Layout:
    """The headers of the sheet, each with the first row that has it, and the output row in each cell."""

    contents: dict[HeaderKey, Row] = field(default_factory=dict)
    styles: dict[HeaderKey, Row] = field(default_factory=dict)
    cells: dict[tuple[HeaderKey, HeaderKey], int] = field(default_factory=dict)


def write_contact_sheet(
    paths: RunPaths,
    manifest: Manifest,
    records: Iterable[Record],
    limit: tuple[int, int] = (8, 8),
    inputs: InputSettings = DEFAULT_INPUT_SETTINGS,
) -> Path | None:
    """Draw the first committed pairs and return the path of the sheet; None when nothing is committed.

    `manifest` must have the run's images_per_pair. `records` are in the order of `Ledger.records` (by shard, then by
    generation) and may be lazy. `limit` is the largest number of (contents, styles). The number of rows and images that
    are read does not grow with the run. Of several images of a pair, the cell shows the first. A failed output row is a
    hatched cell, an image that cannot be read a grey one, and a combination without a committed pair an empty one.
    Raises StorageError when the sheet cannot be written.
    """
    layout, used = _choose_cells(manifest, records, limit)
    if not layout.cells:
        return None
    outputs: dict[int, Image.Image] = {}
    for record in used:
        wanted = {row for row in layout.cells.values() if record.first_row <= row < record.stop_row}
        if record.data is not None:
            outputs |= _read_outputs(paths, paths.output / record.data.name, wanted - outputs.keys())
    # A grey header is acceptable here, a long wait for a slow server is not.
    inputs = inputs.model_copy(update={"retries": 0, "timeout": min(inputs.timeout, 10.0)})
    sheet = _draw_sheet(layout, outputs, manifest.base, manifest.num_rows, inputs)
    replace_bytes(paths, paths.contact_sheet, encode_image(np.asarray(sheet), "jpeg", 88))
    return paths.contact_sheet


def _choose_cells(
    manifest: Manifest, records: Iterable[Record], limit: tuple[int, int]
) -> tuple[_Layout, list[Record]]:
    """Choose headers and cells; return them with the records of the shards that have the cells' output rows."""
    layout, used = _Layout(), []
    cells = limit[0] * limit[1]
    rows_left = _ROWS_PER_CELL * cells
    for _, records_of_shard in groupby(records, lambda record: record.shard):
        generations = list(records_of_shard)
        start, stop = generations[0].first_row, generations[0].stop_row
        cells_before = len(layout.cells)
        for row in islice(manifest.output_rows(start, stop), rows_left):
            rows_left -= 1
            content, style = _content_key(row), tuple(image.key for image in row.styles)
            if content not in layout.contents and len(layout.contents) < limit[0]:
                layout.contents[content] = row
            if style not in layout.styles and len(layout.styles) < limit[1]:
                layout.styles[style] = row
            if content in layout.contents and style in layout.styles:
                layout.cells.setdefault((content, style), row.output_row)
            if len(layout.cells) == cells:
                break
        if len(layout.cells) > cells_before:
            used += generations
        if len(layout.cells) == cells or not rows_left:
            break
    return layout, used


def _content_key(row: Row) -> HeaderKey:
    return (row.content.key,) if row.content is not None else ("prompt", row.prompt or "")


def _read_outputs(paths: RunPaths, file: Path, wanted: set[int]) -> dict[int, Image.Image]:
    """Thumbnails of the `wanted` output rows in `file`; grey where the file is damaged, which `verify` reports."""
    thumbnails: dict[int, Image.Image] = {}
    try:
        with local_copy(paths, file) as copy, pq.ParquetFile(copy, buffer_size=_BUFFER_BYTES) as data:
            for batch in data.iter_batches(16, columns=["row", "image"], use_threads=False):
                for row, image in zip(batch["row"].to_pylist(), batch["image"], strict=True):
                    if row in wanted:
                        thumbnails[row] = _make_thumbnail(ImageRef(None, image["bytes"].as_py()), copy.parent)
                if wanted <= thumbnails.keys():
                    break
    except (OSError, pa.ArrowException):
        return dict.fromkeys(wanted, Image.new("RGB", (THUMB, THUMB), _GREY)) | thumbnails
    return thumbnails


def _make_thumbnail(image_ref: ImageRef, base: Path, inputs: InputSettings = DEFAULT_INPUT_SETTINGS) -> Image.Image:
    try:
        image = load_image(image_ref.path, image_ref.data, base, (THUMB, THUMB), "pad", 1, inputs)
        return Image.fromarray(np.asarray(image.pixels))
    except (ImageError, TransientError):
        return Image.new("RGB", (THUMB, THUMB), _GREY)


def _draw_sheet(
    layout: _Layout, outputs: Mapping[int, Image.Image], base: Path, pairs: int, inputs: InputSettings
) -> Image.Image:
    """Draw headers and cells. `base` is the folder of relative image paths, `pairs` the number that the label shows."""
    step = THUMB + GAP
    width, height = (len(layout.styles) + 1) * step, (len(layout.contents) + 1) * (step + LABEL)
    sheet = Image.new("RGB", (width + GAP, height + GAP), "white")
    draw = ImageDraw.Draw(sheet)

    def position(x: int, y: int) -> tuple[int, int]:  # of a cell; the headers are column and row 0
        return GAP + x * step, GAP + y * (step + LABEL)

    for x, row in enumerate(layout.styles.values(), start=1):
        sheet.paste(_combine_styles(row.styles, base, inputs), position(x, 0))
        _write_label(draw, position(x, 0), " + ".join(_shorten(image.reference) for image in row.styles))
    for y, row in enumerate(layout.contents.values(), start=1):
        if row.content is not None:
            sheet.paste(_make_thumbnail(row.content, base, inputs), position(0, y))
        label = _shorten(row.content.reference) if row.content is not None else row.prompt or "(none)"
        _write_label(draw, position(0, y), label)
    failed = _draw_failed_cell()
    for y, content in enumerate(layout.contents, start=1):
        for x, style in enumerate(layout.styles, start=1):
            output_row = layout.cells.get((content, style))
            if output_row is not None:
                sheet.paste(outputs.get(output_row, failed), position(x, y))
    _write_label(draw, position(0, 0), f"{len(layout.cells):,} of {pairs:,} pairs")
    return sheet


def _combine_styles(images: tuple[ImageRef, ...], base: Path, inputs: InputSettings) -> Image.Image:
    """One thumbnail for all styles of a pair: of several, the first four, a quarter of it each."""
    if len(images) == 1:
        return _make_thumbnail(images[0], base, inputs)
    half = THUMB // 2
    combined = Image.new("RGB", (THUMB, THUMB), "white")
    for index, image in enumerate(images[:4]):
        combined.paste(_make_thumbnail(image, base, inputs).resize((half, half)), (index % 2 * half, index // 2 * half))
    return combined


def _draw_failed_cell() -> Image.Image:
    cell = Image.new("RGB", (THUMB, THUMB), "white")
    draw = ImageDraw.Draw(cell)
    for x in range(-THUMB, THUMB, 12):
        draw.line([(x, THUMB), (x + THUMB, 0)], fill=_GREY, width=3)
    draw.rectangle([0, 0, THUMB - 1, THUMB - 1], outline=_GREY)
    box = (THUMB // 2 - 26, THUMB // 2 - 10, THUMB // 2 + 26, THUMB // 2 + 10)
    draw.rectangle(box, fill="white")
    draw.text((THUMB // 2, THUMB // 2), "failed", fill=_INK, font=ImageFont.load_default(12), anchor="mm")
    return cell


def _shorten(reference: str) -> str:
    return reference[:15] + "…" if reference.startswith("sha256:") else reference.rsplit("/", 1)[-1]


def _write_label(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str) -> None:
    """Write a label below the thumbnail at `position`, cut to its width."""
    font = ImageFont.load_default(11)
    line = " ".join(text.split())[:200]
    while draw.textlength(line, font) > THUMB:
        line = line.rstrip("…")[:-1] + "…"
    draw.text((position[0], position[1] + THUMB + 2), line, fill=_INK, font=font)
