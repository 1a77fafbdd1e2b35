"""A shard is committed once and whole, whatever is killed between two steps and whoever else commits it."""

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


def committed_bytes(folder: Path) -> dict[str, bytes]:
    paths = run_folder(folder)
    commit(paths, *attempt(paths, "reference", failed=[2]))
    return {name: (paths.output / name).read_bytes() for name in OUTPUT}


def nothing(paths: RunPaths) -> None:
    pass


def truncated_data(paths: RunPaths) -> None:
    paths.data(0).write_bytes(b"PAR1 and no more")


def truncated_record(paths: RunPaths) -> None:
    commit(paths, *attempt(paths, "before", failed=[2]))
    os.truncate(paths.record(0), 100)


def other_rows(paths: RunPaths) -> None:
    commit(paths, *attempt(paths, "before"))
    paths.record(0).unlink()


@pytest.mark.parametrize("found", [nothing, truncated_data, truncated_record, other_rows])
def test_killed_before_any_step_the_same_commit_finishes(tmp_path: Path, found: Callable[[RunPaths], None]) -> None:
    expected = committed_bytes(tmp_path / "reference")
    for step in range(200):
        paths = run_folder(tmp_path / str(step))
        save_inputs(paths, 0, "killed", {}, {})
        found(paths)
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
            assert step > 8  # several steps were tried, the last try was not killed any more
            return
    raise AssertionError("the commit never ended")


def test_files_of_a_killed_commit_are_adopted(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "first", model="on another machine"))
    paths.record(0).unlink()
    standing = files(paths.data_folder)

    record = commit(paths, *attempt(paths, "second"))

    assert files(paths.data_folder) == standing
    assert record.attempt == "second"
    assert record.data is not None
    assert record.data.bytes == paths.data(0).stat().st_size
    assert verify(paths.output).ok
    assert not paths.quarantine.exists()


def test_files_of_another_job_are_not_adopted(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "first", fingerprint="0" * 64))
    record = commit(paths, *attempt(paths, "second"))
    assert record.fingerprint == FINGERPRINT
    assert verify(paths.output).ok
    assert len(list(paths.quarantine.glob("*.parquet.*"))) == 1


def test_no_flipped_bit_is_adopted(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "first"))
    whole = paths.data(0).read_bytes()
    for place in range(0, len(whole), 97):
        paths.record(0).unlink()
        paths.data(0).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        commit(paths, *attempt(paths, f"at-{place}"))
        assert paths.data(0).read_bytes() == whole


def test_shards_without_a_success_or_without_a_failure_have_no_such_file(tmp_path: Path) -> None:
    paths = run_folder(tmp_path, shards=2)
    all_lost = commit(paths, *attempt(paths, "a", 0, failed=range(ROWS)))
    all_good = commit(paths, *attempt(paths, "b", 1))
    assert all_lost.data is None
    assert all_good.failures is None
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


def test_rows_that_are_not_the_shard_are_never_committed(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    record, data, failures = attempt(paths, "short", failed=[1])
    with pytest.raises(DamagedError, match="nothing was committed"):
        commit(paths, record, data, None)
    with pytest.raises(StorageError):
        commit(paths, record, data, failures)  # the refused attempt left nothing in tmp/ to try again with
    twice = attempt(paths, "twice", failed=[1])
    more = attempt(paths, "more")
    with pytest.raises(DamagedError, match="once each"):
        commit(paths, twice[0], more[1], twice[2])
    other = attempt(paths, "other", fingerprint="0" * 64)
    with pytest.raises(DamagedError, match="another job"):
        commit(paths, replace(other[0], fingerprint=FINGERPRINT), other[1], None)
    assert not any(files(folder) for folder in (paths.data_folder, paths.failures_folder, paths.records_folder))


def test_a_full_disk_commits_nothing_and_the_same_commit_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = run_folder(tmp_path)
    whole = attempt(paths, "first")
    real = os.fsync
    for passing in range(5):
        left = [real] * passing

        def full(descriptor: int, left: list[Callable[[int], None]] = left) -> None:
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            left.pop()(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match=r"disk is full.*same command resumes"):
                commit(paths, *whole)
        assert not files(paths.tmp)
        whole = attempt(paths, f"again-{passing}")
    # In the last try the record got its name, and only the fsync of its folder failed: it is the one that stands.
    assert commit(paths, *whole).attempt == "again-3"
    assert verify(paths.output).ok


@pytest.mark.parametrize("failed", [[], [1]])
def test_concurrent_commits_of_one_shard_leave_one(tmp_path: Path, failed: list[int]) -> None:
    """Also of attempts that disagree on which rows are lost: one of them is committed, whole."""
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
        seen = {records.get(timeout=30) for _ in workers}
        for worker in workers:
            worker.join()
        assert seen == {paths.record(0).read_bytes()}
        clean(paths)
        assert verify(paths.output).problems == []
        assert not paths.quarantine.exists()


def test_clean_keeps_what_an_open_shard_needs(tmp_path: Path) -> None:
    paths = run_folder(tmp_path, shards=2)
    commit(paths, *attempt(paths, "a", 0))
    for shard in range(2):  # an attempt that came too late for shard 0
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
