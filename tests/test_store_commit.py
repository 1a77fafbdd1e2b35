"""A shard is committed once and completely, whatever is killed, and if several attempts commit it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from store_shards import FINGERPRINT, ROWS, Attempt, attempt, files, in_child, kill_at, run_folder
from stylemill.errors import DamagedError, StorageError
from stylemill.store.checkpoints import save_inputs
from stylemill.store.commit import clean, commit
from stylemill.store.ledger import Ledger
from stylemill.store.paths import RunPaths
from stylemill.store.verify import verify

STEPS = ("fsync", "link", "unlink", "rename", "mkdir", "rmdir")
OUTPUT = ("data/train-00000-of-00001.parquet", "failures/00000.parquet")


def reference_output(folder: Path) -> dict[str, bytes]:
    paths = run_folder(folder)
    commit(paths, *attempt(paths, "reference", failed=[2]))
    return {name: (paths.output / name).read_bytes() for name in OUTPUT}


def no_files(paths: RunPaths) -> None:
    pass


def truncated_data(paths: RunPaths) -> None:
    paths.data(0).write_bytes(b"PAR1 and no more")


def truncated_record(paths: RunPaths) -> None:
    commit(paths, *attempt(paths, "before", failed=[2]))
    os.truncate(paths.record(0), 100)


def other_rows(paths: RunPaths) -> None:
    commit(paths, *attempt(paths, "before"))
    paths.record(0).unlink()


@pytest.mark.parametrize("existing", [no_files, truncated_data, truncated_record, other_rows])
def test_after_a_kill_before_any_step_the_next_commit_completes(
    tmp_path: Path, existing: Callable[[RunPaths], None]
) -> None:
    expected = reference_output(tmp_path / "reference")
    for step in range(200):
        paths = run_folder(tmp_path / str(step))
        save_inputs(paths, 0, "killed", {}, {})
        existing(paths)
        first = attempt(paths, "killed", failed=[2])

        def killed(paths: RunPaths = paths, first: Attempt = first, step: int = step) -> None:
            kill_at(os, STEPS, step)
            commit(paths, *first)

        exit_code = in_child(killed)
        assert exit_code in (0, -signal.SIGKILL)
        before = Ledger(paths, read_only=True).read(0)

        record = commit(paths, *attempt(paths, "second", failed=[2]))

        assert before is None or before == record  # nothing committed is replaced
        assert {name: (paths.output / name).read_bytes() for name in OUTPUT} == expected
        assert (record.rows_ok, record.rows_failed, record.failed_by_class) == (3, 1, {"ImageError": 1})
        clean(paths)
        assert verify(paths.output).problems == []
        kept = {name for name in files(paths.output) if not name.startswith("quarantine/")}
        assert kept == {"job.json", "records/00000.json", *OUTPUT}
        if exit_code == 0:
            assert step > 8  # kills at several steps were tested; without a kill, the loop ends
            return
    raise AssertionError("every commit was killed")


def test_files_of_a_killed_commit_are_used(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "first", model="on another machine"))
    paths.record(0).unlink()
    published = files(paths.data_folder)

    record = commit(paths, *attempt(paths, "second"))

    assert files(paths.data_folder) == published
    assert record.attempt == "second"
    assert record.data is not None
    assert record.data.bytes == paths.data(0).stat().st_size
    assert verify(paths.output).ok
    assert not paths.quarantine.exists()


def test_files_of_another_job_are_not_used(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "first", fingerprint="0" * 64))
    record = commit(paths, *attempt(paths, "second"))
    assert record.fingerprint == FINGERPRINT
    assert verify(paths.output).ok
    assert len(list(paths.quarantine.glob("*.parquet.*"))) == 1


def test_files_with_a_flipped_bit_are_not_used(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "first"))
    data = paths.data(0).read_bytes()
    for position in range(0, len(data), 97):
        paths.record(0).unlink()
        paths.data(0).write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        commit(paths, *attempt(paths, f"at-{position}"))
        assert paths.data(0).read_bytes() == data


def test_a_shard_without_successful_or_failed_rows_has_no_file_for_them(tmp_path: Path) -> None:
    paths = run_folder(tmp_path, shards=2)
    all_failed = commit(paths, *attempt(paths, "a", 0, failed=range(ROWS)))
    all_ok = commit(paths, *attempt(paths, "b", 1))
    assert all_failed.data is None
    assert all_ok.failures is None
    clean(paths)
    assert sorted(files(paths.output)) == [
        "data/train-00001-of-00002.parquet",
        "failures/00000.parquet",
        "job.json",
        "records/00000.json",
        "records/00001.json",
    ]
    assert sorted(path.name for path in paths.output.iterdir()) == ["data", "failures", "job.json", "records"]
    assert verify(paths.output).ok


def test_other_rows_than_those_of_the_shard_are_never_committed(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    record, data, failures = attempt(paths, "short", failed=[1])
    with pytest.raises(DamagedError, match="nothing was committed"):
        commit(paths, record, data, None)
    with pytest.raises(StorageError):
        commit(paths, record, data, failures)  # the refused attempt removed its files from tmp/
    twice = attempt(paths, "twice", failed=[1])
    more = attempt(paths, "more")
    with pytest.raises(DamagedError, match="once each"):
        commit(paths, twice[0], more[1], twice[2])
    other = attempt(paths, "other", fingerprint="0" * 64)
    with pytest.raises(DamagedError, match="another job"):
        commit(paths, replace(other[0], fingerprint=FINGERPRINT), other[1], None)
    assert not any(files(folder) for folder in (paths.data_folder, paths.failures_folder, paths.records_folder))


def test_nothing_is_committed_on_a_full_disk_and_the_next_commit_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = run_folder(tmp_path)
    current = attempt(paths, "first")
    real = os.fsync
    for successful in range(5):
        left = [real] * successful

        def full(descriptor: int, left: list[Callable[[int], None]] = left) -> None:
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            left.pop()(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match=r"disk is full.*same command resumes"):
                commit(paths, *current)
        assert not files(paths.tmp)
        current = attempt(paths, f"again-{successful}")
    # The last try published its record, only the fsync of the folder failed: this record is the committed one.
    assert commit(paths, *current).attempt == "again-3"
    assert verify(paths.output).ok


@pytest.mark.parametrize("failed", [[], [1]])
def test_one_of_several_concurrent_commits_of_a_shard_counts(tmp_path: Path, failed: list[int]) -> None:
    """Also if the attempts differ in which rows failed: one of them is committed completely."""
    processes = multiprocessing.get_context("fork")
    for round_ in range(4):
        paths = run_folder(tmp_path / str(round_))
        barrier, records = processes.Barrier(3), processes.Queue()
        attempts = [attempt(paths, f"a{i}", failed=failed if i else []) for i in range(3)]

        def work(one: Attempt, paths: RunPaths = paths, barrier: Any = barrier, records: Any = records) -> None:
            barrier.wait()
            records.put(commit(paths, *one).to_bytes())

        workers = [processes.Process(target=work, args=(one,)) for one in attempts]
        for worker in workers:
            worker.start()
        returned = {records.get(timeout=30) for _ in workers}
        for worker in workers:
            worker.join()
        assert returned == {paths.record(0).read_bytes()}
        clean(paths)
        assert verify(paths.output).problems == []
        assert not paths.quarantine.exists()


def test_clean_keeps_what_an_open_shard_needs(tmp_path: Path) -> None:
    paths = run_folder(tmp_path, shards=2)
    commit(paths, *attempt(paths, "a", 0))
    for shard in range(2):  # for shard 0, a late attempt
        save_inputs(paths, shard, "late", {}, {})
        attempt(paths, "killed", shard)
    paths.commit_lock(0).touch()
    clean(paths)
    assert [path.name for path in paths.checkpoints_folder.iterdir()] == ["00001"]
    assert list(paths.tmp.iterdir()) == []
    commit(paths, *attempt(paths, "b", 1))
    clean(paths)
    clean(paths)
    assert not paths.tmp.exists()
    assert not paths.checkpoints_folder.exists()
    assert pq.read_table(paths.data_folder).num_rows == 2 * ROWS
