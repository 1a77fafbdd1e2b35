"""Retries of failed rows, in generations. A retry never changes a committed file.

Generation 0 of a shard holds all of its rows. Generation n holds the rows that had failed before it:
`data/…-rn.parquet` those that succeeded now, `failures/…-rn.parquet` those that failed again. So at any time a row is
in one data file at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.errors import DamagedError
from stylemill.store.atomic import replace_bytes, storage_errors
from stylemill.store.ledger import Ledger
from stylemill.store.object_store.reads import local_copy
from stylemill.store.parquet import FAILURE_SCHEMA, Failure
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, valid_record

LOST_MESSAGE = "this row failed and was retried later; the reason was lost with a damaged file"


@dataclass(frozen=True)
class GenerationRows:
    """The rows of one generation: `rows` are to be sampled, `known_failures` are to be recorded as failed."""

    rows: frozenset[int]
    known_failures: dict[int, Failure]


def generation_rows(paths: RunPaths, rows: range, shard: int, generation: int, latest: int) -> GenerationRows:
    """The rows of `generation`, which has no record; `latest` is the latest generation of all shards.

    The rows of a later generation with a record have failed in this one. They are not sampled again, or a row could
    succeed twice. Raises DamagedError if the generation before is missing or damaged.
    """
    before = frozenset(failed_rows_before(paths, shard, generation) if generation else rows)
    later = [valid_record(paths, shard, number) for number in range(generation + 1, latest + 1)]
    known: dict[int, Failure] = {}
    for record in later:
        known = _earlier_failures(paths, shard, generation, record) | known if record else known
    return GenerationRows(before - known.keys(), known)


def failed_rows_before(paths: RunPaths, shard: int, generation: int) -> dict[int, Failure]:
    """The failed rows of a shard after all generations before `generation`, by row.

    Raises DamagedError if one of these generations is missing or damaged.
    """

    def records() -> Iterator[Record]:
        for number in range(generation):
            record = valid_record(paths, shard, number)
            if record is None:
                raise DamagedError(f"{paths.record(shard, number)}: is missing; run `stylemill repair`")
            yield record

    return failed_rows(paths, records())


def failed_rows(paths: RunPaths, records: Iterable[Record]) -> dict[int, Failure]:
    """The failed rows of a shard after the generations of `records`, in order, by row. Raises DamagedError."""
    failed: dict[int, Failure] = {}
    for record in records:
        if record.generation:
            for row, _ in _row_ids(paths, record):
                failed.pop(row, None)
        failed |= read_failures(paths, record)
    return dict(sorted(failed.items()))


def read_failures(paths: RunPaths, record: Record) -> dict[int, Failure]:
    """The failures of one generation, by row. Raises DamagedError if its file is missing or damaged."""
    if record.failures is None:
        return {}
    return _read_failures_file(paths, paths.output / record.failures.name)


def begin_retry(paths: RunPaths, wanted: Mapping[int, int]) -> None:
    """Write retry.json: failed rows are retried until each shard of `wanted` has that generation."""
    if wanted:
        replace_bytes(paths, paths.retry, json.dumps(wanted).encode())


def read_retry(paths: RunPaths) -> dict[int, int]:
    """The content of retry.json, shard -> generation; empty if the file is missing or damaged."""
    with storage_errors(paths.retry):
        try:
            data = paths.retry.read_bytes()
        except FileNotFoundError:
            return {}
    try:
        return {int(shard): int(generation) for shard, generation in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}  # as if no retry had begun: the rows that were not retried yet are still recorded as failed


def pending_retry(paths: RunPaths, ledger: Ledger) -> dict[int, int]:
    """The shards of an unfinished retry that still have failed rows to retry, each with its next generation."""
    return left_to_retry(read_retry(paths), ledger)


def left_to_retry(wanted: Mapping[int, int], ledger: Ledger) -> dict[int, int]:
    """What is left of a retry that `read_retry` returned: the shards, each with its next generation."""
    if not wanted:
        return {}
    failed = set(ledger.failed_shards())
    return {
        shard: ledger.latest_generation_of(shard) + 1
        for shard, generation in sorted(wanted.items())
        if shard in failed and ledger.latest_generation_of(shard) < generation
    }


def end_retry(paths: RunPaths) -> None:
    """Remove retry.json, when every shard of the retry is committed or the file is damaged."""
    with storage_errors(paths.retry):
        paths.retry.unlink(missing_ok=True)


def _row_ids(paths: RunPaths, record: Record) -> list[tuple[int, str]]:
    """Row and pair_id of all rows of a generation."""
    ids: list[tuple[int, str]] = []
    for entry in record.files:
        table = _read(paths, paths.output / entry.name, ["row", "pair_id"])
        ids += zip(table.column("row").to_pylist(), table.column("pair_id").to_pylist(), strict=True)
    return ids


def _earlier_failures(paths: RunPaths, shard: int, generation: int, later: Record) -> dict[int, Failure]:
    """Why the rows of the generation `later` failed in `generation`, from its failures file if that still exists."""
    ids = dict(_row_ids(paths, later))
    try:
        failures = _read_failures_file(paths, paths.failures(shard, generation))
    except DamagedError:
        failures = {}
    if ids.keys() <= failures.keys():
        return {row: failures[row] for row in ids}
    # Only the number of rows of each error class is known. Any assignment keeps the sums over all records right.
    classes = [name for name, count in sorted(later.retried_by_class.items()) for _ in range(count)]
    return {
        row: Failure(row, ids[row], "read", name, LOST_MESSAGE) for row, name in zip(sorted(ids), classes, strict=False)
    }


def _read_failures_file(paths: RunPaths, path: Path) -> dict[int, Failure]:
    try:
        rows = _read(paths, path, FAILURE_SCHEMA.names).to_pylist()
        return {row["row"]: Failure(**row) for row in rows}
    except TypeError as error:
        raise DamagedError(f"{path}: is damaged: {error}") from error


def _read(paths: RunPaths, path: Path, columns: list[str]) -> pa.Table:
    try:
        with local_copy(paths, path) as copy, pq.ParquetFile(copy, page_checksum_verification=True) as file:
            return file.read(columns, use_threads=False)
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: is missing; run `stylemill repair`") from error
    except OSError as error:
        if error.errno is not None:
            with storage_errors(path):
                raise
        raise DamagedError(f"{path}: is damaged ({error}); run `stylemill repair`") from error
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise DamagedError(f"{path}: is damaged ({error}); run `stylemill repair`") from error
