"""Records and the ledger: a shard is done if and only if a valid record stands."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from stylemill.errors import DamagedError
from stylemill.store.lock import exclusive
from stylemill.store.paths import RunPaths
from stylemill.store.publish import quarantine, storage_errors


@dataclass(frozen=True)
class FileEntry:
    """A committed file: its name below the run folder, and what must be found there."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What became of the manifest rows [first_row, stop_row). Times are seconds by name of the stage."""

    shard: int
    fingerprint: str
    first_row: int
    stop_row: int
    attempt: str
    generation: int = 0
    rows_ok: int = 0
    rows_failed: int = 0
    data: FileEntry | None = None  # None: no row succeeded
    failures: FileEntry | None = None  # None: no row failed
    failed_by_class: dict[str, int] = field(default_factory=dict)
    numerics: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON with sorted keys and, under `sha256`, the digest of the same JSON without that key."""
        values = asdict(self)
        return _json({**values, "sha256": hashlib.sha256(_json(values)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Raises DamagedError for anything but the very bytes `to_bytes` gives, so no truncation or edit passes."""
        try:
            values = json.loads(data)
            values.pop("sha256")
            for key in ("data", "failures"):
                values[key] = FileEntry(**values[key]) if values[key] is not None else None
            record = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError("the record is truncated or no record at all") from error
        if record.to_bytes() != data:
            raise DamagedError("the record was changed after it was written")
        return record


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Totals:
    shards: int
    rows_ok: int
    rows_failed: int
    failed_by_class: dict[str, int]


class Ledger:
    """All records of a run, read as they appear: the only truth about what is done.

    A record that is invalid, or whose files are missing or of another size, does not count and is moved to quarantine;
    with `read_only` it only does not count.
    """

    def __init__(self, paths: RunPaths, read_only: bool = False) -> None:
        self._paths = paths
        self._read_only = read_only
        self._records: dict[int, Record] = {}

    def read(self, shard: int) -> Record | None:
        """The valid record of a shard, or None: it is open. Always looks at the disk."""
        self._records.pop(shard, None)
        try:
            record = standing_record(self._paths, shard)
        except DamagedError:
            record = None if self._read_only else self._set_aside(shard)
        if record is not None:
            self._records[shard] = record
        return record

    def refresh(self) -> dict[int, Record]:
        """All valid records by shard, in order; reads only those that were not there before."""
        folder = self._paths.records_folder
        with storage_errors(folder):
            names = {entry.name for entry in os.scandir(folder)} if folder.exists() else set()
        numbers = sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]+\.json", name))
        shards = [shard for shard in numbers if shard < self._paths.shards and self._paths.record(shard).name in names]
        self._records = {shard: self._records[shard] for shard in shards if shard in self._records}
        for shard in shards:
            if shard not in self._records:
                self.read(shard)
        return dict(sorted(self._records.items()))

    def open_shards(self, total: int) -> list[int]:
        """The shards of range(total) that are not done, in order."""
        done = self.refresh()
        return [shard for shard in range(total) if shard not in done]

    def totals(self) -> Totals:
        """Sums over the records read so far."""
        records = self._records.values()
        classes: Counter[str] = Counter()
        for record in records:
            classes.update(record.failed_by_class)
        return Totals(len(records), sum(r.rows_ok for r in records), sum(r.rows_failed for r in records), dict(classes))

    def _set_aside(self, shard: int) -> Record | None:
        # Under the lock and looked at once more, for a worker may have replaced the damaged record by a valid one.
        with exclusive(self._paths.commit_lock(shard)):
            try:
                return standing_record(self._paths, shard)
            except DamagedError as error:
                quarantine(self._paths, self._paths.record(shard), str(error))
        return None


def standing_record(paths: RunPaths, shard: int, generation: int = 0) -> Record | None:
    """The record on disk, None if there is none. Raises DamagedError if it is invalid or its files are not there."""
    path = paths.record(shard, generation)
    with storage_errors(path):
        try:
            record = Record.from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None
    if (record.shard, record.generation) != (shard, generation):
        raise DamagedError(f"the record is that of shard {record.shard}, generation {record.generation}")
    for entry, final in (
        (record.data, paths.data(shard, generation)),
        (record.failures, paths.failures(shard, generation)),
    ):
        if entry is None:
            continue
        if entry.name != paths.relative(final):
            raise DamagedError(f"the record names {entry.name}, which is not the file of this shard")
        with storage_errors(final):
            size = final.stat().st_size if final.exists() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
            raise DamagedError(f"{entry.name} {found}")
    return record
