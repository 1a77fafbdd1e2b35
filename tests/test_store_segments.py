"""Thousands of records in one file: nothing is lost, nothing counts twice, and opening a run costs no more for them."""

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
from stylemill.store.segments import read_segment, segments
from stylemill.store.verify import verify

SHARDS = 6
ALL = Totals(SHARDS, 4 * SHARDS - 3, 3, {"ImageError": 3})


def committed(folder: Path, shards: int = SHARDS, lost: int = 3) -> RunPaths:
    """A run whose first `lost` shards have a failed row each."""
    paths = run_folder(folder, shards)
    for shard in range(shards):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * ROWS] if shard < lost else []))
    return paths


def compacted(folder: Path, shards: int = SHARDS) -> RunPaths:
    paths = committed(folder, shards)
    assert compact(paths, opened(paths), least=1)
    return paths


def opened(paths: RunPaths, read_only: bool = False) -> Ledger:
    ledger = Ledger(paths, read_only)
    ledger.refresh()
    return ledger


def test_compaction_keeps_every_record_to_the_byte(tmp_path: Path) -> None:
    paths = committed(tmp_path)
    before = {shard: paths.record(shard).read_bytes() for shard in range(SHARDS)}
    ledger = opened(paths)
    assert not compact(paths, ledger, least=SHARDS + 1), "not yet worth it"
    assert compact(paths, ledger, least=SHARDS)
    (segment,) = segments(paths)
    assert sorted(paths.records_folder.iterdir()) == [segment]
    for found in (ledger, opened(paths), opened(paths, read_only=True)):
        assert found.totals() == ALL
        assert {record.shard: record.to_bytes() for record in found.records()} == before
    assert not compact(paths, ledger, least=1), "there is nothing left to compact"


def test_everyone_sees_compacted_records_as_standing(tmp_path: Path) -> None:
    paths = compacted(tmp_path)
    before = files(paths.records_folder), files(paths.data_folder)
    for shard in range(SHARDS):
        record = valid_record(paths, shard)
        assert record is not None
        assert Ledger(paths).read(shard) == record
        assert commit(paths, *attempt(paths, "late", shard)) == record  # an attempt that comes too late adopts it
    clean(paths)
    assert not paths.checkpoints_folder.exists(), "clean takes the run for finished"
    assert verify(paths.output, deep=True).problems == []
    assert status(paths.output).summary.rows_ok == ALL.rows_ok
    assert (files(paths.records_folder), files(paths.data_folder)) == before


def test_killed_at_any_step_of_compaction_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    for step in range(200):
        paths = committed(tmp_path / str(step), shards=3)
        before = {record.shard: record.to_bytes() for record in opened(paths).records()}

        def killed(paths: RunPaths = paths, step: int = step) -> None:
            kill_at(os, ("fsync", "link", "unlink", "rename", "mkdir"), step)
            compact(paths, opened(paths), least=1)

        exit_code = in_child(killed)
        assert exit_code in (0, -signal.SIGKILL)
        for read_only in (True, False):
            found = opened(paths, read_only)
            assert found.totals() == Totals(3, 9, 3, {"ImageError": 3})
            assert {record.shard: record.to_bytes() for record in found.records()} == before
        ledger = opened(paths)
        compact(paths, ledger, least=1)
        clean(paths, ledger)
        assert not list(paths.records_folder.glob("0*.json"))
        assert {record.shard: record.to_bytes() for record in opened(paths).records()} == before
        assert verify(paths.output).problems == []
        assert not paths.quarantine.exists()
        if exit_code == 0:
            assert step > 8
            return
    raise AssertionError("compaction never ended")


def test_opening_reads_a_file_a_segment_not_one_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    real = Path.read_bytes

    def counted(path: Path) -> bytes:
        read[path.suffix] += 1
        return real(path)

    counts = []
    for shards in (4, 24):
        paths = committed(tmp_path / str(shards), shards)
        compact(paths, opened(paths), least=1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", counted)
            read.clear()
            ledger = opened(paths)
            counts.append(dict(read))
            ledger.refresh()
            assert ledger.open_shards(shards) == []
            assert dict(read) == counts[-1], "looking again reads nothing again"
    assert counts == [{".parquet": 1}] * 2


def test_a_reader_beside_a_compaction_misses_no_record(tmp_path: Path) -> None:
    paths = committed(tmp_path, shards=12)
    processes = multiprocessing.get_context("fork")
    ready, done = processes.Event(), processes.Event()

    def work(ready: Any, done: Any) -> None:
        ledger = opened(paths)
        ready.wait()
        compact(paths, ledger, least=1)
        done.set()

    worker = processes.Process(target=work, args=(ready, done))
    worker.start()
    ready.set()
    looks = 0
    while not done.is_set() or looks < 3:
        assert opened(paths, read_only=True).totals() == Totals(12, 45, 3, {"ImageError": 3})
        assert all(valid_record(paths, shard) for shard in (0, 11))
        looks += 1
    worker.join()
    assert worker.exitcode == 0


def test_a_shard_that_is_made_again_overrides_its_compacted_record(tmp_path: Path) -> None:
    paths = compacted(tmp_path)
    paths.data(1).unlink()
    ledger = opened(paths)
    assert ledger.open_shards(SHARDS) == [1]
    assert segments(paths), "what it says of other shards is right"
    again = commit(paths, *attempt(paths, "again", 1))  # and now all its rows are well
    for _ in range(2):
        ledger = opened(paths)
        assert ledger.totals() == Totals(SHARDS, ALL.rows_ok + 1, 2, {"ImageError": 2})
        assert valid_record(paths, 1) == again
        assert [record for record in ledger.records() if record.shard == 1] == [again]
        clean(paths, ledger)
        assert verify(paths.output).problems == []
        paths.checkpoints_folder.mkdir(exist_ok=True)
        paths.tmp.mkdir(exist_ok=True)
        compact(paths, ledger, least=1)  # the later segment counts
    assert len(segments(paths)) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_segment_costs_its_records_and_no_shard(tmp_path: Path, damage: str) -> None:
    paths = compacted(tmp_path)
    before = files(paths.data_folder) | files(paths.failures_folder)
    (segment,) = segments(paths)
    whole = segment.read_bytes()
    flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    segment.write_bytes({"truncated": whole[:-1], "flipped": flipped, "emptied": b""}[damage])
    with pytest.raises(DamagedError, match="truncated or was changed"):
        read_segment(segment)
    looking = opened(paths, read_only=True)
    assert looking.totals().shards == 0
    assert any("compact-" in problem for problem in verify(paths.output).problems)
    assert valid_record(paths, 0) is None

    ledger = opened(paths)
    assert ledger.open_shards(SHARDS) == list(range(SHARDS))
    assert not segments(paths)
    run, _ = RunFile.open(paths.output)
    assert recover_records(paths, run, ledger) == SHARDS
    assert opened(paths).totals() == ALL
    assert files(paths.data_folder) | files(paths.failures_folder) == before
    clean(paths)
    assert verify(paths.output).problems == []


def test_files_that_are_not_whole_get_no_record(tmp_path: Path) -> None:
    paths = committed(tmp_path)
    for shard in range(SHARDS):
        paths.record(shard).unlink()
    paths.failures(0).unlink()  # its row is missing
    data = paths.data(3).read_bytes()
    paths.data(3).write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])  # of the footer
    run, _ = RunFile.open(paths.output)
    ledger = opened(paths)
    assert recover_records(paths, run, ledger) == SHARDS - 2
    assert ledger.open_shards(SHARDS) == [0, 3]
