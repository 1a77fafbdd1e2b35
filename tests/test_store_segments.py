"""Segments: no record is lost or counted twice, and opening a run reads one file per segment."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from store_shards import ROWS, attempt, files, in_child, kill_at, run_folder
from stylemill.errors import DamagedError
from stylemill.report.status import status
from stylemill.store.commit import clean, commit
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger, Totals
from stylemill.store.paths import RunPaths
from stylemill.store.records import valid_record
from stylemill.store.recover import recover_records
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
        assert Ledger(paths).read(shard) == record
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
