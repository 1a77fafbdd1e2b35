"""Read a manifest: open and check it, stream its rows or any range of them in bounded memory."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.config.paths import is_url
from stylemill.errors import ManifestError, StorageError
from stylemill.manifest.row import UNDECODABLE, numbered, parse_row
from stylemill.manifest.schema import KNOWN, Problem, Row, carried_schema, is_list, schema_problems

_BATCH_BYTES = 16 << 20  # uncompressed; what is in memory at once is a small multiple of it
_BATCH_ROWS = 4096
_WORST_BYTES = 1 << 30  # of a batch whose every row repeats the largest value that a dictionary page can hold
_BUFFER_BYTES = 1 << 20  # without a buffer, pyarrow reads whole column chunks: all of a one-group file


@dataclass(frozen=True)
class Manifest:
    """An opened manifest. Plain values only: it can be sent to a worker, which opens the file for itself."""

    path: Path
    base: Path  # relative image paths start here
    num_rows: int
    schema: pa.Schema
    carried: pa.Schema
    style_is_list: bool
    group_starts: tuple[int, ...]  # first row of each row group, then num_rows
    batch_rows: int
    images_per_pair: int = 1  # output rows of each manifest row

    @property
    def num_output_rows(self) -> int:
        return self.num_rows * self.images_per_pair

    def shard(self, number: int, size: int) -> range:
        """The output rows of shard `number` where shards have `size` of them, the last one maybe fewer."""
        return range(number * size, min((number + 1) * size, self.num_output_rows))

    def with_images_per_pair(self, images_per_pair: int) -> Manifest:
        """This manifest with several output rows for each manifest row. They differ in their initial noise."""
        return replace(self, images_per_pair=images_per_pair)

    def output_rows(self, start: int, stop: int, occurrences: Mapping[int, int] | None = None) -> Iterator[Row]:
        """Output rows start..stop: output row i is image i % images_per_pair of manifest row i // images_per_pair.

        With several images a pair, `pair_id` ends in `.<image_number>` and a seed grows by the image number.
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
        """The carried columns of output rows start..stop."""
        first = start // self.images_per_pair
        rows = self.carried_rows(first, -(-stop // self.images_per_pair))
        if not self.carried.names:
            return rows
        return rows.take([output_row // self.images_per_pair - first for output_row in range(start, stop)])

    def sha256(self) -> str:
        """Digest of the file, hex."""
        with _reading(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rows(
        self, start: int = 0, stop: int | None = None, occurrences: Mapping[int, int] | None = None
    ) -> Iterator[Row]:
        """Rows start..stop in order, reading only the row groups that hold them.

        `occurrences` is what `repeated_rows` found: it tells identical rows without a pair_id apart.
        Raises ManifestError naming row and column of the first bad row.
        """
        for number, values in self.records(start, stop):
            yield self._row(number, values, (occurrences or {}).get(number, 1))

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers and plain values of the known columns, unchecked; `parse_row` makes rows of them."""
        names = [name for name in KNOWN if name in self.schema.names]
        for first, batch in self._batches(start, stop, names):
            columns = [_plain(batch.column(name)) for name in names]
            for offset, values in enumerate(zip(*columns, strict=True)):
                yield first + offset, dict(zip(names, values, strict=True))

    def carried_rows(self, start: int = 0, stop: int | None = None) -> pa.Table:
        """The carried columns of rows start..stop, in row order."""
        batches = [batch for _, batch in self._batches(start, stop, self.carried.names)]
        return pa.Table.from_batches(batches, schema=self.carried) if self.carried.names else pa.table({})

    def repeated_rows(self) -> dict[int, int]:
        """Row → occurrence (2, 3, …) of rows without a pair_id that repeat an earlier row. Checks every row on the way.

        Scans the whole manifest with 8 bytes of memory a row, a second time only where ids seem to repeat.
        Raises ManifestError for a bad row or a pair_id given twice.
        """
        hashes = array("Q", (hash64(row.pair_id) for row in self.rows()))
        distinct = np.unique(np.frombuffer(hashes, dtype=np.uint64))
        suspects = repeated(hashes)
        if not suspects:
            return {}
        first: dict[str, int] = {}
        times: Counter[str] = Counter()
        occurrences: dict[int, int] = {}
        for number, values in self.records():
            row = self._row(number, values)
            if hash64(row.pair_id) not in suspects:
                continue
            times[row.pair_id] += 1
            if first.setdefault(row.pair_id, number) == number:
                continue
            if values.get("pair_id") is not None:
                raise self._error(Problem(number, "pair_id", repeats(row.pair_id, first[row.pair_id])))
            # A suffixed name may be the given name of another row: the next number is taken then.
            while _contains(distinct, hash64(numbered(row.pair_id, times[row.pair_id]))):
                times[row.pair_id] += 1
            occurrences[number] = times[row.pair_id]
        return occurrences

    def _row(self, number: int, values: Mapping[str, Any], occurrence: int = 1) -> Row:
        row, problems = parse_row(number, values, occurrence)
        if row is None:
            raise self._error(problems[0])
        return row

    def _error(self, problem: Problem) -> ManifestError:
        return ManifestError(
            f"{self.path}: {problem}. Rows count from 0; 'stylemill manifest validate' lists every problem"
        )

    def _batches(self, start: int, stop: int | None, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of rows start..stop with the number of their first row."""
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        start = max(start, 0)
        if start >= stop or not columns:
            return
        groups = range(bisect_right(self.group_starts, start) - 1, bisect_left(self.group_starts, stop))
        first = self.group_starts[groups.start]
        with _reading(self.path), pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES) as file:
            for run in _runs(file.metadata, groups):
                for batch in file.iter_batches(self.batch_rows, row_groups=run, columns=columns, use_threads=False):
                    low, high = max(start - first, 0), min(stop - first, batch.num_rows)
                    if low < high:
                        # `select`: asking for 'style' also brings a column that happens to be called 'style.name'.
                        yield first + low, batch.select(columns).slice(low, high - low)
                    first += batch.num_rows
            if first != self.group_starts[groups.stop]:
                raise ManifestError(f"{self.path}: the Parquet file is damaged: it has fewer rows than it claims")


def open_manifest(path: str | Path) -> Manifest:
    """Open a manifest and check its columns.

    Raises ManifestError when the file is absent, not Parquet, empty, or its columns are not a manifest's.
    """
    if is_url(path):
        raise ManifestError(f"{path}: only local manifests can be read; copy it to this machine first")
    path = Path(path).absolute()
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder; name the Parquet file in it")
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise ManifestError(f"{path}: is not a regular file; name a Parquet file")
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            sizes = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            problems = schema_problems(schema)
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest; 'stylemill manifest build' makes one") from None
    except PermissionError:
        raise ManifestError(f"{path}: no permission to read the manifest") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise ManifestError(f"{path}: not a Parquet file, or a damaged one: {_one_line(error)}") from None
    if problems:
        raise ManifestError("\n".join(f"{path}: {problem}" for problem in problems))
    if metadata.num_rows == 0:
        raise ManifestError(f"{path}: the manifest has no rows")
    starts = [0, *accumulate(group.num_rows for group in sizes)]
    if starts[-1] != metadata.num_rows or min(group.num_rows for group in sizes) < 0:
        raise ManifestError(f"{path}: a damaged Parquet file: it claims {metadata.num_rows:,} rows and has others")
    row_bytes = max(group.total_byte_size / max(group.num_rows, 1) for group in sizes)
    return Manifest(
        path=path,
        base=path.parent,
        num_rows=metadata.num_rows,
        schema=schema,
        carried=carried_schema(schema),
        style_is_list=is_list(schema.field("style").type),
        group_starts=tuple(starts),
        batch_rows=max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(row_bytes, 1)), _WORST_BYTES // _dictionary(sizes))),
    )


def _dictionary(groups: list[Any]) -> int:
    """Bytes that one value of a dictionary page has at most: few bytes of a file can stand for many of them."""
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    return max((chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page), default=1) or 1


def _runs(metadata: Any, groups: range) -> Iterator[list[int]]:
    """Neighbouring row groups to read in one call: pyarrow keeps all of a call's groups in memory until its end."""
    run: list[int] = []
    size = 0
    for group in groups:
        group_bytes = metadata.row_group(group).total_byte_size
        if run and size + group_bytes > _BATCH_BYTES:
            yield run
            run, size = [], 0
        run.append(group)
        size += group_bytes
    yield run


def hash64(name: str) -> int:
    """64 bits of SHA-256: small enough to keep one for each row, and confirmed by a second look where two agree."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def repeated(hashes: array[int]) -> set[int]:
    """The values that stand in `hashes` more than once."""
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    return {int(value) for value in values[counts > 1]}


def repeats(pair_id: str, first: int) -> str:
    return f"'{pair_id}' is already the id of row {first}; ids must be unique"


def _contains(distinct: np.ndarray[Any, Any], value: int) -> bool:
    place = int(np.searchsorted(distinct, np.uint64(value)))
    return place < len(distinct) and int(distinct[place]) == value


def _plain(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # Parquet does not promise that strings are UTF-8; only then one by one
        values = [_plain_value(value) for value in column]
    return values


def _plain_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return UNDECODABLE


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{path}: the manifest is no longer there") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow reports damaged pages as OSError too, but only the system's own errors have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{path}: the manifest cannot be read just now: {error}") from error
        raise ManifestError(f"{path}: the Parquet file is damaged: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())  # bytes of the file, too
