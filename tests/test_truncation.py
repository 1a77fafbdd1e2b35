"""Every state file of a run, truncated to every length: no wrong result, and no error but those of stylemill.

Everything runs in this process, for speed. The function that reads a file is tested with every length. `verify`,
`status` and the ledger are tested with a sample of the lengths, including all near both ends.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from store_shards import attempt, files, retry_attempt, run_folder
from stylemill.errors import DamagedError, OutputError, StylemillError
from stylemill.execution.listener import _read_json
from stylemill.execution.repair import _quarantine_damaged
from stylemill.report.status import status
from stylemill.store import checkpoints
from stylemill.store.commit import commit
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock, lock_holder
from stylemill.store.parquet import check_file
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, valid_record
from stylemill.store.retries import begin_retry, failed_rows_before, generation_rows, pending_retry, read_retry
from stylemill.store.run_file import RunFile
from stylemill.store.segments import list_segments, read_segment
from stylemill.store.verify import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of state file: 4 of 5 shards are committed, one is partly retried, one is in flight."""
    paths = run_folder(tmp_path_factory.mktemp("whole"), shards=5)
    for shard in (0, 1):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[0, 1] if shard == 0 else []))
    ledger = Ledger(paths)
    ledger.refresh()
    compact(paths, ledger, min_records=1)
    commit(paths, *retry_attempt(paths, [0], [1]))
    for shard in (2, 3):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * 4]))
    begin_retry(paths, {0: 2, 2: 1})
    paths.numerics.write_text(json.dumps({"device": "cpu", "dtype": "float32", "micro_batch": 1}))
    inputs = checkpoints.save_inputs(paths, 4, "c", {"image.0": np.ones((2, 3), np.float32)}, {"fingerprint": "f"})
    for step in (2, 4):
        arrays = {"latents.0": np.full((2, 3), step, np.float32)}
        checkpoints.save_progress(paths, 4, step, "c", arrays, {"step": step}, inputs)
    paths.lock.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    return paths.output


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunPaths:
    shutil.copytree(whole, tmp_path / "run")
    return RunFile.open(tmp_path / "run")[1]


def lengths(size: int, dense: int = 600, ends: int = 48, stride: int = 97) -> Iterator[int]:
    """All lengths of a small file; for a large one, all near both ends and every `stride`th between."""
    for length in range(size):
        if size <= dense or length < ends or length >= size - ends or length % stride == 0:
            yield length


def truncations(path: Path, sample: bool = False) -> Iterator[int]:
    """Truncate `path` to each length in turn; yields the length. At the end, the file is restored."""
    data = path.read_bytes()
    for length in lengths(len(data), 0, 4, 700) if sample else lengths(len(data)):
        path.write_bytes(data[:length])
        yield length
    path.write_bytes(data)


def check_refused(read: Callable[[], object], error: type[StylemillError] = DamagedError) -> None:
    with pytest.raises(error):
        read()


def test_the_reader_of_each_file_refuses_a_truncated_one(run: RunPaths) -> None:
    (segment,) = list_segments(run)
    readers: dict[Path, Callable[[], object]] = {
        run.record(2): lambda: Record.from_bytes(run.record(2).read_bytes()),
        run.record(0, 1): lambda: valid_record(run, 0, 1),
        run.data(1): lambda: check_file(run.data(1)),
        run.data(0, 1): lambda: valid_record(run, 0, 1),
        run.failures(2): lambda: failed_rows_before(run, 2, 1),
        run.failures(0, 1): lambda: valid_record(run, 0, 1),
        segment: lambda: read_segment(segment),
        run.numerics: lambda: _read_json(run.numerics),
    }
    for path, read in readers.items():
        for _ in truncations(path):
            check_refused(read)
        read()
    expected, size = RunFile.find(run.output), run.job.stat().st_size
    for length in truncations(run.job):
        if length == size - 1:  # only the last newline is missing
            assert RunFile.find(run.output) == expected
        else:
            check_refused(lambda: RunFile.find(run.output), OutputError)


def test_a_truncated_file_opens_its_shard_and_no_other(run: RunPaths) -> None:
    (segment,) = list_segments(run)
    opens: dict[Path, set[int]] = {
        run.record(2): {2},
        run.data(2): {2},
        run.failures(2): {2},
        run.data(1): {1},
        run.failures(0): {0},
        segment: {0, 1},
        run.record(0, 1): set(),
        run.data(0, 1): set(),
    }
    for path, shards in opens.items():
        for _ in truncations(path, sample=True):
            ledger = Ledger(run, read_only=True)
            assert set(ledger.open_shards(5)) == shards | {4}
            assert (ledger.latest_generation_of(2) >= 0) == (2 not in shards)
            assert ledger.has_record(0, 1) == (path not in (run.record(0, 1), run.data(0, 1)))
            totals = ledger.totals()
            assert totals.rows_ok + totals.rows_failed == 4 * totals.shards
            assert totals.shards == 4 - len(shards)
            assert status(run.output).summary.rows_ok == totals.rows_ok
            report = verify(run.output, deep=True)
            assert any(run.relative(path) in problem for problem in report.problems), report.problems


def test_a_truncated_checkpoint_is_never_loaded(run: RunPaths) -> None:
    expect = {"fingerprint": "f"}
    folder = run.checkpoints(4)
    before = files(folder)

    def load_and_restore() -> int | None:
        checkpoint = checkpoints.load(run, 4, expect)
        for path in folder.iterdir():
            path.unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        shutil.rmtree(run.quarantine, ignore_errors=True)
        if checkpoint is not None:
            assert (checkpoint.arrays["latents.0"] == checkpoint.step).all()
            assert (checkpoint.inputs["image.0"] == 1).all()
        return None if checkpoint is None else checkpoint.step

    assert load_and_restore() == 4
    for name, data in before.items():
        expected = None if name.startswith("inputs") else 2 if "progress-00004" in name else 4
        for length in lengths(len(data)):
            (folder / name).write_bytes(data[:length])
            assert load_and_restore() == expected, (name, length)


def test_a_truncated_retry_file_means_no_retry(run: RunPaths) -> None:
    ledger = Ledger(run, read_only=True)
    ledger.refresh()
    assert pending_retry(run, ledger) == {0: 2, 2: 1}
    for _ in truncations(run.retry):
        assert read_retry(run) == {}
        assert "retry.json: is truncated or damaged" in verify(run.output).problems
        assert status(run.output).retrying == 0


def test_a_truncated_lock_file_is_not_a_lock_and_can_be_locked(run: RunPaths) -> None:
    for _ in truncations(run.lock):
        assert lock_holder(run) is None
        with RunLock(run):
            assert lock_holder(run) is not None


def test_after_any_truncation_only_the_shard_of_that_file_is_open(run: RunPaths, whole: Path) -> None:
    """Runs `repair` without the run that follows it."""
    (segment,) = list_segments(run)
    run_file = RunFile.open(run.output)[0]
    for path in (run.record(1), run.record(2), run.record(0, 1), run.data(2), run.failures(0), run.data(0, 1), segment):
        if not path.exists():
            continue
        name, size = run.relative(path), path.stat().st_size
        for length in (0, 1, size // 2, size - 1):
            shutil.rmtree(run.output)
            shutil.copytree(whole, run.output)
            path.write_bytes(path.read_bytes()[:length])
            ledger, _ = _quarantine_damaged(run, run_file, verify(run.output))
            lost = set(ledger.open_shards(5)) - {4}
            assert lost == ({2} if name == run.relative(run.data(2)) else {0} if path == run.failures(0) else set())
            if lost == {0}:  # the rows that were retried later are known from generation 1
                rows = generation_rows(run, run_file.rows_of(0), 0, 0, ledger.latest_generation)
                assert (rows.rows, set(rows.known_failures)) == ({2, 3}, {0, 1})
            if path == run.data(0, 1):
                assert pending_retry(run, ledger)[0] == 1
            kept = files(run.output)
            for other, data in files(whole).items():
                if other.startswith(("data/", "failures/")) and other != name:
                    assert kept[other] == data, "valid files are kept"
