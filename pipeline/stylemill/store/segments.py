"""Segments: the records of thousands of shards in one file, so that a run of a million of them opens in seconds.

    records/compact-000000-<digest>.parquet

A row is one record: its very bytes, and beside them what the ledger adds up. The digest of the file's bytes is part of
its name, so a damaged one is noticed. A segment is durable before the records in it are removed, and never changed. Of
several records of one shard and generation, a file of its own counts before any segment, a later segment before an
earlier one; so what a kill leaves twice counts once.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.errors import DamagedError
from stylemill.store.atomic import publish_bytes, storage_errors
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths

ROWS = 4096  # records in a file of their own before they become a segment
_GROUP = 512  # rows of a row group: what is read to reach one record
_NAME = re.compile(r"compact-(?P<sequence>[0-9]{6,})-(?P<digest>[0-9a-f]{32})\.parquet")

INDEX = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("rows_ok", pa.int32(), nullable=False),
        pa.field("rows_failed", pa.int32(), nullable=False),
        pa.field("data_bytes", pa.int64(), nullable=False),  # −1: no such file
        pa.field("failures_bytes", pa.int64(), nullable=False),
        pa.field("failed_by_class", pa.string(), nullable=False),  # JSON
        pa.field("retried_by_class", pa.string(), nullable=False),
    ]
)
_SCHEMA = INDEX.append(pa.field("record", pa.binary(), nullable=False))


def segments(paths: RunPaths) -> list[Path]:
    """The segments of a run, oldest first; damaged ones too."""
    folder = paths.records_folder
    with storage_errors(folder):
        return in_order(path for path in (folder.iterdir() if folder.exists() else ()))


def in_order(found: Any) -> list[Path]:
    """Those of the paths `found` that are named as segments are, oldest first."""
    numbered = [(int(match["sequence"]), path) for path in found if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def publish_segment(paths: RunPaths, rows: Sequence[dict[str, Any]]) -> Path:
    """Write `rows` as a new segment, durable and read back.

    A row has the columns of INDEX and `record`, the bytes of the record's file. Raises StorageError, and DamagedError
    if other rows were read back.
    """
    rows = sorted(rows, key=lambda row: (row["shard"], row["generation"]))
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=_GROUP, version="2.6", compression="zstd")
    data = buffer.getvalue()
    newest = [int(match["sequence"]) for path in segments(paths) if (match := _NAME.fullmatch(path.name))]
    name = f"compact-{max(newest, default=-1) + 1:06d}-{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    final = paths.records_folder / name
    publish_bytes(paths, final, data, uuid4().hex[:12])
    if not read_segment(final, _SCHEMA.names).equals(table):
        raise DamagedError(f"{final}: other records were read back than were written")
    return final


def read_segment(path: Path, columns: Sequence[str] = INDEX.names) -> pa.Table:
    """Columns of a segment. Raises DamagedError where it is gone or not as it was written, StorageError."""
    return _open(path).read(list(columns), use_threads=False)


def find_record(paths: RunPaths, shard: int, generation: int) -> tuple[bytes, Path] | None:
    """The bytes of a record and the newest whole segment that holds it. Looks at the disk; raises StorageError."""
    for path in reversed(segments(paths)):
        try:
            if (data := record_in(path, shard, generation)) is not None:
                return data, path
        except DamagedError:
            continue  # the ledger sets it aside
    return None


def record_in(path: Path, shard: int, generation: int) -> bytes | None:
    """The bytes of one record of a segment, None where it has none of it. Raises as `read_segment` does."""
    identity = _identity(path)
    keys, key = _keys(*identity), _key(shard, generation)
    place = int(np.searchsorted(keys, key))
    if place == len(keys) or keys[place] != key:
        return None
    return _group(*identity, place // _GROUP)[place % _GROUP]


def _open(path: Path) -> pq.ParquetFile:
    with storage_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamagedError(f"{path.name} is missing") from None
    match = _NAME.fullmatch(path.name)
    if match is None or hashlib.sha256(data).hexdigest()[:32] != match["digest"]:
        raise DamagedError(f"{path.name} is truncated or was changed")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(_SCHEMA):
            raise DamagedError(f"{path.name} has other columns than a segment")
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path.name} is no segment: {error}") from error
    return file


def _identity(path: Path) -> tuple[Path, int, int, int]:
    if isinstance(path, BucketPath):
        return path, 0, 0, 0  # the digest in its name says all, and a look at it would cost a request
    with storage_errors(path):
        try:
            found = path.stat()
        except FileNotFoundError:
            raise DamagedError(f"{path.name} is missing") from None
    return path, found.st_size, found.st_mtime_ns, found.st_ino


@lru_cache(maxsize=1024)
def _keys(path: Path, *_: int) -> npt.NDArray[np.int64]:
    table = read_segment(path, ["shard", "generation"])
    shards, generations = (np.array(table.column(name).to_pylist(), np.int64) for name in ("shard", "generation"))
    return np.asarray(_key(shards, generations))


@lru_cache(maxsize=4)
def _group(path: Path, size: int, modified: int, inode: int, group: int) -> list[bytes]:
    records: list[bytes] = _open(path).read_row_group(group, ["record"]).column("record").to_pylist()
    return records


def _key(shard: Any, generation: Any) -> Any:
    return shard << 20 | generation
