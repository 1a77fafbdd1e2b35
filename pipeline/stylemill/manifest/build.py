"""Build a manifest: pair contents with styles in tile order, and write Parquet in bounded memory."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.config.paths import is_utf8
from stylemill.errors import ManifestError
from stylemill.manifest.csv_pairs import read_header, read_pairs
from stylemill.manifest.image_names import SEPARATOR, unique_names
from stylemill.manifest.sources import Source, find_images, relative_to_manifest
from stylemill.manifest.tile_order import TileOrder
from stylemill.manifest.validate import validate_manifest
from stylemill.plural import counted

Pairing = Literal["product", "zip", "sample"]
RowValues = dict[str, Any]
_TYPES: dict[str, Any] = {"seed": pa.int64(), "content_weight": pa.float64()}  # every other column is a string


class _ImagePair(NamedTuple):
    content: str | None  # absolute paths or URLs
    style: str
    occurrence: int  # 1 for the first pair of these two images


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
    force: bool = False,
) -> int:
    """Write the manifest `out` and return its number of rows. `out` exists only once it is complete.

    `contents` and `styles` are folders, globs, files or lists of them (see `find_images`); without contents, each style
    is a row. `pairing`: product, every content with every style in tile order; zip, the first with the first and so on;
    sample, `samples` different pairs of the product, drawn with `sample_seed`. `tile` is (contents, styles) of a tile;
    by default it is as square as the `rows_per_group` rows of a row group (64, or the tile's) allow.
    Instead of all these, `pairs` is a CSV of pairs, whose header names columns of the manifest.
    `prompt`, `negative_prompt`, `seed` and `content_weight` are set for all rows. With `force`, an `out` that exists is
    replaced.

    Raises ManifestError where `out` exists, for empty sources, unequal lengths in zip, too large a sample, a bad CSV,
    an unwritable `out`.
    """
    out = Path(out).expanduser()
    if not is_utf8(out.absolute()):
        raise ManifestError(f"{str(out.absolute())!r} is not UTF-8; rename the file or folder")
    if out.suffix != ".parquet":
        raise ManifestError(f"{out}: a manifest is a Parquet file; give it a name that ends in .parquet")
    if out.exists() and not force:
        raise ManifestError(f"{out}: exists already; choose another name, or replace it with --force")
    if tile is not None and min(tile) < 1:
        raise ManifestError(f"tile {tile[0]}x{tile[1]}: both sides must be 1 or more")
    group_rows = rows_per_group if rows_per_group is not None else math.prod(tile or (8, 8))
    if group_rows < 1:
        raise ManifestError(f"rows_per_group {group_rows}: must be 1 or more")
    options = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "content_weight": content_weight}
    shared = {name: value for name, value in options.items() if value is not None}

    if pairs is not None:
        if contents is not None or styles is not None or samples is not None:
            raise ManifestError(f"{pairs}: give no contents, styles or samples with a CSV of pairs")
        pairs = Path(pairs).expanduser()
        columns = list(dict.fromkeys([*read_header(pairs), *shared]))
        rows = ({**shared, **values} for values in read_pairs(pairs, out.parent))
    else:
        if styles is None:
            raise ManifestError("no style images named; give a folder, a glob or a list of them")
        style_paths = find_images(styles, "style")
        content_paths = None if contents is None else find_images(contents, "content")
        columns = ["pair_id", *(["content"] if content_paths else []), "style", *shared]
        image_pairs = _pair_images(content_paths, style_paths, pairing, tile, group_rows, samples, sample_seed)
        rows = ({**values, **shared} for values in _rows_of(image_pairs, content_paths, style_paths, out.parent))
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in columns])
    return _write(out, rows, schema, group_rows, pairs)


def _pair_images(
    contents: list[str] | None,
    styles: list[str],
    pairing: str,
    tile: tuple[int, int] | None,
    group_rows: int,
    samples: int | None,
    sample_seed: int,
) -> Iterator[_ImagePair]:
    if (samples is None) == (pairing == "sample"):
        raise ManifestError("a number of samples belongs to the pairing 'sample', and that pairing needs one")
    if pairing == "zip" and contents is not None:
        if len(contents) != len(styles):
            raise ManifestError(
                "zip pairs one content with one style, but the lists have "
                f"{counted(len(contents), 'content')} and {counted(len(styles), 'style')}"
            )
        return _count_occurrences(zip(contents, styles, strict=True))
    if pairing not in ("product", "zip", "sample"):
        raise ManifestError(f"pairing {pairing!r} is not one of: product, zip, sample")
    # A file that two sources have in common is one image of a product.
    styles = list(dict.fromkeys(styles))
    contents_or_none: list[str] | list[None] = [None] if contents is None else list(dict.fromkeys(contents))
    order = TileOrder.of(len(contents_or_none), len(styles), group_rows, tile)
    positions = range(len(order)) if samples is None else _draw(samples, len(order), sample_seed)
    return (_ImagePair(contents_or_none[content], styles[style], 1) for content, style in map(order.pair, positions))


def _draw(samples: int, pairs: int, seed: int) -> Iterable[int]:
    """`samples` of the positions below `pairs`, in ascending order, so that neighbours share images."""
    if not 1 <= samples <= pairs:
        raise ManifestError(
            f"{counted(samples, 'sample')}: the product has {counted(pairs, 'pair')} to draw from, and at least 1 is "
            "needed"
        )
    drawn = np.random.default_rng(seed).choice(pairs, size=samples, replace=False)
    return sorted(int(position) for position in drawn)


def _count_occurrences(pairs: Iterable[tuple[str, str]]) -> Iterator[_ImagePair]:
    counts: Counter[tuple[str, str]] = Counter()
    for content, style in pairs:
        counts[content, style] += 1
        yield _ImagePair(content, style, counts[content, style])


def _rows_of(
    pairs: Iterable[_ImagePair], contents: list[str] | None, styles: list[str], manifest_folder: Path
) -> Iterator[RowValues]:
    """The rows of a manifest for these pairs, with unique ids and with paths relative to its folder."""
    content_names, style_names = unique_names(contents or []), unique_names(styles)
    written = {path: relative_to_manifest(path, manifest_folder) for path in (*content_names, *style_names)}
    for path in written.values():
        if not is_utf8(path):
            raise ManifestError(f"{path!r} is not UTF-8; rename the file or folder")
    for content, style, occurrence in pairs:
        parts = [] if content is None else [content_names[content]]
        parts.append(style_names[style])
        if occurrence > 1:
            parts.append(str(occurrence))
        values: RowValues = {"pair_id": SEPARATOR.join(parts), "style": written[style]}
        if content is not None:
            values["content"] = written[content]
        yield values


def _write(out: Path, rows: Iterator[RowValues], schema: pa.Schema, group_rows: int, pairs: Path | None) -> int:
    """Write a temporary file beside `out`, validate it, and rename it; returns the number of rows.

    Without the temporary file, an error would leave a valid Parquet file with a part of the rows.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    written = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(part, schema, compression="zstd", write_statistics=False) as writer:
            while chunk := list(islice(rows, group_rows)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema), row_group_size=group_rows)
                written += len(chunk)
        if not written:
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
        with suppress(OSError):  # where the folder could not be created, this must not hide the error
            part.unlink(missing_ok=True)
    return written
