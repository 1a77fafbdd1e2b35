"""Records: a shard is committed if and only if it has a valid record, in a record file or in a segment."""

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
from stylemill.store.segments import find_in_segments

# The line with the digest of the record. Keys are sorted and this one is never the last, so a comma follows.
_DIGEST_LINE = re.compile(rb'\n "sha256": "([0-9a-f]{64})",(?=\n)')


@dataclass(frozen=True)
class FileEntry:
    """A committed file: its path relative to the run folder, its rows, bytes and SHA-256."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """The result of one generation of a shard, whose output rows are [first_row, stop_row).

    Generation 0 holds all rows of the shard. A later one holds the rows that had failed before it: `retried_by_class`
    counts these by error class, `failed_by_class` those that failed again. `timings` are seconds by name of the stage.
    `loss_scales` has, by output row, the smallest loss scale of each row whose gradient overflowed at the usual one of
    float16.
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
    loss_scales: dict[str, float] = field(default_factory=dict)

    @property
    def files(self) -> list[FileEntry]:
        """The data file and the failures file, as far as the record names them."""
        return [entry for entry in (self.data, self.failures) if entry is not None]

    def to_bytes(self) -> bytes:
        """JSON with sorted keys. Its key `sha256` is the digest of the same JSON without that key."""
        values = asdict(self)
        if not self.generation:
            del values["retried_by_class"]
        return _json({**values, "sha256": hashlib.sha256(_json(values)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The inverse of `to_bytes`. Raises DamagedError if the digest is not that of `data`: truncated or edited."""
        digests = _DIGEST_LINE.findall(data)
        if len(digests) != 1 or hashlib.sha256(_DIGEST_LINE.sub(b"", data)).hexdigest().encode() != digests[0]:
            raise DamagedError("the record is truncated, or was changed after it was written")
        try:
            values = json.loads(data)
            del values["sha256"]
            for key in ("data", "failures"):
                values[key] = FileEntry(**values[key]) if values[key] is not None else None
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError("it is not a record") from error


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def valid_record(paths: RunPaths, shard: int, generation: int = 0) -> Record | None:
    """The record of a generation of a shard; None if there is none. Raises as `check_record` does, and StorageError."""
    found = find_record(paths, shard, generation)
    return None if found is None else check_record(paths, found[0], shard, generation)


def find_record(paths: RunPaths, shard: int, generation: int) -> tuple[bytes, Path] | None:
    """The bytes of a record, unchecked, and the file that holds them: the record file or a segment.

    Without a record file, this lists the segments and searches each of them.
    """
    # A segment is durable before its record files are removed, so searching the segments second misses no record.
    if (data := read_record_file(paths, shard, generation)) is not None:
        return data, paths.record(shard, generation)
    return find_in_segments(paths, shard, generation)


def read_record_file(paths: RunPaths, shard: int, generation: int) -> bytes | None:
    """The bytes of a record file, unchecked; None if it does not exist. Raises StorageError."""
    path = paths.record(shard, generation)
    with storage_errors(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def check_record(paths: RunPaths, data: bytes, shard: int, generation: int) -> Record:
    """Parse a record. Raises DamagedError unless it is valid, of this shard, and its files exist with their sizes."""
    record = Record.from_bytes(data)
    if (record.shard, record.generation) != (shard, generation):
        raise DamagedError(f"the record belongs to shard {record.shard}, generation {record.generation}")
    for entry, final in (
        (record.data, paths.data(shard, generation)),
        (record.failures, paths.failures(shard, generation)),
    ):
        if entry is None:
            continue
        final = paths.committed_path(final, entry.sha256)
        if entry.name != paths.relative(final):
            raise DamagedError(f"the record names {entry.name}, which is not a file of this shard")
        with storage_errors(final):
            try:
                size = final.stat().st_size
            except FileNotFoundError:
                size = None
        if size != entry.bytes:
            problem = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
            raise DamagedError(f"{entry.name} {problem}")
    return record
