"""`verify` reports everything that is wrong in a run folder, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from store_shards import ROWS, attempt, files, in_child, retry_attempt, run_folder, table
from stylemill.errors import OutputError
from stylemill.execution.repair import repair
from stylemill.report.status import status
from stylemill.store.atomic import digest
from stylemill.store.checkpoints import save_inputs
from stylemill.store.commit import clean, commit
from stylemill.store.compaction import compact
from stylemill.store.failed_rows import remove_failed_rows, write_failed_rows
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock
from stylemill.store.parquet import write_shard
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.retries import begin_retry, end_retry
from stylemill.store.segments import list_segments
from stylemill.store.verify import verify


def finished(folder: Path) -> RunPaths:
    paths = run_folder(folder, shards=2)
    for shard in range(2):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[5] if shard else []))
    clean(paths)
    return paths


def test_a_finished_run_has_no_problems(tmp_path: Path) -> None:
    paths = finished(tmp_path)
    report = verify(str(paths.output), deep=True)
    assert report.ok
    assert (report.shards, report.rows_ok, report.rows_failed) == (2, 7, 1)
    assert "2 shards, 7 images, 1 recorded failure" in report.describe()


def forge(paths: RunPaths, shard: int, **changes: object) -> None:
    """Replace a record with one whose digest is right, which no accident does."""
    record = Record.from_bytes(paths.record(shard).read_bytes())
    paths.record(shard).write_bytes(replace(record, **changes).to_bytes())  # type: ignore[arg-type]


def other_data(paths: RunPaths, **columns: list[object]) -> None:
    """Replace values in columns of shard 0, and its record with one that fits."""
    rows = table(range(4))
    for name, values in columns.items():
        field = rows.schema.field(name)
        rows = rows.set_column(rows.column_names.index(name), field, pa.array(values, field.type))
    paths.tmp.mkdir()
    write_shard(paths, 0, "forged", rows).replace(paths.data(0))
    paths.tmp.rmdir()
    entry = Record.from_bytes(paths.record(0).read_bytes()).data
    assert entry is not None
    size = paths.data(0).stat().st_size
    forge(paths, 0, data=replace(entry, bytes=size, sha256=digest(paths.data(0))))


def flip_bit(path: Path, position: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def not_an_image(paths: RunPaths) -> None:
    images = [{"bytes": b"no image", "path": "x.png"}] * 4
    other_data(paths, image=images, sha256=[hashlib.sha256(b"no image").hexdigest()] * 4)


def fewer_rows(paths: RunPaths) -> None:
    entry = Record.from_bytes(paths.record(0).read_bytes()).data
    assert entry is not None
    forge(paths, 0, data=replace(entry, rows=3), rows_ok=3)


PROBLEMS: list[tuple[Callable[[RunPaths], object], str]] = [
    (lambda paths: flip_bit(paths.data(0)), "SHA-256 differs"),
    (lambda paths: flip_bit(paths.failures(1)), "SHA-256 differs"),
    (lambda paths: flip_bit(paths.record(1)), "records/00001.json: the record"),
    (lambda paths: paths.data(1).unlink(), "data/train-00001-of-00002.parquet is missing"),
    (lambda paths: paths.record(1).unlink(), "shard 1 is not committed yet"),
    (lambda paths: (paths.data_folder / "extra.parquet").touch(), "data/ has 1 file that is not the run's"),
    (lambda paths: (paths.records_folder / "00002.json").touch(), "records/ has 1 file that is not the run's"),
    (lambda paths: (paths.tmp.mkdir(), (paths.tmp / "left").touch()), "tmp/ has 1 file that is not the run's"),
    (lambda paths: forge(paths, 0, fingerprint="0" * 64), "belongs to another job"),
    (lambda paths: forge(paths, 0, stop_row=3), r"is for rows \[0, 3\); job.json says \[0, 4\)"),
    (lambda paths: forge(paths, 1, failures=None, rows_failed=0), "row 5 is missing"),
    (lambda paths: forge(paths, 1, rows_ok=4), "contradict each other"),
    (fewer_rows, "has 4 rows, its record says 3"),
    (lambda paths: other_data(paths, row=[0, 1, 1, 3]), "row 1 is there more than once"),
    (lambda paths: other_data(paths, row=[0, 1, 2, 7]), "row 7 is not of this shard"),
    (lambda paths: other_data(paths, pair_id=["pair-0", "pair-1", "pair-2", "pair-6"]), "rows 3 and 6 have the same"),
    (lambda paths: other_data(paths, width=[4, 4, 5, 4]), r"row 2: the image has \(4, 3\) pixels"),
    (not_an_image, "row 0: the image cannot be decoded"),
]


@pytest.mark.parametrize(("damage", "expected"), PROBLEMS, ids=[expected for _, expected in PROBLEMS])
def test_each_problem_is_reported_and_nothing_is_changed(
    tmp_path: Path, damage: Callable[[RunPaths], object], expected: str
) -> None:
    paths = finished(tmp_path)
    damage(paths)
    before = files(paths.output)
    report = verify(paths.output, deep=True)
    assert not report.ok
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(report.describe())
    assert files(paths.output) == before


def in_generations(folder: Path) -> RunPaths:
    """Shard 0 is compacted and was retried: one row succeeded, one failed again. Shard 1 has no failures."""
    paths = run_folder(folder, shards=2)
    commit(paths, *attempt(paths, "a0", 0, failed=[1, 2]))
    ledger = Ledger(paths)
    ledger.refresh()
    compact(paths, ledger, min_records=1)
    commit(paths, *retry_attempt(paths, [1], [2]))
    commit(paths, *attempt(paths, "a1", 1))
    clean(paths)
    return paths


def in_two_generations(paths: RunPaths) -> None:
    """Add row 0, which succeeded in generation 0, to generation 1."""
    paths.tmp.mkdir()
    write_shard(paths, 0, "forged", table([0, 1]), 1).replace(paths.data(0, 1))
    paths.tmp.rmdir()
    record = Record.from_bytes(paths.record(0, 1).read_bytes())
    assert record.data is not None
    size = paths.data(0, 1).stat().st_size
    entry = replace(record.data, rows=2, bytes=size, sha256=digest(paths.data(0, 1)))
    paths.record(0, 1).write_bytes(replace(record, data=entry, rows_ok=2).to_bytes())


def forge_later(paths: RunPaths, **changes: object) -> None:
    record = Record.from_bytes(paths.record(0, 1).read_bytes())
    paths.record(0, 1).write_bytes(replace(record, **changes).to_bytes())  # type: ignore[arg-type]


LATER: list[tuple[Callable[[RunPaths], object], str]] = [
    (in_two_generations, "row 0 is there already, in an earlier generation"),
    (lambda paths: flip_bit(list_segments(paths)[0]), "compact-000000-.*truncated or was changed"),
    (lambda paths: list_segments(paths)[0].unlink(), "shard 0 is not committed yet"),
    (lambda paths: flip_bit(paths.data(0)), "train-00000-of-00002.parquet: has other bytes"),
    (lambda paths: paths.data(0).unlink(), "train-00000-of-00002.parquet is missing"),
    (lambda paths: flip_bit(paths.data(0, 1)), "-r1.parquet: has other bytes"),
    (lambda paths: flip_bit(paths.failures(0, 1)), "failures/00000-r1.parquet: has other bytes"),
    (lambda paths: flip_bit(paths.record(0, 1)), r"records/00000\.r1\.json: the record"),
    (lambda paths: paths.record(0, 1).unlink(), "data/ has 1 file that is not the run's: train-00000-of-00002-r1"),
    (lambda paths: forge_later(paths, fingerprint="0" * 64), r"00000\.r1\.json: belongs to another job"),
    (lambda paths: forge_later(paths, failed_by_class={"Other": 1}), "counts of error classes"),
    (lambda paths: (paths.records_folder / "00000.r7.json").write_text("{}"), r"00000\.r7\.json: the record"),
    (lambda paths: paths.numerics.write_text("{"), "numerics.json: is truncated or damaged"),
    (lambda paths: paths.retry.write_text("[1]"), "retry.json: is truncated or damaged"),
]


@pytest.mark.parametrize(("damage", "expected"), LATER, ids=[expected for _, expected in LATER])
def test_problems_of_generations_and_segments_are_reported(
    tmp_path: Path, damage: Callable[[RunPaths], object], expected: str
) -> None:
    paths = in_generations(tmp_path)
    report = verify(paths.output, deep=True)
    assert (report.problems, report.shards, report.rows_ok, report.rows_failed) == ([], 2, 2 * ROWS - 1, 1)
    damage(paths)
    before = files(paths.output)
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(verify(paths.output, deep=True).describe())
    assert files(paths.output) == before


@pytest.mark.parametrize("damage", [damage for damage, _ in PROBLEMS], ids=[expected for _, expected in PROBLEMS])
def test_the_last_line_names_the_command_that_mends_the_problems(
    tmp_path: Path, damage: Callable[[RunPaths], object]
) -> None:
    paths = finished(tmp_path)
    damage(paths)
    report = verify(paths.output, deep=True)
    if report.problems == ["shard 1 is not committed yet; the same run command resumes"]:
        return
    assert report.describe().splitlines()[-1].startswith(f"`stylemill repair {paths.output}` ")
    assert report.describe().count("stylemill repair") == 1


def test_one_thing_is_not_called_by_a_plural(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "a", failed=[0, 1, 2]))
    clean(paths)
    assert verify(paths.output).describe().endswith(": 1 shard, 1 image, 3 recorded failures")
    (paths.data_folder / "extra.parquet").touch()
    first, problem, _ = verify(paths.output).describe().splitlines()
    assert first == f"{paths.output}: 1 problem; committed: 1 shard, 1 image, 3 recorded failures"
    assert problem == "data/ has 1 file that is not the run's: extra.parquet"
    repaired = repair(paths.output).describe().splitlines()
    assert "1 file moved to quarantine, 0 records made again" in repaired
    assert "1 of 4 images done, 3 failed, 0 open" in status(paths.output).describe()
    run_folder(tmp_path)
    save_inputs(paths, 0, "retry", {}, {})
    begin_retry(paths, {0: 1})
    assert "in 1 shard; `retry-failed` resumes it" in status(paths.output).describe()
    assert "in flight 1 shard has checkpoints" in status(paths.output).describe()


def test_an_interrupted_run_has_no_stray_files(tmp_path: Path) -> None:
    paths = finished(tmp_path)
    paths.record(1).unlink()  # as if killed after publishing the data
    run_folder(tmp_path, shards=2)
    attempt(paths, "killed", 1)
    assert verify(paths.output).problems == ["shard 1 is not committed yet; the same run command resumes"]


def finish(paths: RunPaths) -> None:
    """The end of a run: the last shard is committed, the records are compacted, unfinished files are removed."""
    commit(paths, *attempt(paths, "a1", 1, failed=[5]))
    ledger = Ledger(paths)
    ledger.refresh()
    compact(paths, ledger, min_records=1)
    clean(paths, ledger)


def retry(paths: RunPaths) -> None:
    """A whole retry of the failed row of shard 1."""
    remove_failed_rows(paths)
    begin_retry(paths, {1: 1})
    commit(paths, *retry_attempt(paths, [5], shard=1))
    end_retry(paths)
    clean(paths)


def unfinished(folder: Path) -> RunPaths:
    """A run in which one of two shards is committed; the other has a checkpoint, and files without a record."""
    paths = finished(folder)
    paths.record(1).unlink()
    run_folder(folder, shards=2)
    save_inputs(paths, 1, "a1", {}, {})
    attempt(paths, "a1 before", 1)
    return paths


def with_failed_rows(folder: Path) -> RunPaths:
    paths = finished(folder)
    ledger = Ledger(paths)
    ledger.refresh()
    write_failed_rows(paths, ledger)
    clean(paths)
    return paths


@pytest.mark.parametrize(("start", "work"), [(unfinished, finish), (with_failed_rows, retry)])
def test_nothing_is_wrong_whatever_a_run_commits_while_its_folder_is_verified(
    tmp_path: Path, start: Callable[[Path], RunPaths], work: Callable[[RunPaths], None]
) -> None:
    """The run works between two accesses of `verify` to the folder: all of its work, in each of these moments in turn.

    Each moment is one of a child process, since an audit hook cannot be removed.
    """
    before = start(tmp_path / "before")
    for moment in range(500):
        paths = replace(before, output=shutil.copytree(before.output, tmp_path / str(moment)))

        def verify_and_work(paths: RunPaths = paths, moment: int = moment) -> None:
            left = [moment]

            def access(event: str, arguments: tuple[object, ...]) -> None:
                if event in ("open", "os.listdir", "os.scandir") and str(paths.output) in str(arguments[0]):
                    left[0] -= 1
                    if left[0] == -1:
                        work(paths)

            sys.addaudithook(access)
            report, ended = verify(paths.output), left[0] >= 0
            assert not report.damaged
            assert report.problems in ([], ["shard 1 is not committed yet; the same run command resumes"])
            assert ended or verify(paths.output).ok
            os._exit(2 if ended else 0)

        exit_code = in_child(verify_and_work)
        assert exit_code in (0, 2)
        if exit_code == 2:  # `verify` ended before that moment
            assert moment > 15
            return
    raise AssertionError("verify never ended")


def test_unfinished_files_of_a_run_that_still_works_are_no_problem(tmp_path: Path) -> None:
    paths = finished(tmp_path)
    run_folder(tmp_path, shards=2)
    save_inputs(paths, 1, "late", {}, {})
    attempt(paths, "late", 1)
    with RunLock(paths):
        assert verify(paths.output).problems == []
    assert len(verify(paths.output).problems) == 2, "once it has ended, they were left by a killed process"


def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"job\.json"):
        verify(tmp_path)
    paths = finished(tmp_path)
    job = json.loads(paths.job.read_bytes())
    paths.job.write_text(json.dumps({**job, "rows": 100}))
    with pytest.raises(OutputError, match="do not belong together"):
        verify(paths.output)


def test_failures_files_are_plain_parquet(tmp_path: Path) -> None:
    paths = finished(tmp_path)
    failures = pq.read_table(paths.failures(1)).to_pylist()
    assert failures == [
        {"row": 5, "pair_id": "pair-5", "stage": "read", "error": "ImageError", "message": "zero bytes"}
    ]
