"""Records: a shard is done if and only if a valid record stands, in a file of its own or in a segment."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stylemill.errors import DamagedError
from stylemill.store.atomic import storage_errors
from stylemill.store.paths import RunPaths
from stylemill.store.segments import find_record

# Keys are sorted, so that of the record's own digest is never the last one.
_SEAL = re.compile(rb'\n "sha256": "([0-9a-f]{64})",(?=\n)')


@dataclass(frozen=True)
class FileEntry:
    """A committed file: its name below the run folder, and what must be found there."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What became of the manifest rows [first_row, stop_row). Times are seconds by name of the stage.

    A later generation is about those rows only that had failed before it, `retried_by_class` of them: it takes them
    from the failed ones, and those that failed again are among its own.
    """

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
    retried_by_class: dict[str, int] = field(default_factory=dict)
    numerics: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON with sorted keys and, under `sha256`, the digest of the same JSON without that key."""
        values = asdict(self)
        if not self.generation:
            del values["retried_by_class"]
        return _json({**values, "sha256": hashlib.sha256(_json(values)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Raises DamagedError for anything but the very bytes `to_bytes` gives, so no truncation or edit passes."""
        seals = _SEAL.findall(data)
        if len(seals) != 1 or hashlib.sha256(_SEAL.sub(b"", data)).hexdigest().encode() != seals[0]:
            raise DamagedError("the record is truncated, or was changed after it was written")
        try:
            values = json.loads(data)
            del values["sha256"]
            for key in ("data", "failures"):
                values[key] = FileEntry(**values[key]) if values[key] is not None else None
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError("it is no record") from error


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def valid_record(paths: RunPaths, shard: int, generation: int = 0) -> Record | None:
    """The record on disk, None if there is none. Raises DamagedError if it is invalid or its files are not there."""
    found = find(paths, shard, generation)
    return None if found is None else checked(paths, found[0], shard, generation)


def find(paths: RunPaths, shard: int, generation: int) -> tuple[bytes, Path] | None:
    """The bytes of a record, whatever they are, and the file they stand in: its own, or a segment."""
    path = paths.record(shard, generation)
    with storage_errors(path):
        try:
            return path.read_bytes(), path
        except FileNotFoundError:
            pass  # a segment is durable before the records in it are removed, so looking there second misses none
    return find_record(paths, shard, generation)


def checked(paths: RunPaths, data: bytes, shard: int, generation: int) -> Record:
    """The record `data`. Raises DamagedError unless it is that of the shard and its files are there in their sizes."""
    record = Record.from_bytes(data)
    if (record.shard, record.generation) != (shard, generation):
        raise DamagedError(f"the record is that of shard {record.shard}, generation {record.generation}")
    for entry, final in (
        (record.data, paths.data(shard, generation)),
        (record.failures, paths.failures(shard, generation)),
    ):
        if entry is None:
            continue
        final = paths.committed(final, entry.sha256)
        if entry.name != paths.relative(final):
            raise DamagedError(f"the record names {entry.name}, which is not the file of this shard")
        with storage_errors(final):
            try:
                size = final.stat().st_size
            except FileNotFoundError:
                size = None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
            raise DamagedError(f"{entry.name} {found}")
    return record
