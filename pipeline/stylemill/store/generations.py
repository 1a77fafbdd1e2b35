"""The numbers that the ledger keeps of each record: arrays with one element per shard, and their sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
# Where the record of a shard is: in a record file, nowhere, or in the segment with this number.
RECORD_FILE = -1
NO_RECORD = -2


@dataclass(frozen=True)
class Totals:
    """Sums over the committed shards. A row that was retried counts once, with its latest result."""

    shards: int
    rows_ok: int
    rows_failed: int
    failed_by_class: dict[str, int]

    def changed(self, before: Totals, after: Totals) -> Totals:
        """These totals after the totals of some of the shards changed from `before` to `after`."""
        classes = dict(self.failed_by_class)
        for sign, part in ((-1, before), (1, after)):
            for name, count in part.failed_by_class.items():
                classes[name] = classes.get(name, 0) + sign * count
        return Totals(
            self.shards - before.shards + after.shards,
            self.rows_ok - before.rows_ok + after.rows_ok,
            self.rows_failed - before.rows_failed + after.rows_failed,
            {name: count for name, count in classes.items() if count},
        )


class Generation:
    """The numbers of all records of one generation. Methods that take shards take an index of the arrays."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self.location = np.full(shards, NO_RECORD, np.int32)
        self.ok, self.failed = self._zeros(), self._zeros()
        self.failed_by_class: dict[str, Ints] = {}
        self.retried_by_class: dict[str, Ints] = {}

    def _zeros(self) -> Ints:
        return np.zeros(self._shards, np.int32)

    def has_record(self, shards: slice) -> npt.NDArray[np.bool_]:
        return np.asarray(self.location[shards] != NO_RECORD)

    def still_failed(self, shards: slice) -> Ints:
        """The rows that failed in this generation, less those that it took over from earlier ones."""
        return np.asarray(
            self.failed[shards] - sum(counts[shards] for counts in self.retried_by_class.values()), np.int32
        )

    def clear(self, shards: Ints) -> None:
        self.location[shards] = NO_RECORD
        for numbers in (self.ok, self.failed, *self.failed_by_class.values(), *self.retried_by_class.values()):
            numbers[shards] = 0

    def set(self, shards: Ints, location: int, ok: Ints, failed: Ints) -> None:
        self.clear(shards)
        self.location[shards], self.ok[shards], self.failed[shards] = location, ok, failed

    def set_classes(self, shard: int, failed: dict[str, int], retried: dict[str, int]) -> None:
        for table, counts in ((self.failed_by_class, failed), (self.retried_by_class, retried)):
            for name, count in counts.items():
                if name not in table:
                    table[name] = self._zeros()
                table[name][shard] = count


def sum_up(generations: list[Generation], shards: slice) -> Totals:
    """The totals of a range of shards."""
    ok = failed = 0
    classes: dict[str, int] = {}
    missing = first_missing(generations, shards)
    counted = np.ones(len(missing), bool)
    for numbers in generations:
        counted &= numbers.has_record(shards)
        ok += int(numbers.ok[shards][counted].sum())
        failed += int(numbers.still_failed(shards)[counted].sum())
        for sign, table in ((1, numbers.failed_by_class), (-1, numbers.retried_by_class)):
            for name, counts in table.items():
                classes[name] = classes.get(name, 0) + sign * int(counts[shards][counted].sum())
    committed = int((missing < 0).sum())
    return Totals(committed, ok, failed, {name: count for name, count in classes.items() if count})


def first_missing(generations: list[Generation], shards: slice) -> Ints:
    """For each shard, the first generation without a record, if it is 0 or a later one has a record; else −1."""
    later = np.zeros(len(generations[0].location[shards]), bool)
    missing = np.full(len(later), -1, np.int32)
    for generation in reversed(range(len(generations))):
        present = generations[generation].has_record(shards)
        missing[~present & (later | (generation == 0))] = generation
        later |= present
    return missing
