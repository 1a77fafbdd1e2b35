"""The ledger: all records of a run, read as they appear. Of each record, only a few numbers are kept in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from stylemill.errors import DamagedError
from stylemill.store.atomic import quarantine
from stylemill.store.generations import NO_RECORD, RECORD_FILE, Generation, Ints, Totals, first_missing, sum_up
from stylemill.store.lock import file_lock
from stylemill.store.object_store.path import output_path
from stylemill.store.object_store.reads import FileSizes, list_names, prefetched
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, check_record, find_record, read_record_file
from stylemill.store.segments import read_record, read_segment, sort_segments


class Ledger:
    """All records of a run. Nothing else decides which shards are committed.

    A record that is invalid, or whose files are missing or have another size, does not count. It is moved to
    quarantine, unless the ledger is `read_only`. `damaged` holds the path of each such file, with the reason.
    """

    def __init__(self, paths: RunPaths, read_only: bool = False) -> None:
        self._paths = paths
        self._read_only = read_only
        self.damaged: dict[Path, str] = {}
        self._reset()

    def _reset(self) -> None:
        self._generations = [Generation(self._paths.shards)]
        self._totals: Totals | None = None  # kept up to date by `read`; None: to be summed up from the arrays
        self._record_files: set[tuple[int, int]] = set()  # those that were read
        self._segments: dict[Path, int] = {}  # with their numbers: all that a location refers to
        self._loaded: set[Path] = set()  # the segments that were read completely

    @property
    def latest_generation(self) -> int:
        """The latest generation of all shards."""
        return len(self._generations) - 1

    def read(self, shard: int, generation: int = 0) -> Record | None:
        """The valid record of a generation of a shard; None if there is none.

        Reads the record file, or if there is none, the segment in which the ledger has found the record. The cost does
        not grow with the run. Raises StorageError; then the ledger is unchanged.
        """
        if (data := read_record_file(self._paths, shard, generation)) is not None:
            return self._update(shard, generation, (data, self._paths.record(shard, generation)))
        found, segment = None, self._segment_of(shard, generation)
        if segment is not None:
            with suppress(DamagedError):
                data = read_record(segment, shard, generation)
                found = (data, segment) if data is not None else None
        return self._update(shard, generation, found)

    def _update(self, shard: int, generation: int, found: tuple[bytes, Path] | None) -> Record | None:
        """Replace the numbers of a record by those of what was `found` and the file that holds it."""
        part = slice(shard, shard + 1)
        before = None if self._totals is None else sum_up(self._generations, part)
        try:
            return self._replace_numbers(shard, generation, found)
        finally:
            if self._totals is not None and before is not None:
                self._totals = self._totals.changed(before, sum_up(self._generations, part))

    def _replace_numbers(self, shard: int, generation: int, found: tuple[bytes, Path] | None) -> Record | None:
        record = None
        if found is not None:
            try:
                record = check_record(self._paths, found[0], shard, generation)
            except DamagedError as error:
                found, record = self._quarantine_record(found[1], shard, generation, str(error))
        if generation < len(self._generations):
            self._generations[generation].clear(_one(shard))
        if found is None or record is None:
            return None
        self._clear_damaged(shard, generation)
        location = RECORD_FILE
        if found[1] == self._paths.record(shard, generation):
            self._record_files.add((shard, generation))
        else:
            location = self._segments.setdefault(found[1], len(self._segments))
        numbers = self._generation(generation)
        numbers.set(_one(shard), location, _one(record.rows_ok), _one(record.rows_failed))
        numbers.set_classes(shard, record.failed_by_class, record.retried_by_class)
        return record

    def _segment_of(self, shard: int, generation: int) -> Path | None:
        """The segment in which the ledger has found a record; None if it has found none, or a record file."""
        number = int(self._generations[generation].location[shard]) if self.has_record(shard, generation) else NO_RECORD
        return list(self._segments)[number] if number >= 0 else None

    def moved(self, keys: Iterable[tuple[int, int]], segment: Path) -> None:
        """Take note that the records of `keys`, shards and generations, are no longer in record files but in `segment`.

        The ledger had read these record files.
        """
        number = self._segments.setdefault(segment, len(self._segments))
        self._loaded.add(segment)
        for shard, generation in keys:
            self._record_files.discard((shard, generation))
            self._generations[generation].location[shard] = number

    def refresh(self) -> None:
        """Read the records that appeared since the last call."""
        record_files, segments = self._list()
        if not self._segments.keys() - self.damaged.keys() <= set(segments):
            self._reset()
        if record_files != self._record_files or not self._loaded.issuperset(segments):
            new = sorted(record_files - self._record_files)
            with prefetched(self._paths, [self._paths.record(*key) for key in new]):
                self._read_new(record_files, segments)

    def _read_new(self, record_files: set[tuple[int, int]], segments: list[Path]) -> None:
        removed, sizes = self._record_files - record_files, FileSizes(self._paths)
        self._totals = None
        for path in segments:
            if path not in self._loaded:
                self._read_segment(path, record_files, sizes)
        in_removed_file = (
            self._generations[generation].location[shard] == RECORD_FILE
            for shard, generation in removed
            if generation < len(self._generations)
        )
        if any(in_removed_file):
            self._reset()  # no new segment holds the record; an older segment may hold an earlier one
            for path in segments:
                self._read_segment(path, record_files, sizes)
        self._record_files &= record_files
        for key in sorted(record_files - self._record_files):
            # A compaction may have moved the record to a new segment since the folder was listed.
            self._update(*key, find_record(self._paths, *key))

    def open_shards(self, total: int) -> list[int]:
        """The shards of range(total) that are not committed, in order: those that lack a generation. Refreshes."""
        self.refresh()
        return [shard for shard in self.missing_generations() if shard < total]

    def missing_generations(self) -> dict[int, int]:
        """Each shard that was not committed at the last refresh, in order, with the first generation that it lacks."""
        missing = first_missing(self._generations, slice(None))
        shards = np.flatnonzero(missing >= 0)
        return dict(zip(shards.tolist(), missing[shards].tolist(), strict=True))

    @property
    def record_files(self) -> set[tuple[int, int]]:
        """Shard and generation of the records that were read from record files, not from segments."""
        return self._record_files

    def has_record(self, shard: int, generation: int) -> bool:
        return generation < len(self._generations) and bool(self._generations[generation].location[shard] != NO_RECORD)

    def has_files(self, shard: int, generation: int) -> tuple[bool, bool]:
        """Whether the record of a generation names a data file, and whether it names a failures file."""
        if not self.has_record(shard, generation):
            return False, False
        numbers = self._generations[generation]
        return bool(numbers.ok[shard]), bool(numbers.failed[shard])

    def latest_generation_of(self, shard: int) -> int:
        """The latest generation of a shard; −1 if it has none."""
        return max((number for number in range(len(self._generations)) if self.has_record(shard, number)), default=-1)

    def failed_shards(self) -> list[int]:
        """The committed shards with failed rows, in order."""
        return np.flatnonzero((self._failed() > 0) & (first_missing(self._generations, slice(None)) < 0)).tolist()

    def rows_failed_in(self, shards: Iterable[int]) -> int:
        """Number of rows of these shards that failed and have not succeeded since."""
        return int(self._failed()[list(shards)].sum())

    def _failed(self) -> Ints:
        """For each shard, the number of its rows that failed and have not succeeded since."""
        failed = np.zeros(self._paths.shards, np.int32)
        return sum((numbers.still_failed(slice(None)) for numbers in self._generations), start=failed)

    def error_classes(self, shard: int) -> set[str]:
        """The error classes of the rows of a shard that failed in any generation."""
        return {
            name for numbers in self._generations for name, counts in numbers.failed_by_class.items() if counts[shard]
        }

    def totals(self) -> Totals:
        """Sums over the records read so far. After a commit, the cost does not grow with the run."""
        if self._totals is None:
            self._totals = sum_up(self._generations, slice(None))
        return self._totals

    def records(self, shard: int | None = None) -> Iterator[Record]:
        """The records read so far, or those of one shard, ordered by shard and generation."""
        shards = range(self._paths.shards) if shard is None else (shard,)
        segments = list(self._segments)
        for number in shards:
            for generation, numbers in enumerate(self._generations):
                location = numbers.location[number]
                if location == NO_RECORD:
                    continue
                data = read_record(segments[location], number, generation) if location != RECORD_FILE else None
                found = (data, None) if data is not None else find_record(self._paths, number, generation)
                with suppress(DamagedError):  # damaged after it was read
                    if found is not None:
                        yield check_record(self._paths, found[0], number, generation)

    def _generation(self, number: int) -> Generation:
        while len(self._generations) <= number:
            self._generations.append(Generation(self._paths.shards))
        return self._generations[number]

    def _list(self) -> tuple[set[tuple[int, int]], list[Path]]:
        """Shard and generation of all record files, and all segments."""
        folder = self._paths.records_folder
        record_files: set[tuple[int, int]] = set()
        previous: list[Path] | None = None
        while True:
            names = list_names(folder)
            segments = sort_segments(folder / name for name in names if name.startswith("compact-"))
            # Listed again until no new segment appears: during a compaction, a listing may contain neither the new
            # segment nor the record files that it replaces.
            if segments == previous:
                return record_files, segments
            record_files = {key for name in names if (key := self._paths.parse_record_name(name))}
            previous = segments

    def _read_segment(self, path: Path, record_files: set[tuple[int, int]], sizes: FileSizes) -> None:
        segment = self._segments.setdefault(path, len(self._segments))
        try:
            table = read_segment(path)
        except DamagedError as error:
            self._loaded.add(path)
            self.damaged[path] = str(error)
            if not self._read_only:
                quarantine(self._paths, path, str(error))
            return
        generations = np.array(table.column("generation").to_pylist(), np.int32)
        shards = table.column("shard").to_pylist()
        for generation in np.unique(generations).tolist():
            numbers = self._generation(generation)
            positions = [
                position
                for position in np.flatnonzero(generations == generation).tolist()
                # A record file takes precedence.
                if numbers.location[shards[position]] != RECORD_FILE
                or (shards[position], generation) not in record_files
            ]
            self._add_rows(numbers, generation, segment, table.take(pa.array(positions, pa.int64())), sizes)
        self._loaded.add(path)

    def _add_rows(self, numbers: Generation, generation: int, segment: int, table: pa.Table, sizes: FileSizes) -> None:
        # As lists, because pyarrow's conversion to numpy imports pandas: a second, and 50 MB.
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        valid = np.ones(len(columns["shard"]), bool)
        for column, name in (("data_bytes", self._paths.data_name), ("failures_bytes", self._paths.failures_name)):
            for position, (shard, expected) in enumerate(zip(columns["shard"], columns[column], strict=True)):
                if expected < 0 or (size := sizes.get(name(shard, generation), expected)) == expected:
                    continue
                valid[position], path = False, output_path(name(shard, generation))
                problem = "is missing" if size is None else f"has {size} bytes, not {expected}"
                self.damaged[path] = f"{self._paths.relative(path)} {problem}"
        shards, ok, failed = (np.array(columns[name], np.int32) for name in ("shard", "rows_ok", "rows_failed"))
        numbers.clear(shards)
        numbers.set(shards[valid], segment, ok[valid], failed[valid])
        for shard in shards[valid].tolist() if self.damaged else ():
            self._clear_damaged(shard, generation)
        for position, (failed_json, retried_json) in enumerate(
            zip(columns["failed_by_class"], columns["retried_by_class"], strict=True)
        ):
            if valid[position] and (failed_json != "{}" or retried_json != "{}"):
                numbers.set_classes(columns["shard"][position], json.loads(failed_json), json.loads(retried_json))

    def _clear_damaged(self, shard: int, generation: int) -> None:
        """Drop what `damaged` says of older records of this generation: it has a valid record now."""
        for path in (self._paths.record, self._paths.data, self._paths.failures):
            self.damaged.pop(path(shard, generation), None)

    def _quarantine_record(
        self, path: Path, shard: int, generation: int, reason: str
    ) -> tuple[tuple[bytes, Path] | None, Record | None]:
        """Move a damaged record file to quarantine; returns the valid record that now takes its place, if any."""
        record_file = self._paths.record(shard, generation)
        if self._read_only or path != record_file:
            self.damaged[record_file] = reason
            return None, None
        # Under the lock and read once more: a worker may have replaced the damaged record with a valid one.
        with file_lock(self._paths.commit_lock(shard)):
            while (found := find_record(self._paths, shard, generation)) is not None:
                try:
                    return found, check_record(self._paths, found[0], shard, generation)
                except DamagedError as error:
                    if found[1] != record_file:
                        break  # a segment is not quarantined: its records of other shards are valid
                    quarantine(self._paths, record_file, str(error))
        return None, None


def _one(number: int) -> Ints:
    return np.array([number], np.int32)
