"""The ledger: all records of a run, read as they appear. What is held of each in memory is a few numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stylemill.errors import DamagedError
from stylemill.store.atomic import quarantine
from stylemill.store.lock import exclusive
from stylemill.store.object_store.path import output_path
from stylemill.store.object_store.reads import Sizes, names, prefetched
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, checked, find
from stylemill.store.segments import in_order, read_segment, record_in

Ints = npt.NDArray[np.int32]
_OWN_FILE = -1  # where a record stands; else the number of its segment
_NOWHERE = -2


@dataclass(frozen=True)
class Totals:
    """Rows that failed and were tried again count as what they became."""

    shards: int
    rows_ok: int
    rows_failed: int
    failed_by_class: dict[str, int]


class _Generation:
    """What the records of one generation add up to: a number a shard."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self.where = np.full(shards, _NOWHERE, np.int32)
        self.ok, self.failed = self._zeros(), self._zeros()
        self.failed_by_class: dict[str, Ints] = {}
        self.retried_by_class: dict[str, Ints] = {}

    def _zeros(self) -> Ints:
        return np.zeros(self._shards, np.int32)

    @property
    def stands(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.where != _NOWHERE)

    @property
    def retried(self) -> Ints:
        return sum(self.retried_by_class.values(), start=self._zeros())

    def forget(self, shards: Ints) -> None:
        self.where[shards] = _NOWHERE
        for numbers in (self.ok, self.failed, *self.failed_by_class.values(), *self.retried_by_class.values()):
            numbers[shards] = 0

    def note(self, shards: Ints, where: int, ok: Ints, failed: Ints) -> None:
        self.forget(shards)
        self.where[shards], self.ok[shards], self.failed[shards] = where, ok, failed

    def note_classes(self, shard: int, failed: dict[str, int], retried: dict[str, int]) -> None:
        for table, counts in ((self.failed_by_class, failed), (self.retried_by_class, retried)):
            for name, count in counts.items():
                table.setdefault(name, self._zeros())[shard] = count


class Ledger:
    """All records of a run: the only truth about what is done.

    A record that is invalid, or whose files are missing or of another size, does not count. It is moved to quarantine;
    with `read_only` it only stands in `damaged`, which says of a path why it does not count.
    """

    def __init__(self, paths: RunPaths, read_only: bool = False) -> None:
        self._paths = paths
        self._read_only = read_only
        self.damaged: dict[Path, str] = {}
        self._reset()

    def _reset(self) -> None:
        self._generations: list[_Generation] = []
        self._own: set[tuple[int, int]] = set()  # records in files of their own that were looked at
        self._segments: dict[Path, int] = {}  # those that are referred to, and
        self._loaded: set[Path] = set()  # those that were read whole

    @property
    def latest_generation(self) -> int:
        """The latest generation that any shard has."""
        return max(len(self._generations) - 1, 0)

    def read(self, shard: int, generation: int = 0) -> Record | None:
        """The valid record of a shard's generation, or None: it is open. Always looks at the disk."""
        if generation < len(self._generations):
            self._generations[generation].forget(_one(shard))
        found, record = find(self._paths, shard, generation), None
        if found is not None:
            try:
                record = checked(self._paths, found[0], shard, generation)
            except DamagedError as error:
                found, record = self._set_aside(found[1], shard, generation, str(error))
        if found is None or record is None:
            return None
        self._excuse(shard, generation)
        where = _OWN_FILE
        if found[1] == self._paths.record(shard, generation):
            self._own.add((shard, generation))
        else:
            where = self._segments.setdefault(found[1], len(self._segments))
        noted = self._generation(generation)
        noted.note(_one(shard), where, _one(record.rows_ok), _one(record.rows_failed))
        noted.note_classes(shard, record.failed_by_class, record.retried_by_class)
        return record

    def refresh(self) -> None:
        """Look for records; reads only those that were not there before."""
        own, found = self._listing()
        if not self._segments.keys() - self.damaged.keys() <= set(found):
            self._reset()
        if own != self._own or not self._loaded.issuperset(found):
            with prefetched(self._paths, [self._paths.record(*key) for key in sorted(own - self._own)]):
                self._read_new(own, found)

    def _read_new(self, own: set[tuple[int, int]], found: list[Path]) -> None:
        gone = self._own - own
        for path in found:
            if path not in self._loaded:
                self._read_segment(path, own)
        if any(self._generations[g].where[shard] == _OWN_FILE for shard, g in gone if g < len(self._generations)):
            self._reset()  # they went nowhere: what an older segment says of them may count again
            for path in found:
                self._read_segment(path, own)
        self._own &= own
        for shard, generation in sorted(own - self._own):
            self.read(shard, generation)

    def open_shards(self, total: int) -> list[int]:
        """The shards of range(total) that are not done, in order. One that lacks an inner generation is not."""
        self.refresh()
        return np.flatnonzero(self._missing()[:total] >= 0).tolist()

    @property
    def own_files(self) -> set[tuple[int, int]]:
        """Shard and generation of the records in files of their own, as read so far."""
        return self._own

    def has_record(self, shard: int, generation: int) -> bool:
        return generation < len(self._generations) and bool(self._generations[generation].stands[shard])

    def files(self, shard: int, generation: int) -> tuple[bool, bool]:
        """Whether a record stands that names a data file, and one that names a failures file."""
        if not self.has_record(shard, generation):
            return False, False
        noted = self._generations[generation]
        return bool(noted.ok[shard]), bool(noted.failed[shard])

    def first_missing(self, shard: int) -> int:
        """The generation that an open shard lacks."""
        return int(self._missing()[shard])

    def latest_generation_of(self, shard: int) -> int:
        """The latest generation of a shard; −1: it has none."""
        return max((g for g, noted in enumerate(self._generations) if noted.where[shard] != _NOWHERE), default=-1)

    def failed_shards(self) -> list[int]:
        """The shards that are done and have failed rows, in order."""
        failed = sum((noted.failed - noted.retried for noted in self._generations), start=self._zeros())
        return np.flatnonzero((failed > 0) & (self._missing() < 0)).tolist()

    def error_classes(self, shard: int) -> set[str]:
        """The classes that failed rows of a shard have, or had."""
        return {name for noted in self._generations for name, counts in noted.failed_by_class.items() if counts[shard]}

    def totals(self) -> Totals:
        """Sums over the records read so far."""
        ok = failed = 0
        classes: dict[str, int] = {}
        counted = np.ones(self._paths.shards, bool)
        for noted in self._generations:
            counted &= noted.stands
            ok += int(noted.ok[counted].sum())
            failed += int(noted.failed[counted].sum() - noted.retried[counted].sum())
            for sign, table in ((1, noted.failed_by_class), (-1, noted.retried_by_class)):
                for name, counts in table.items():
                    classes[name] = classes.get(name, 0) + sign * int(counts[counted].sum())
        done = int((self._missing() < 0).sum())
        return Totals(done, ok, failed, {name: count for name, count in classes.items() if count})

    def records(self, shard: int | None = None) -> Iterator[Record]:
        """The records read so far, one after the other: by shard, then by generation."""
        shards = range(self._paths.shards) if shard is None else (shard,)
        segments = list(self._segments)
        for number in shards:
            for generation, noted in enumerate(self._generations):
                where = noted.where[number]
                if where == _NOWHERE:
                    continue
                data = record_in(segments[where], number, generation) if where != _OWN_FILE else None
                found = (data, None) if data is not None else find(self._paths, number, generation)
                with suppress(DamagedError):  # since it was read
                    if found is not None:
                        yield checked(self._paths, found[0], number, generation)

    def _generation(self, number: int) -> _Generation:
        while len(self._generations) <= number:
            self._generations.append(_Generation(self._paths.shards))
        return self._generations[number]

    def _zeros(self) -> Ints:
        return np.zeros(self._paths.shards, np.int32)

    def _missing(self) -> Ints:
        """The first generation that each shard lacks though a later one, or none, stands; −1: it lacks none."""
        missing = np.full(self._paths.shards, -1, np.int32)
        later = np.zeros(self._paths.shards, bool)
        for generation in reversed(range(max(len(self._generations), 1))):
            stands = self._generations[generation].stands if self._generations else later
            missing[~stands & (later | (generation == 0))] = generation
            later |= stands
        return missing

    def _listing(self) -> tuple[set[tuple[int, int]], list[Path]]:
        """Shard and generation of the records in files of their own, and the segments."""
        folder = self._paths.records_folder
        own: set[tuple[int, int]] = set()
        before: list[Path] | None = None
        while True:
            there = names(folder)
            found = in_order(folder / name for name in there if name.startswith("compact-"))
            if found == before:
                # Else records may have moved into a segment behind the back of this look: then it sees neither.
                return own, found
            own = {key for name in there if (key := self._paths.parse_record(name))}
            before = found

    def _read_segment(self, path: Path, own: set[tuple[int, int]]) -> None:
        number = self._segments.setdefault(path, len(self._segments))
        self._loaded.add(path)
        try:
            table = read_segment(path)
        except DamagedError as error:
            self.damaged[path] = str(error)
            if not self._read_only:
                quarantine(self._paths, path, str(error))
            return
        generations = np.array(table.column("generation").to_pylist(), np.int32)
        shards = table.column("shard").to_pylist()
        for generation in np.unique(generations).tolist():
            noted = self._generation(generation)
            stand = [
                place
                for place in np.flatnonzero(generations == generation).tolist()
                if not (noted.where[shards[place]] == _OWN_FILE and (shards[place], generation) in own)
            ]
            self._note_rows(noted, generation, number, table.take(pa.array(stand, pa.int64())))

    def _note_rows(self, noted: _Generation, generation: int, number: int, table: pa.Table) -> None:
        # Lists, for pyarrow's way to numpy imports pandas: a second, and 50 MB.
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        there, sizes = np.ones(len(columns["shard"]), bool), Sizes(self._paths)
        for column, name in (("data_bytes", self._paths.data_name), ("failures_bytes", self._paths.failures_name)):
            for place, (shard, size) in enumerate(zip(columns["shard"], columns[column], strict=True)):
                if size < 0 or (found := sizes.of(name(shard, generation), size)) == size:
                    continue
                there[place], path = False, output_path(name(shard, generation))
                what = "is missing" if found is None else f"has {found} bytes, not {size}"
                self.damaged[path] = f"{self._paths.relative(path)} {what}"
        shards, ok, failed = (np.array(columns[name], np.int32) for name in ("shard", "rows_ok", "rows_failed"))
        noted.forget(shards)
        noted.note(shards[there], number, ok[there], failed[there])
        for shard in shards[there].tolist() if self.damaged else ():
            self._excuse(shard, generation)
        for place, (failed_json, retried_json) in enumerate(
            zip(columns["failed_by_class"], columns["retried_by_class"], strict=True)
        ):
            if there[place] and (failed_json != "{}" or retried_json != "{}"):
                noted.note_classes(columns["shard"][place], json.loads(failed_json), json.loads(retried_json))

    def _excuse(self, shard: int, generation: int) -> None:
        """A valid record stands: what is said of older ones of the same shard does not count."""
        for place in (self._paths.record, self._paths.data, self._paths.failures):
            self.damaged.pop(place(shard, generation), None)

    def _set_aside(
        self, path: Path, shard: int, generation: int, why: str
    ) -> tuple[tuple[bytes, Path] | None, Record | None]:
        """What counts instead of a record that is damaged."""
        own = self._paths.record(shard, generation)
        if self._read_only or path != own:
            self.damaged[own] = why
            return None, None
        # Under the lock and looked at once more, for a worker may have replaced the damaged record by a valid one.
        with exclusive(self._paths.commit_lock(shard)):
            while (found := find(self._paths, shard, generation)) is not None:
                try:
                    return found, checked(self._paths, found[0], shard, generation)
                except DamagedError as error:
                    if found[1] != own:
                        break  # a segment stays: what it says of other shards is right
                    quarantine(self._paths, own, str(error))
        return None, None


def _one(number: int) -> Ints:
    return np.array([number], np.int32)
