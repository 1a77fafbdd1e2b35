"""Every state file of a run, cut off at every byte: never a wrong result, never anything but our own errors.

In this process, for speed. The reader of a file meets every length; the whole of `verify`, `status` and the ledger meet
a dense sample, with all lengths near both ends.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from store_shards import attempt, files, run_folder, second_try
from stylemill.errors import DamagedError, OutputError, StylemillError
from stylemill.execution.listener import _read_json
from stylemill.execution.repair import _quarantine_damaged
from stylemill.report.status import status
from stylemill.store import checkpoints
from stylemill.store.commit import commit
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock, holder
from stylemill.store.parquet import check_file
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, valid_record
from stylemill.store.retries import begin_retry, failed_before, generation_rows, noted_retry, pending_retry
from stylemill.store.run_file import RunFile
from stylemill.store.segments import read_segment, segments
from stylemill.store.verify import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of state file: 4 shards of 5 done, one retried in part, one in flight."""
    paths = run_folder(tmp_path_factory.mktemp("whole"), shards=5)
    for shard in (0, 1):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[0, 1] if shard == 0 else []))
    ledger = Ledger(paths)
    ledger.refresh()
    compact(paths, ledger, least=1)
    commit(paths, *second_try(paths, [0], [1]))
    for shard in (2, 3):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * 4]))
    begin_retry(paths, {0: 2, 2: 1})
    paths.numerics.write_text(json.dumps({"device": "cpu", "threads": 1}))
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
    """All of a small file; of a large one all near the ends and a stride of those between."""
    for length in range(size):
        if size <= dense or length < ends or length >= size - ends or length % stride == 0:
            yield length


def cut(path: Path, sample: bool = False) -> Iterator[int]:
    """`path` shortened to each length in turn, and whole again at the end."""
    data = path.read_bytes()
    for length in lengths(len(data), 0, 4, 700) if sample else lengths(len(data)):
        path.write_bytes(data[:length])
        yield length
    path.write_bytes(data)


def only_damaged(read: Callable[[], object], damaged: type[StylemillError] = DamagedError) -> None:
    with pytest.raises(damaged):
        read()


def test_the_reader_of_each_file_takes_no_shortened_one(run: RunPaths) -> None:
    (segment,) = segments(run)
    readers: dict[Path, Callable[[], object]] = {
        run.record(2): lambda: Record.from_bytes(run.record(2).read_bytes()),
        run.record(0, 1): lambda: valid_record(run, 0, 1),
        run.data(1): lambda: check_file(run.data(1)),
        run.data(0, 1): lambda: valid_record(run, 0, 1),
        run.failures(2): lambda: failed_before(run, 2, 1),
        run.failures(0, 1): lambda: valid_record(run, 0, 1),
        segment: lambda: read_segment(segment),
        run.numerics: lambda: _read_json(run.numerics),
    }
    for path, read in readers.items():
        for _ in cut(path):
            only_damaged(read)
        read()
    found, size = RunFile.find(run.output), run.job.stat().st_size
    for length in cut(run.job):
        if length == size - 1:  # nothing but the last newline
            assert RunFile.find(run.output) == found
        else:
            only_damaged(lambda: RunFile.find(run.output), OutputError)


def test_a_shortened_file_opens_its_shard_and_no_other(run: RunPaths) -> None:
    (segment,) = segments(run)
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
        for _ in cut(path, sample=True):
            ledger = Ledger(run, read_only=True)
            assert set(ledger.open_shards(5)) == shards | {4}
            assert (ledger.latest(2) >= 0) == (2 not in shards)
            assert ledger.stands(0, 1) == (path not in (run.record(0, 1), run.data(0, 1)))
            totals = ledger.totals()
            assert totals.rows_ok + totals.rows_failed == 4 * totals.shards
            assert totals.shards == 4 - len(shards)
            assert status(run.output).summary.rows_ok == totals.rows_ok
            report = verify(run.output, deep=True)
            assert any(run.relative(path) in problem for problem in report.problems), report.problems


def test_a_shortened_checkpoint_is_never_resumed_from(run: RunPaths) -> None:
    expect = {"fingerprint": "f"}
    folder = run.checkpoints(4)
    before = files(folder)

    def restored() -> int | None:
        found = checkpoints.load(run, 4, expect)
        for path in folder.iterdir():
            path.unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        shutil.rmtree(run.quarantine, ignore_errors=True)
        if found is not None:
            assert (found.arrays["latents.0"] == found.step).all()
            assert (found.inputs["image.0"] == 1).all()
        return None if found is None else found.step

    assert restored() == 4
    for name, data in before.items():
        wanted = None if name.startswith("inputs") else 2 if "progress-00004" in name else 4
        for length in lengths(len(data)):
            (folder / name).write_bytes(data[:length])
            assert restored() == wanted, (name, length)


def test_a_shortened_note_of_a_retry_is_no_note_and_harms_nothing(run: RunPaths) -> None:
    ledger = Ledger(run, read_only=True)
    ledger.refresh()
    assert pending_retry(run, ledger) == {0: 2, 2: 1}
    for _ in cut(run.retry):
        assert noted_retry(run) == {}
        assert "retry.json: is truncated or damaged" in verify(run.output).problems
        assert status(run.output).retrying == 0


def test_a_shortened_lock_file_locks_nothing_and_hides_no_holder(run: RunPaths) -> None:
    for _ in cut(run.lock):
        assert holder(run) is None
        with RunLock(run):
            assert holder(run) is not None


def test_after_any_cut_what_is_whole_stays_and_only_the_rest_is_open(run: RunPaths, whole: Path) -> None:
    """`repair` up to where it hands over to the run."""
    (segment,) = segments(run)
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
            if lost == {0}:  # the rows that were tried again since are known from that
                work = generation_rows(run, run_file.rows_of(0), 0, 0, ledger.newest)
                assert (work.rows, set(work.held)) == ({2, 3}, {0, 1})
            if path == run.data(0, 1):
                assert pending_retry(run, ledger)[0] == 1
            kept = files(run.output)
            for other, data in files(whole).items():
                if other.startswith(("data/", "failures/")) and other != name:
                    assert kept[other] == data, "nothing valid is thrown away"
