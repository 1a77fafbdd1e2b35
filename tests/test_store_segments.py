"""Segments: no record is lost or counted twice, and opening a run reads one file per segment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from store_shards import ROWS, attempt, files, in_child, kill_at, retry_attempt, run_folder
from stylemill.errors import DamagedError
from stylemill.report.status import status
from stylemill.store.commit import clean, commit, confirm
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger, Totals
from stylemill.store.paths import RunPaths
from stylemill.store.records import valid_record
from stylemill.store.recover import recover_records
from stylemill.store.retries import failed_rows_before
from stylemill.store.run_file import RunFile
from stylemill.store.segments import list_segments, read_segment
from stylemill.store.verify import verify

SHARDS = 6
ALL = Totals(SHARDS, 4 * SHARDS - 3, 3, {"ImageError": 3})


def committed(folder: Path, shards: int = SHARDS, failing_shards: int = 3) -> RunPaths:
    """A run with one failed row in each of its first shards."""
    paths = run_folder(folder, shards)
    for shard in range(shards):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * ROWS] if shard < failing_shards else []))
    return paths


def compacted(folder: Path, shards: int = SHARDS) -> RunPaths:
    paths = committed(folder, shards)
    assert compact(paths, opened(paths), min_records=1)
    return paths


def opened(paths: RunPaths, read_only: bool = False) -> Ledger:
    ledger = Ledger(paths, read_only)
    ledger.refresh()
    return ledger


def test_compaction_keeps_the_bytes_of_every_record(tmp_path: Path) -> None:
    paths = committed(tmp_path)
    before = {shard: paths.record(shard).read_bytes() for shard in range(SHARDS)}
    ledger = opened(paths)
    assert not compact(paths, ledger, min_records=SHARDS + 1), "too few records"
    assert compact(paths, ledger, min_records=SHARDS)
    (segment,) = list_segments(paths)
    assert sorted(paths.records_folder.iterdir()) == [segment]
    for compacted_ledger in (ledger, opened(paths), opened(paths, read_only=True)):
        assert compacted_ledger.totals() == ALL
        assert {record.shard: record.to_bytes() for record in compacted_ledger.records()} == before
    assert not compact(paths, ledger, min_records=1), "there is nothing left to compact"


def test_shards_with_compacted_records_are_committed_for_all_readers(tmp_path: Path) -> None:
    paths = compacted(tmp_path)
    before = files(paths.records_folder), files(paths.data_folder)
    for shard in range(SHARDS):
        record = valid_record(paths, shard)
        assert record is not None
        assert opened(paths).read(shard) == record
        assert commit(paths, *attempt(paths, "late", shard)) == record  # for a late attempt
    clean(paths)
    assert not paths.checkpoints_folder.exists(), "the run is finished"
    assert verify(paths.output, deep=True).problems == []
    assert status(paths.output).summary.rows_ok == ALL.rows_ok
    assert (files(paths.records_folder), files(paths.data_folder)) == before


def test_a_compaction_killed_at_any_step_loses_no_record_and_counts_none_twice(tmp_path: Path) -> None:
    for step in range(200):
        paths = committed(tmp_path / str(step), shards=3)
        before = {record.shard: record.to_bytes() for record in opened(paths).records()}

        def killed(paths: RunPaths = paths, step: int = step) -> None:
            kill_at(os, ("fsync", "link", "unlink", "rename", "mkdir"), step)
            compact(paths, opened(paths), min_records=1)

        exit_code = in_child(killed)
        assert exit_code in (0, -signal.SIGKILL)
        for read_only in (True, False):
            ledger = opened(paths, read_only)
            assert ledger.totals() == Totals(3, 9, 3, {"ImageError": 3})
            assert {record.shard: record.to_bytes() for record in ledger.records()} == before
        ledger = opened(paths)
        compact(paths, ledger, min_records=1)
        clean(paths, ledger)
        assert not list(paths.records_folder.glob("0*.json"))
        assert {record.shard: record.to_bytes() for record in opened(paths).records()} == before
        assert verify(paths.output).problems == []
        assert not paths.quarantine.exists()
        if exit_code == 0:
            assert step > 8
            return
    raise AssertionError("every compaction was killed")


def test_opening_a_run_reads_one_file_per_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    real = Path.read_bytes

    def counted(path: Path) -> bytes:
        read[path.suffix] += 1
        return real(path)

    counts = []
    for shards in (4, 24):
        paths = committed(tmp_path / str(shards), shards)
        compact(paths, opened(paths), min_records=1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", counted)
            read.clear()
            ledger = opened(paths)
            counts.append(dict(read))
            ledger.refresh()
            assert ledger.open_shards(shards) == []
            assert dict(read) == counts[-1], "a second refresh reads nothing"
    assert counts == [{".parquet": 1}] * 2


def test_the_cost_of_a_lease_and_of_a_commit_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """Neither the driver nor a worker lists records/, or opens a segment or the record of another shard."""
    paths = run_folder(tmp_path, SHARDS)
    for shard in range(4):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * ROWS]))
        compact(paths, opened(paths), min_records=1)
    assert len(list_segments(paths)) == 4
    commit(paths, *attempt(paths, "a4", 4))
    ledger = opened(paths)
    ledger.totals()
    work = attempt(paths, "a5", 5, failed=[5 * ROWS + 1])
    accesses: list[tuple[str, Path]] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(paths.records_folder) in str(arguments[0]):
            accesses.append((event, Path(arguments[0])))

    def lease_and_commit() -> None:
        sys.addaudithook(note)
        leased = ledger.read(5)
        committed = confirm(paths, commit(paths, *work))
        read, totals = ledger.read(5), ledger.totals()
        seen = set(accesses)
        assert seen == {("open", paths.record(5)), ("open", paths.records_folder)}, seen  # the folder: for its fsync
        assert (leased, read) == (None, committed)
        assert totals == opened(paths).totals() == Totals(6, 24 - 5, 5, {"ImageError": 5})

    assert in_child(lease_and_commit) == 0  # an audit hook cannot be removed


class Commits(RuleBasedStateMachine):
    """Commits, retries, compactions and damage in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.paths = run_folder(Path(self.folder.name), SHARDS)
        self.ledger = opened(self.paths)
        self.names = count()

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(shard=st.integers(0, SHARDS - 1), failed=st.sets(st.integers(0, ROWS - 1)))
    def commit(self, shard: int, failed: set[int]) -> None:
        rows = [shard * ROWS + row for row in failed]
        commit(self.paths, *attempt(self.paths, f"a{next(self.names)}", shard, failed=rows))
        self.ledger.read(shard)

    @rule(shard=st.integers(0, SHARDS - 1), mended=st.integers(0, ROWS))
    def retry(self, shard: int, mended: int) -> None:
        self.ledger.read(shard)
        if shard in self.ledger.failed_shards() and not self.ledger.has_record(shard, 1):
            rows = list(failed_rows_before(self.paths, shard, 1))
            commit(self.paths, *retry_attempt(self.paths, rows[:mended], rows[mended:], shard))
            self.ledger.read(shard, 1)

    @rule(shard=st.integers(0, SHARDS - 1), generation=st.integers(0, 1), what=st.sampled_from(["record", "data"]))
    def damage(self, shard: int, generation: int, what: str) -> None:
        path = getattr(self.paths, what)(shard, generation)
        if path.exists():
            os.truncate(path, 10)
            self.ledger.read(shard, generation)

    @rule()
    def compact(self) -> None:
        compact(self.paths, self.ledger, min_records=2)

    @rule()
    def refresh(self) -> None:
        self.ledger.refresh()

    @invariant()
    def the_running_totals_are_those_of_a_fresh_sum(self) -> None:
        running = self.ledger.totals()
        self.ledger._totals = None
        assert self.ledger.totals() == running


TestTotals = Commits.TestCase
TestTotals.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_a_reader_during_a_compaction_misses_no_record(tmp_path: Path) -> None:
    paths = committed(tmp_path, shards=12)
    processes = multiprocessing.get_context("fork")
    ready, done = processes.Event(), processes.Event()

    def work(ready: Any, done: Any) -> None:
        ledger = opened(paths)
        ready.wait()
        compact(paths, ledger, min_records=1)
        done.set()

    worker = processes.Process(target=work, args=(ready, done))
    worker.start()
    ready.set()
    reads = 0
    while not done.is_set() or reads < 3:
        assert opened(paths, read_only=True).totals() == Totals(12, 45, 3, {"ImageError": 3})
        assert all(valid_record(paths, shard) for shard in (0, 11))
        reads += 1
    worker.join()
    assert worker.exitcode == 0


def test_a_new_record_takes_precedence_over_a_compacted_one(tmp_path: Path) -> None:
    paths = compacted(tmp_path)
    paths.data(1).unlink()
    ledger = opened(paths)
    assert ledger.open_shards(SHARDS) == [1]
    assert list_segments(paths), "its records of other shards are valid"
    again = commit(paths, *attempt(paths, "again", 1))  # now without a failed row
    for _ in range(2):
        ledger = opened(paths)
        assert ledger.totals() == Totals(SHARDS, ALL.rows_ok + 1, 2, {"ImageError": 2})
        assert valid_record(paths, 1) == again
        assert [record for record in ledger.records() if record.shard == 1] == [again]
        clean(paths, ledger)
        assert verify(paths.output).problems == []
        paths.checkpoints_folder.mkdir(exist_ok=True)
        paths.tmp.mkdir(exist_ok=True)
        compact(paths, ledger, min_records=1)  # the later segment takes precedence
    assert len(list_segments(paths)) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_the_records_of_a_damaged_segment_are_recovered(tmp_path: Path, damage: str) -> None:
    paths = compacted(tmp_path)
    before = files(paths.data_folder) | files(paths.failures_folder)
    (segment,) = list_segments(paths)
    data = segment.read_bytes()
    flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    segment.write_bytes({"truncated": data[:-1], "flipped": flipped, "emptied": b""}[damage])
    with pytest.raises(DamagedError, match="truncated or was changed"):
        read_segment(segment)
    assert opened(paths, read_only=True).totals().shards == 0
    assert any("compact-" in problem for problem in verify(paths.output).problems)
    assert valid_record(paths, 0) is None

    ledger = opened(paths)
    assert ledger.open_shards(SHARDS) == list(range(SHARDS))
    assert not list_segments(paths)
    run, _ = RunFile.open(paths.output)
    assert recover_records(paths, run, ledger) == SHARDS
    assert opened(paths).totals() == ALL
    assert files(paths.data_folder) | files(paths.failures_folder) == before
    clean(paths)
    assert verify(paths.output).problems == []


def test_no_record_is_recovered_for_missing_or_damaged_files(tmp_path: Path) -> None:
    paths = committed(tmp_path)
    for shard in range(SHARDS):
        paths.record(shard).unlink()
    paths.failures(0).unlink()  # one row is then missing
    data = paths.data(3).read_bytes()
    paths.data(3).write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])  # of the footer
    run, _ = RunFile.open(paths.output)
    ledger = opened(paths)
    assert recover_records(paths, run, ledger) == SHARDS - 2
    assert ledger.open_shards(SHARDS) == [0, 3]
