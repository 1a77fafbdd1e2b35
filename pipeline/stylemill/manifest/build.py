"""Build a manifest: pair contents with styles in tile order and write Parquet in bounded memory."""

from __future__ import annotations

import csv
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.errors import ManifestError
from stylemill.manifest.schema import KNOWN, OUTPUT_COLUMNS
from stylemill.manifest.sources import Source, absolute_path, find_images, labels, relative_to_manifest
from stylemill.manifest.validate import validate_manifest

Pairing = Literal["product", "zip", "sample"]
Values = dict[str, Any]
Pair = tuple[str | None, str, int]  # content path, style path, 1 for the first time these two meet
_IMAGES = ("content", "style", "content_mask", "style_mask", "control")
_TYPES: dict[str, Any] = {"seed": pa.int64(), "content_weight": pa.float64()}  # every other column is a string


@dataclass(frozen=True)
class TileOrder:
    """The product of contents and styles in an order in which neighbours share images.

    Styles are cut into bands of nearly equal width; inside a band, pairs go content by content. Any range of
    consecutive pairs then covers few contents × few styles, wherever it starts. Every second band runs backwards, so
    that a range across its border meets the same contents again.
    """

    contents: int
    styles: int
    width: int  # styles of a band, at most
    by_style: bool = False  # contents are too few for a tile: no bands, all contents of one style after the other

    def __len__(self) -> int:
        return self.contents * self.styles

    def pair(self, position: int) -> tuple[int, int]:
        """(content, style) at a position of the order, 0 <= position < len."""
        if self.by_style:
            style, content = divmod(position, self.contents)
            return content, style
        band = bisect_right(self._edges, position // self.contents) - 1
        first, stop = self._edges[band], self._edges[band + 1]
        content, style = divmod(position - first * self.contents, stop - first)
        return (self.contents - 1 - content if band % 2 else content), first + style

    @cached_property
    def _edges(self) -> list[int]:
        bands = math.ceil(self.styles / self.width)
        return [band * self.styles // bands for band in range(bands + 1)]

    @classmethod
    def of(cls, contents: int, styles: int, rows: int, tile: tuple[int, int] | None = None) -> TileOrder:
        """The order whose blocks are `tile` (contents, styles), or as square as `rows` consecutive pairs can be."""
        if tile is not None:
            return cls(contents, styles, tile[1])
        side = max(1, math.isqrt(rows))
        return cls(contents, styles, side, by_style=contents < side)


def build_manifest(
    out: str | Path,
    contents: Source | None = None,
    styles: Source | None = None,
    *,
    pairs: str | Path | None = None,
    pairing: Pairing = "product",
    tile: tuple[int, int] | None = None,
    rows_per_group: int | None = None,
    samples: int | None = None,
    sample_seed: int = 0,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    seed: int | None = None,
    content_weight: float | None = None,
) -> int:
    """Write the manifest `out` and return its number of rows. Nothing stands at `out` before it is complete.

    `contents` and `styles` are folders, globs, files or lists of them (see `find_images`); without contents each style
    is a row. `pairs` is a CSV of finished pairs instead, its header naming manifest columns. `pairing`: product, every
    content with every style in tile order; zip, the first with the first and so on; sample, `samples` pairs of the
    product drawn by `sample_seed`, none twice. `tile` is (contents, styles) of a block; by default it is as square
    as the `rows_per_group` rows of a row group (64, or the tile's) allow. `prompt`, `negative_prompt`, `seed` and
    `content_weight` are set for all rows.

    Raises ManifestError for empty sources, unequal lengths in zip, too large a sample, a bad CSV, an unwritable `out`.
    """
    out = Path(out).expanduser()
    if out.suffix != ".parquet":
        raise ManifestError(f"{out}: a manifest is a Parquet file; give it a name that ends in .parquet")
    if tile is not None and min(tile) < 1:
        raise ManifestError(f"tile {tile[0]}x{tile[1]}: both sides must be 1 or more")
    group = rows_per_group if rows_per_group is not None else math.prod(tile or (8, 8))
    if group < 1:
        raise ManifestError(f"rows_per_group {group}: must be 1 or more")
    given = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "content_weight": content_weight}
    shared = {name: value for name, value in given.items() if value is not None}

    if pairs is not None:
        if contents is not None or styles is not None or samples is not None:
            raise ManifestError(
                f"{pairs}: a CSV of pairs is taken as it is; give no contents, styles or samples beside it"
            )
        pairs = Path(pairs).expanduser()
        columns = list(dict.fromkeys([*_header(pairs), *shared]))
        rows = ({**shared, **values} for values in _csv_rows(pairs, out.parent))
    else:
        if styles is None:
            raise ManifestError("no style images named; give a folder, a glob or a list of them")
        style_paths = find_images(styles, "style")
        content_paths = None if contents is None else find_images(contents, "content")
        columns = ["pair_id", *(["content"] if content_paths else []), "style", *shared]
        found = _pairs(content_paths, style_paths, pairing, tile, group, samples, sample_seed)
        rows = ({**values, **shared} for values in _named(found, content_paths, style_paths, out.parent))
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in columns])
    return _write(out, rows, schema, group, pairs)


def _pairs(
    contents: list[str] | None,
    styles: list[str],
    pairing: str,
    tile: tuple[int, int] | None,
    group: int,
    samples: int | None,
    sample_seed: int,
) -> Iterator[Pair]:
    """Content, style and occurrence of every row."""
    if (samples is None) == (pairing == "sample"):
        raise ManifestError("a number of samples belongs to the pairing 'sample', and that pairing needs one")
    if pairing == "zip" and contents is not None:
        if len(contents) != len(styles):
            raise ManifestError(
                f"zip pairs one content with one style, but there are {len(contents)} contents and {len(styles)} styles"
            )
        return _numbered(zip(contents, styles, strict=True))
    if pairing not in ("product", "zip", "sample"):
        raise ManifestError(f"pairing {pairing!r} is not one of: product, zip, sample")
    # A file that two sources share is one image of a product.
    styles = list(dict.fromkeys(styles))
    some: list[str] | list[None] = [None] if contents is None else list(dict.fromkeys(contents))
    order = TileOrder.of(len(some), len(styles), group, tile)
    positions: Iterable[int] = range(len(order))
    if samples is not None:
        if not 1 <= samples <= len(order):
            raise ManifestError(
                f"{samples} samples: there are {len(order)} pairs to draw from, and at least 1 is needed"
            )
        drawn = np.random.default_rng(sample_seed).choice(len(order), size=samples, replace=False)
        positions = sorted(int(position) for position in drawn)  # in tile order: neighbours share images
    return ((some[content], styles[style], 1) for content, style in map(order.pair, positions))


def _numbered(pairs: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    times: Counter[tuple[str, str]] = Counter()
    for content, style in pairs:
        times[content, style] += 1
        yield content, style, times[content, style]


def _named(pairs: Iterable[Pair], contents: list[str] | None, styles: list[str], folder: Path) -> Iterator[Values]:
    content_labels, style_labels = labels(contents or []), labels(styles)
    written = {path: relative_to_manifest(path, folder) for path in (*content_labels, *style_labels)}
    for path in written.values():
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ManifestError(f"{path!r}: the file name is not UTF-8; rename it") from None
    for content, style, occurrence in pairs:
        parts = [] if content is None else [content_labels[content]]
        parts.append(style_labels[style])
        if occurrence > 1:
            parts.append(str(occurrence))
        values: Values = {"pair_id": "__".join(parts), "style": written[style]}
        if content is not None:
            values["content"] = written[content]
        yield values


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error
    for name in header:
        if header.count(name) > 1 or not name.strip():
            raise ManifestError(f"{path}: column {name!r} of the header is repeated or has no name")
        if name not in KNOWN and name in OUTPUT_COLUMNS:
            raise ManifestError(f"{path}: column '{name}' has the name of an output column; rename it")
    if "style" not in header:
        raise ManifestError(f"{path}: no column 'style' in the header; it has: {', '.join(header) or 'nothing'}")
    return header


def _csv_rows(path: Path, folder: Path) -> Iterator[Values]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for values in reader:
                where = f"{path}: line {reader.line_num}"
                if None in values or None in values.values():
                    raise ManifestError(f"{where}: has another number of values than the header")
                yield {name: _cell(name, text, path, folder, where) for name, text in values.items() if text != ""}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error


def _cell(name: str, text: str, path: Path, folder: Path, where: str) -> Any:
    if name in _IMAGES:
        return relative_to_manifest(absolute_path(text, path), folder)
    if name not in _TYPES:
        return text
    try:
        return int(text) if name == "seed" else float(text)
    except ValueError:
        raise ManifestError(f"{where}, column '{name}': {text!r}, expected {KNOWN[name].types}") from None


def _write(out: Path, rows: Iterator[Values], schema: pa.Schema, group: int, pairs: Path | None) -> int:
    """Write beside `out`, check, then rename: a ParquetWriter left by an exception finishes a valid partial file."""
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    count = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(part, schema, compression="zstd", write_statistics=False) as writer:
            while chunk := list(islice(rows, group)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema), row_group_size=group)
                count += len(chunk)
        if not count:
            raise ManifestError(f"{pairs}: no rows below the header")
        report = validate_manifest(part, check_files=False, limit=1)
        if report.problems:
            raise ManifestError(f"{pairs or out}: {report.problems[0]}. Rows count from 0, below a header")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, out)
    except OSError as error:
        raise ManifestError(f"{out}: the manifest cannot be written: {error.strerror or error}") from error
    except (OverflowError, pa.ArrowException) as error:
        raise ManifestError(f"{pairs or out}: {error}") from error
    finally:
        with suppress(OSError):  # a folder that could not be made must not hide the reason
            part.unlink(missing_ok=True)
    return count
