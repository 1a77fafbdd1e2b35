"""Compaction: move the records of many record files into one segment, while the run goes on.

The records are written to a segment, which is published, synced and read back. Only then are the record files removed.
A kill at any moment leaves each record in one place or in both, and it counts once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stylemill.errors import DamagedError
from stylemill.store.atomic import storage_errors, sync_published
from stylemill.store.ledger import Ledger
from stylemill.store.lock import file_lock
from stylemill.store.object_store.path import BucketPath
from stylemill.store.object_store.reads import prefetched
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, check_record
from stylemill.store.segments import RECORDS_PER_SEGMENT, publish_segment


def compact(paths: RunPaths, ledger: Ledger, min_records: int = RECORDS_PER_SEGMENT) -> bool:
    """Move the records of all record files into a segment if there are at least `min_records`; returns whether it did.

    The caller holds the RunLock. Raises StorageError, and DamagedError if the segment that is read back differs.
    """
    if len(ledger.record_files) < min_records:
        return False
    moved: dict[tuple[int, int], bytes] = {}
    records = []
    files = {key: paths.record(*key) for key in sorted(ledger.record_files)}
    with prefetched(paths, files.values()):
        for key, path in files.items():
            with storage_errors(path):
                data = path.read_bytes() if path.exists() else b""
            try:
                records.append(check_record(paths, data, *key))
            except DamagedError:
                continue
            moved[key] = data
    if moved:
        segment = write_segment(paths, records)
        _remove(paths, moved)
        ledger.moved(moved, segment)
    if len(moved) < len(files):  # a file was removed or damaged since the ledger read it
        ledger.refresh()
    return bool(moved)


def _remove(paths: RunPaths, moved: dict[tuple[int, int], bytes]) -> None:
    """Remove the record files whose content is in a segment now."""
    if isinstance(paths.output, BucketPath):  # there, only the driver writes or quarantines records
        paths.output.bucket.delete(paths.output.prefix + paths.relative(paths.record(*key)) for key in moved)
        return
    for (shard, generation), data in moved.items():
        path = paths.record(shard, generation)
        # A late attempt may quarantine this record and publish another one. The lock keeps it out meanwhile.
        with file_lock(paths.commit_lock(shard)), storage_errors(path):
            if path.exists() and path.read_bytes() == data:
                path.unlink()


def write_segment(paths: RunPaths, records: Sequence[Record]) -> Path:
    """Write `records` as a segment, durable and read back; returns its path. Raises as `compact` does."""
    segment = publish_segment(paths, [_segment_row(record) for record in records])
    sync_published(segment)
    return segment


def _segment_row(record: Record) -> dict[str, object]:
    return {
        "shard": record.shard,
        "generation": record.generation,
        "rows_ok": record.rows_ok,
        "rows_failed": record.rows_failed,
        "data_bytes": record.data.bytes if record.data else -1,
        "failures_bytes": record.failures.bytes if record.failures else -1,
        "failed_by_class": json.dumps(record.failed_by_class),
        "retried_by_class": json.dumps(record.retried_by_class),
        "record": record.to_bytes(),
    }
