"""Compaction: records that have files of their own move into a segment, as the run goes.

Records that stand are written into a segment, the segment gets its name and is durable, it is read back, and only then
are the files removed. A kill at any moment leaves each record in one place or in both, and it counts once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from stylemill.errors import DamagedError
from stylemill.store.atomic import persist, storage_errors
from stylemill.store.ledger import Ledger
from stylemill.store.lock import exclusive
from stylemill.store.object_store.path import BucketPath
from stylemill.store.object_store.reads import prefetched
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, checked
from stylemill.store.segments import ROWS, publish_segment


def compact(paths: RunPaths, ledger: Ledger, least: int = ROWS) -> bool:
    """Move the records in files of their own into a segment, if there are `least`; says whether it did.

    The caller holds the RunLock. Raises StorageError, and DamagedError where the disk gave back other bytes.
    """
    if len(ledger.own_files) < least:
        return False
    packed: dict[tuple[int, int], bytes] = {}
    records = []
    own = {key: paths.record(*key) for key in sorted(ledger.own_files)}
    with prefetched(paths, own.values()):
        for key, path in own.items():
            with storage_errors(path):
                data = path.read_bytes() if path.exists() else b""
            try:
                records.append(checked(paths, data, *key))
            except DamagedError:
                continue  # the ledger sets it aside
            packed[key] = data
    if not packed:
        return False
    pack(paths, records)
    if isinstance(paths.output, BucketPath):  # where nobody else writes records, or sets them aside
        paths.output.bucket.delete(paths.output.prefix + paths.relative(own[key]) for key in packed)
        packed.clear()
    for (shard, generation), data in packed.items():
        path = paths.record(shard, generation)
        # Under the lock, for an attempt that came too late may set it aside, and then another record is in its place.
        with exclusive(paths.commit_lock(shard)), storage_errors(path):
            if path.exists() and path.read_bytes() == data:
                path.unlink()
    ledger.refresh()
    return True


def pack(paths: RunPaths, records: Sequence[Record]) -> None:
    """Write `records` as a segment: durable and read back when this returns. Raises as `compact` does."""
    persist(publish_segment(paths, [_row(record, record.to_bytes()) for record in records]))


def _row(record: Record, data: bytes) -> dict[str, object]:
    return {
        "shard": record.shard,
        "generation": record.generation,
        "rows_ok": record.rows_ok,
        "rows_failed": record.rows_failed,
        "data_bytes": record.data.bytes if record.data else -1,
        "failures_bytes": record.failures.bytes if record.failures else -1,
        "failed_by_class": json.dumps(record.failed_by_class),
        "retried_by_class": json.dumps(record.retried_by_class),
        "record": data,
    }
