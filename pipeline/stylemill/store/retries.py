"""Generations: failed rows of a shard are tried again without a change to what is committed.

Generation n of a shard is about the rows that had failed before it: `data/…-rn.parquet` has those that succeeded,
`failures/…-rn.parquet` those that failed again. So a row is in one data file at most, at every moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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

LOST_WORDS = "this row failed, and was tried again since; why it failed is lost with a damaged file"


@dataclass(frozen=True)
class GenerationRows:
    """The rows of one generation of a shard: `rows` are still to be made, `known_failures` are known to have failed."""

    rows: frozenset[int]
    known_failures: dict[int, Failure]


def generation_rows(paths: RunPaths, rows: range, shard: int, generation: int, newest: int) -> GenerationRows:
    """The rows of `generation`, which has no record; `newest` is the latest generation of any shard.

    Where a later generation stands, what it is about failed in this one: it is not tried here once more, or a row could
    succeed twice. Raises DamagedError where the generation before is not whole.
    """
    before = frozenset(failed_rows_before(paths, shard, generation) if generation else rows)
    later = [valid_record(paths, shard, number) for number in range(generation + 1, newest + 1)]
    held: dict[int, Failure] = {}
    for record in later:
        held = _reasons(paths, shard, generation, record) | held if record else held
    return GenerationRows(before - held.keys(), held)


def failed_rows_before(paths: RunPaths, shard: int, generation: int) -> dict[int, Failure]:
    """The rows of a shard that were failed when every generation before `generation` was done, by row."""
    failed: dict[int, Failure] = {}
    for number in range(generation):
        record = valid_record(paths, shard, number)
        if record is None:
            raise DamagedError(f"{paths.record(shard, number)}: is missing; `stylemill repair` makes it again")
        if number:
            for row, _ in _rows(paths, record):
                failed.pop(row, None)
        failed |= failures_of(paths, record)
    return dict(sorted(failed.items()))


def failures_of(paths: RunPaths, record: Record) -> dict[int, Failure]:
    """The rows that failed in one generation. Raises DamagedError where the file is not what the record names."""
    if record.failures is None:
        return {}
    return _read_failures(paths, paths.output / record.failures.name)


def begin_retry(paths: RunPaths, wanted: Mapping[int, int]) -> None:
    """Note durably that failed rows are tried again until each shard of `wanted` has that generation."""
    if not wanted:
        return
    replace_bytes(paths, paths.retry, json.dumps(wanted).encode())  # a plan, not data: the newest is the right one


def read_retry(paths: RunPaths) -> dict[int, int]:
    """What `begin_retry` noted; nothing where there is no note, or a damaged one."""
    with storage_errors(paths.retry):
        try:
            data = paths.retry.read_bytes()
        except FileNotFoundError:
            return {}
    try:
        return {int(shard): int(generation) for shard, generation in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}  # as if it had not begun: what was retried stands, and the rest is still recorded as failed


def pending_retry(paths: RunPaths, ledger: Ledger) -> dict[int, int]:
    """The shards of a retry that was begun and not ended, which are not done yet: shard -> generation that is next."""
    if not (wanted := read_retry(paths)):
        return {}
    failed = set(ledger.failed_shards())
    return {
        shard: ledger.latest_generation_of(shard) + 1
        for shard, generation in sorted(wanted.items())
        if shard in failed and ledger.latest_generation_of(shard) < generation
    }


def end_retry(paths: RunPaths) -> None:
    """Every shard of the retry is done, or its note is damaged."""
    with storage_errors(paths.retry):
        paths.retry.unlink(missing_ok=True)


def _rows(paths: RunPaths, record: Record) -> list[tuple[int, str]]:
    """Row and pair_id of all rows that a generation is about."""
    found: list[tuple[int, str]] = []
    for entry in (record.data, record.failures):
        if entry is not None:
            table = _read(paths, paths.output / entry.name, ["row", "pair_id"])
            found += zip(table.column("row").to_pylist(), table.column("pair_id").to_pylist(), strict=True)
    return found


def _reasons(paths: RunPaths, shard: int, generation: int, later: Record) -> dict[int, Failure]:
    """Why the rows of the generation `later` had failed in `generation`: its failures may stand without a record."""
    ids = dict(_rows(paths, later))
    try:
        known = _read_failures(paths, paths.failures(shard, generation))
    except DamagedError:
        known = {}
    if ids.keys() <= known.keys():
        return {row: known[row] for row in ids}
    # Which row had which class is lost, the numbers of them are not: sums over records stay right.
    classes = [name for name, count in sorted(later.retried_by_class.items()) for _ in range(count)]
    return {
        row: Failure(row, ids[row], "read", name, LOST_WORDS) for row, name in zip(sorted(ids), classes, strict=False)
    }


def _read_failures(paths: RunPaths, path: Path) -> dict[int, Failure]:
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
        raise DamagedError(f"{path}: is missing; `stylemill repair` makes it again") from error
    except OSError as error:
        if error.errno is not None:
            with storage_errors(path):
                raise
        raise DamagedError(f"{path}: is damaged ({error}); `stylemill repair` makes it again") from error
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise DamagedError(f"{path}: is damaged ({error}); `stylemill repair` makes it again") from error
