"""Open and check a manifest, and stream its rows, or a range of them, in bounded memory."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.config.paths import is_url, is_utf8
from stylemill.errors import ManifestError, StorageError
from stylemill.manifest.duplicates import contains_hash, duplicate_hashes, duplicate_id_message, hash64
from stylemill.manifest.row import UNDECODABLE, number_id, parse_row
from stylemill.manifest.schema import KNOWN_COLUMNS, Problem, Row, carried_schema, is_list, schema_problems

_BATCH_BYTES = 16 << 20  # uncompressed; the memory used at once is a small multiple of it
_BATCH_ROWS = 4096
_WORST_BYTES = 1 << 30  # of a batch in which every row has the largest value of its dictionary page
_BUFFER_BYTES = 1 << 20  # without a buffer, pyarrow reads whole column chunks, which may be the whole file


@dataclass(frozen=True)
class Manifest:
    """An opened manifest. It consists of plain values, and can be sent to a worker, which opens the file itself."""

    path: Path
    base: Path  # of relative image paths
    num_rows: int
    schema: pa.Schema
    carried: pa.Schema  # the columns that go to the output unchanged
    style_is_list: bool
    group_starts: tuple[int, ...]  # first row of each row group, then num_rows
    batch_rows: int  # rows in memory at once
    images_per_pair: int = 1  # output rows of each manifest row

    @property
    def num_output_rows(self) -> int:
        return self.num_rows * self.images_per_pair

    def shard(self, number: int, size: int) -> range:
        """The output rows of shard `number`, with `size` rows in each shard and at most as many in the last one."""
        return range(number * size, min((number + 1) * size, self.num_output_rows))

    def with_images_per_pair(self, images_per_pair: int) -> Manifest:
        """This manifest with several output rows for each manifest row, which differ in their initial noise."""
        return replace(self, images_per_pair=images_per_pair)

    def output_rows(self, start: int, stop: int, occurrences: Mapping[int, int] | None = None) -> Iterator[Row]:
        """Output rows start to stop - 1. Row i is image i % images_per_pair of manifest row i // images_per_pair.

        With several images a pair, `pair_id` ends in `.<image_number>`, and the image number is added to a seed.
        """
        count = self.images_per_pair
        if count == 1:
            yield from self.rows(start, stop, occurrences)
            return
        for row in self.rows(start // count, -(-stop // count), occurrences):
            for number in range(count):
                if start <= (output_row := row.manifest_row * count + number) < stop:
                    seed = None if row.seed is None else (row.seed + number) % 2**63
                    pair_id = f"{row.pair_id}.{number}"
                    yield replace(row, output_row=output_row, pair_id=pair_id, seed=seed, image_number=number)

    def carried_output_rows(self, start: int, stop: int) -> pa.Table:
        """The carried columns of output rows start to stop - 1."""
        first = start // self.images_per_pair
        rows = self.carried_rows(first, -(-stop // self.images_per_pair))
        if not self.carried.names:
            return rows
        return rows.take([output_row // self.images_per_pair - first for output_row in range(start, stop)])

    def sha256(self) -> str:
        """The SHA-256 of the file, hex."""
        with _reading(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rows(
        self, start: int = 0, stop: int | None = None, occurrences: Mapping[int, int] | None = None
    ) -> Iterator[Row]:
        """Rows start to stop - 1 in order, from the row groups that have them.

        `occurrences` is the result of `repeated_rows`, and gives identical rows without a pair_id different ids.
        Raises ManifestError with row and column of the first bad value.
        """
        for number, values in self.raw_rows(start, stop):
            yield self._parse(number, values, (occurrences or {}).get(number, 1))

    def raw_rows(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers and unchecked values of the known columns, as `parse_row` takes them."""
        names = [name for name in KNOWN_COLUMNS if name in self.schema.names]
        for first, batch in self._batches(start, stop, names):
            columns = [_to_pylist(batch.column(name)) for name in names]
            for offset, values in enumerate(zip(*columns, strict=True)):
                yield first + offset, dict(zip(names, values, strict=True))

    def carried_rows(self, start: int = 0, stop: int | None = None) -> pa.Table:
        """The carried columns of rows start to stop - 1, in row order."""
        batches = [batch for _, batch in self._batches(start, stop, self.carried.names)]
        return pa.Table.from_batches(batches, schema=self.carried) if self.carried.names else pa.table({})

    def repeated_rows(self) -> dict[int, int]:
        """The occurrence (2, 3, …) of each row that repeats an earlier row and has no pair_id; checks every row.

        Scans the whole manifest once, and a second time where ids seem to repeat. Raises ManifestError for a bad row,
        and for a pair_id that two rows have.
        """
        hashes = array("Q", (hash64(row.pair_id) for row in self.rows()))
        suspects = duplicate_hashes(hashes)
        if not suspects:
            return {}
        sorted_hashes = np.unique(np.frombuffer(hashes, dtype=np.uint64))
        first_rows: dict[str, int] = {}
        counts: Counter[str] = Counter()
        occurrences: dict[int, int] = {}
        for number, values in self.raw_rows():
            row = self._parse(number, values)
            if hash64(row.pair_id) not in suspects:
                continue
            counts[row.pair_id] += 1
            first_row = first_rows.setdefault(row.pair_id, number)
            if first_row == number:
                continue
            if values.get("pair_id") is not None:
                raise self._error(Problem(number, "pair_id", duplicate_id_message(row.pair_id, first_row)))
            # Another row may have the numbered id as its pair_id: then the next number is used.
            while contains_hash(sorted_hashes, hash64(number_id(row.pair_id, counts[row.pair_id]))):
                counts[row.pair_id] += 1
            occurrences[number] = counts[row.pair_id]
        return occurrences

    def _parse(self, number: int, values: Mapping[str, Any], occurrence: int = 1) -> Row:
        row, problems = parse_row(number, values, occurrence)
        if row is None:
            raise self._error(problems[0])
        return row

    def _error(self, problem: Problem) -> ManifestError:
        return ManifestError(
            f"{self.path}: {problem}. Rows count from 0; 'stylemill manifest validate' lists every problem"
        )

    def _batches(self, start: int, stop: int | None, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The batches of rows start to stop - 1, each with the number of its first row."""
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        start = max(start, 0)
        if start >= stop or not columns:
            return
        groups = range(bisect_right(self.group_starts, start) - 1, bisect_left(self.group_starts, stop))
        first = self.group_starts[groups.start]
        with (
            _reading(self.path),
            pq.ParquetFile(self.path, metadata=_footer(self.path), buffer_size=_BUFFER_BYTES) as file,
        ):
            for some_groups in _group_ranges(file.metadata, groups):
                for batch in file.iter_batches(
                    self.batch_rows, row_groups=some_groups, columns=columns, use_threads=False
                ):
                    low, high = max(start - first, 0), min(stop - first, batch.num_rows)
                    if low < high:
                        # `select`, because reading the column 'style' also reads a column named 'style.name'.
                        yield first + low, batch.select(columns).slice(low, high - low)
                    first += batch.num_rows
            if first != self.group_starts[groups.stop]:
                raise ManifestError(
                    f"{self.path}: the Parquet file is damaged: it has fewer rows than its metadata says"
                )


def open_manifest(path: str | Path) -> Manifest:
    """Open a manifest and check its columns.

    Raises ManifestError where the file is absent, not Parquet, or empty, or its columns are not those of a manifest.
    """
    if is_url(path):
        raise ManifestError(f"{path}: only local manifests can be read; copy it to this machine first")
    path = Path(path).absolute()
    if not is_utf8(path):
        raise ManifestError(f"{str(path)!r} is not UTF-8; rename the file or folder")
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder; name the Parquet file in it")
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise ManifestError(f"{path}: is not a regular file; name a Parquet file")
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            sizes = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            problems = schema_problems(schema)
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest; 'stylemill manifest build' writes one") from None
    except PermissionError:
        raise ManifestError(f"{path}: no permission to read the manifest") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: the name of a column
        raise ManifestError(f"{path}: not a Parquet file, or a damaged one: {_one_line(error)}") from None
    if problems:
        raise ManifestError("\n".join(f"{path}: {problem}" for problem in problems))
    if metadata.num_rows == 0:
        raise ManifestError(f"{path}: the manifest has no rows")
    starts = [0, *accumulate(group.num_rows for group in sizes)]
    if starts[-1] != metadata.num_rows or min(group.num_rows for group in sizes) < 0:
        raise ManifestError(
            f"{path}: the Parquet file is damaged: its row groups do not add up to its {metadata.num_rows:,} rows"
        )
    row_bytes = max(group.total_byte_size / max(group.num_rows, 1) for group in sizes)
    return Manifest(
        path=path,
        base=path.parent,
        num_rows=metadata.num_rows,
        schema=schema,
        carried=carried_schema(schema),
        style_is_list=is_list(schema.field("style").type),
        group_starts=tuple(starts),
        batch_rows=max(
            1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(row_bytes, 1)), _WORST_BYTES // _max_dictionary_bytes(sizes))
        ),
    )


def _footer(path: Path) -> pq.FileMetaData:
    """The parsed footer. It grows with the manifest, so that reading it for each shard would cost more and more."""
    stat = path.stat()
    return _parse_footer(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=2)
def _parse_footer(path: Path, *_: int) -> pq.FileMetaData:
    return pq.read_metadata(path)


def _max_dictionary_bytes(groups: list[Any]) -> int:
    """The most bytes that one value of a dictionary page can have. A few bytes of a file can repeat it many times."""
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    return max((chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page), default=1) or 1


def _group_ranges(metadata: Any, groups: range) -> Iterator[list[int]]:
    """Neighbouring row groups to read in one call. pyarrow keeps all groups of a call in memory until it ends."""
    neighbours: list[int] = []
    size = 0
    for group in groups:
        group_bytes = metadata.row_group(group).total_byte_size
        if neighbours and size + group_bytes > _BATCH_BYTES:
            yield neighbours
            neighbours, size = [], 0
        neighbours.append(group)
        size += group_bytes
    yield neighbours


def _to_pylist(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # Parquet does not guarantee that strings are UTF-8
        values = [_to_python(value) for value in column]
    return values


def _to_python(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return UNDECODABLE


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{path}: the manifest was removed") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow raises OSError for damaged pages too, but without an errno.
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{path}: the manifest cannot be read just now: {error}") from error
        raise ManifestError(f"{path}: the Parquet file is damaged: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())  # may contain bytes of the file
