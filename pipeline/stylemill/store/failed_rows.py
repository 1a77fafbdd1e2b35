"""failures.parquet: the rows of a run that have no image now, in one file that is derived from those in failures/.

failures/ also has the failures of rows that a later generation mended, because committed files are never changed. The
file exists only while it is right: it is removed before shards are processed, and written when that has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.errors import DamagedError, StorageError
from stylemill.store.atomic import discard, replace_file, storage_errors
from stylemill.store.ledger import Ledger
from stylemill.store.object_store.reads import local_copy
from stylemill.store.parquet import FAILURE_SCHEMA, check_file
from stylemill.store.paths import RunPaths
from stylemill.store.retries import failed_rows

_ROWS_PER_GROUP = 10_000  # in memory at once, besides those of one shard


def write_failed_rows(paths: RunPaths, ledger: Ledger) -> None:
    """Write failures.parquet from the committed shards, in row order. Without a failed row, there is no such file.

    A file with the right number of rows is kept. The caller holds the RunLock. Raises StorageError, and DamagedError if
    a file of failures/ or a record is damaged.
    """
    expected = ledger.totals().rows_failed
    if not expected:
        remove_failed_rows(paths)
    if not expected or _rows_in_file(paths) == expected:
        return
    tmp, written = paths.tmp_file(paths.failed_rows, uuid4().hex[:12]), 0
    try:
        with storage_errors(tmp):
            paths.tmp.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(
                tmp, FAILURE_SCHEMA, version="2.6", compression="zstd", use_dictionary=False, write_page_checksum=True
            ) as writer:
                for rows in _batches(paths, ledger):
                    writer.write_table(pa.Table.from_pylist(rows, schema=FAILURE_SCHEMA))
                    written += len(rows)
        if written != expected:
            raise DamagedError(f"the files of {written} of {expected} failed rows are valid; run `stylemill verify`")
        replace_file(tmp, paths.failed_rows)
    finally:
        discard(tmp)


def _batches(paths: RunPaths, ledger: Ledger) -> Iterator[list[dict[str, object]]]:
    rows: list[dict[str, object]] = []
    for shard in ledger.failed_shards():
        for failure in failed_rows(paths, ledger.records(shard)).values():
            rows.append(vars(failure))
            if len(rows) == _ROWS_PER_GROUP:
                yield rows
                rows = []
    if rows:
        yield rows


def _rows_in_file(paths: RunPaths) -> int | None:
    """The number of rows in failures.parquet by its footer; None if it is damaged or does not exist."""
    try:
        with local_copy(paths, paths.failed_rows) as copy:
            return int(pq.read_metadata(copy).num_rows)
    except (OSError, pa.ArrowException):
        return None


def remove_failed_rows(paths: RunPaths) -> None:
    """Remove failures.parquet, before shards are processed. Raises StorageError."""
    with storage_errors(paths.failed_rows):
        paths.failed_rows.unlink(missing_ok=True)


def read_failed_rows(paths: RunPaths) -> tuple[int, ...] | None:
    """The numbers of the rows in failures.parquet; None if it does not exist. Raises DamagedError, StorageError."""
    try:
        with local_copy(paths, paths.failed_rows) as copy:
            return check_file(copy, FAILURE_SCHEMA).rows
    except FileNotFoundError:
        return None
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
