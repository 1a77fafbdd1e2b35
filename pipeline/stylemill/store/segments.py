"""Segments: the records of thousands of shards in one file, so that a run with a million shards opens in seconds.

    records/compact-000000-<digest>.parquet

A row is one record: its bytes, and the numbers that the ledger sums. The file name contains the digest of the file, so
damage is noticed. A segment is durable before the record files of its records are removed, and it never changes.

A kill can leave a record in two places. It counts once: a record file takes precedence over all segments, and a later
segment over an earlier one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.errors import DamagedError
from stylemill.store.atomic import digest_in_name, publish_bytes, storage_errors
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths

RECORDS_PER_SEGMENT = 4096  # so many record files become one segment
_ROWS_PER_GROUP = 512  # a row group is what is read for one record
_NAME = re.compile(r"compact-(?P<sequence>[0-9]{6,})-(?P<digest>[0-9a-f]{32})\.parquet")

INDEX_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("rows_ok", pa.int32(), nullable=False),
        pa.field("rows_failed", pa.int32(), nullable=False),
        pa.field("data_bytes", pa.int64(), nullable=False),  # −1 if the record names no such file
        pa.field("failures_bytes", pa.int64(), nullable=False),
        pa.field("failed_by_class", pa.string(), nullable=False),  # JSON
        pa.field("retried_by_class", pa.string(), nullable=False),
    ]
)
_SCHEMA = INDEX_SCHEMA.append(pa.field("record", pa.binary(), nullable=False))


def list_segments(paths: RunPaths) -> list[Path]:
    """The segments of a run, oldest first, including damaged ones."""
    folder = paths.records_folder
    with storage_errors(folder):
        return sort_segments(folder.iterdir() if folder.exists() else ())


def sort_segments(paths: Iterable[Path]) -> list[Path]:
    """Those of the given paths that have the name of a segment, oldest first."""
    numbered = [(int(match["sequence"]), path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def publish_segment(paths: RunPaths, rows: Sequence[dict[str, Any]]) -> Path:
    """Publish `rows` as a new segment and read it back.

    A row has the columns of INDEX_SCHEMA, and `record`, the bytes of the record. Raises StorageError, and DamagedError
    if what is read back differs.
    """
    rows = sorted(rows, key=lambda row: (row["shard"], row["generation"]))
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=_ROWS_PER_GROUP, version="2.6", compression="zstd")
    data = buffer.getvalue()
    sequences = [int(match["sequence"]) for path in list_segments(paths) if (match := _NAME.fullmatch(path.name))]
    name = f"compact-{max(sequences, default=-1) + 1:06d}-{digest_in_name(data)}.parquet"
    final = paths.records_folder / name
    publish_bytes(paths, final, data, uuid4().hex[:12])
    if not read_segment(final, _SCHEMA.names).equals(table):
        raise DamagedError(f"{final}: the records that were read back are not those that were written")
    return final


def read_segment(path: Path, columns: Sequence[str] = INDEX_SCHEMA.names) -> pa.Table:
    """Columns of a segment. Raises DamagedError if it is missing or was changed, and StorageError."""
    return _open(path).read(list(columns), use_threads=False)


def find_in_segments(paths: RunPaths, shard: int, generation: int) -> tuple[bytes, Path] | None:
    """The bytes of a record, and the newest undamaged segment that holds it. Reads the disk; raises StorageError."""
    for path in reversed(list_segments(paths)):
        try:
            if (data := read_record(path, shard, generation)) is not None:
                return data, path
        except DamagedError:
            continue  # the ledger quarantines the segment
    return None


def read_record(path: Path, shard: int, generation: int) -> bytes | None:
    """The bytes of one record in a segment; None if the segment does not hold it. Raises as `read_segment` does."""
    identity = _identity(path)
    keys, key = _sort_keys(*identity), _sort_key(shard, generation)
    position = int(np.searchsorted(keys, key))
    if position == len(keys) or keys[position] != key:
        return None
    return _row_group(*identity, position // _ROWS_PER_GROUP)[position % _ROWS_PER_GROUP]


def _open(path: Path) -> pq.ParquetFile:
    with storage_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamagedError(f"{path.name} is missing") from None
    match = _NAME.fullmatch(path.name)
    if match is None or digest_in_name(data) != match["digest"]:
        raise DamagedError(f"{path.name} is truncated or was changed")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(_SCHEMA):
            raise DamagedError(f"{path.name} has other columns than a segment")
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path.name} is not a segment: {error}") from error
    return file


def _identity(path: Path) -> tuple[Path, int, int, int]:
    """What the caches below use as the key of a file: on a disk, a file that was damaged since is read again."""
    if isinstance(path, BucketPath):
        return path, 0, 0, 0  # its size and date would cost a request
    with storage_errors(path):
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise DamagedError(f"{path.name} is missing") from None
    return path, stat.st_size, stat.st_mtime_ns, stat.st_ino


@lru_cache(maxsize=1024)
def _sort_keys(path: Path, *_: int) -> npt.NDArray[np.int64]:
    table = read_segment(path, ["shard", "generation"])
    shards, generations = (np.array(table.column(name).to_pylist(), np.int64) for name in ("shard", "generation"))
    return np.asarray(_sort_key(shards, generations))


@lru_cache(maxsize=4)
def _row_group(path: Path, size: int, modified: int, inode: int, group: int) -> list[bytes]:
    records: list[bytes] = _open(path).read_row_group(group, ["record"]).column("record").to_pylist()
    return records


def _sort_key(shard: Any, generation: Any) -> Any:
    return shard << 20 | generation
