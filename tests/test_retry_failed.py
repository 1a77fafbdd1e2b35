"""`retry-failed` samples only the failed rows again, and `repair` only what is damaged. The bytes are compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo_job import ABSENT, STEPS, EndedProcess, ForkedCommands, Moment, stylemill, until
from store_shards import files
from stylemill.report.status import status
from stylemill.store.commit import clean
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.run_file import RunFile, create_run_folder
from stylemill.store.verify import verify

RETRIED = "data/train-00001-of-00003-r1.parquet"


@pytest.fixture(scope="module")
def with_fake_engine() -> bool:
    return True


def add_absent_image(job: Path) -> Path:
    """Create the content image of row ABSENT, which the job needs and lacks."""
    path = job.parent / "absent.png"
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def failed(job: Path, commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one failed row in its middle shard. Tests must not change it."""
    output = tmp_path_factory.mktemp("failed") / "run"
    assert commands.run(output, job).exit_code == 3
    return output


@pytest.fixture(scope="module")
def whole(job: Path, failed: Path, commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run without any failure."""
    absent = add_absent_image(job)
    output = tmp_path_factory.mktemp("whole") / "run"
    assert commands.run(output, job).exit_code == 0
    absent.unlink()
    return output


@pytest.fixture(scope="module")
def retried(
    job: Path, failed: Path, whole: Path, commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = copy(failed, tmp_path_factory.mktemp("retried"))
    absent = add_absent_image(job)
    ended = commands.run(output, "retry-failed")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    assert ended.steps == [(1, step) for step in range(1, STEPS + 1)]
    counts = [line.split()[0] for line in ended.output.splitlines() if " img in " in line]
    assert (counts[0], counts[-1]) == ("0/1", "1/1"), "only the rows that are tried again count"
    assert ", loading the model" in ended.output
    assert ", sampling, " in ended.output
    return output


def copy(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def read_rows(*tables: Path) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for path in tables:
        for row in pq.read_table(path).to_pylist():
            assert row["row"] not in rows, "a row is there twice"
            rows[row["row"]] = row
    return rows


def check_same_output(run: Path, expected: Path) -> None:
    actual_files, expected_files = (
        {name: data for name, data in files(folder).items() if name.split("/")[0] in ("data", "failures")}
        for folder in (run, expected)
    )
    assert sorted(actual_files) == sorted(expected_files)
    for name in expected_files:
        if name.startswith("data/"):
            assert actual_files[name] == expected_files[name], name
        else:  # if the cause of a failure is gone since, its message cannot be recovered
            columns = ["row", "pair_id", "stage", "error"]
            assert pq.read_table(run / name, columns=columns).equals(pq.read_table(expected / name, columns=columns))
    report = verify(run, deep=True)
    assert report.ok, report.problems


# --- retry-failed -----------------------------------------------------------------------------------------------------


def test_a_retry_gives_the_rows_of_a_run_without_failures(failed: Path, whole: Path, retried: Path) -> None:
    before, after = files(failed), files(retried)
    assert {name: after[name] for name in before if name.startswith(("data/", "failures/", "records/"))} == {
        name: data for name, data in before.items() if name.startswith(("data/", "failures/", "records/"))
    }, "committed files are not changed"
    assert set(after) - set(before) == {RETRIED, "records/00001.r1.json"}
    assert read_rows(*(retried / "data").iterdir()) == read_rows(*(whole / "data").iterdir())
    assert list(read_rows(retried / RETRIED)) == [ABSENT]


def failed_now(run: Path) -> list[dict[str, Any]]:
    """The rows in failures.parquet. Together with those in data/, every row is there exactly once."""
    path = run / "failures.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    with_image = read_rows(*(run / "data").iterdir())
    assert sorted([*with_image, *(row["row"] for row in rows)]) == list(range(7))
    return rows


def test_every_row_is_once_in_the_data_or_in_the_list_of_failed_rows(
    failed: Path, whole: Path, retried: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    (row,) = failed_now(failed)
    assert (row["row"], row["stage"], row["error"]) == (ABSENT, "read", "ImageError")
    assert "absent.png" in row["message"]
    assert failed_now(retried) == failed_now(whole) == []
    assert (retried / "failures/00001.parquet").exists(), "the history stays"
    run = copy(failed, tmp_path)
    ended = commands.run(run, "retry-failed")
    assert failed_now(run) == [row], "it failed again"
    assert ended.exit_code == 3


def test_many_failures_name_the_list_of_failed_rows(job: Path, commands: ForkedCommands, tmp_path: Path) -> None:
    """The run stops before all shards are committed."""
    run = tmp_path / "run"
    ended = commands.run(run, job, "--set", "max_failed_fraction=0.1")
    assert ended.exit_code == 1, ended.output
    assert f"{run}/failures.parquet has the reasons" in ended.output
    assert [row["row"] for row in pq.read_table(run / "failures.parquet").to_pylist()] == [ABSENT]
    assert commands.run(run, job, "--set", "max_failed_fraction=1").exit_code == 3
    assert len(failed_now(run)) == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another time"])
def test_repair_writes_the_list_of_failed_rows_again(
    failed: Path, commands: ForkedCommands, tmp_path: Path, damage: str
) -> None:
    run = copy(failed, tmp_path)
    expected, path = failed_now(run), run / "failures.parquet"
    table = pq.read_table(path)
    if damage == "missing":  # as after a kill just before it is written
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, 100)
    else:
        pq.write_table(pa.concat_tables([table, table]), path)
    assert verify(run).ok == (damage == "missing")
    status(run)
    assert path.exists() == (damage != "missing"), "status writes nothing"
    ended = commands.run(run, "repair")
    assert (ended.exit_code, ended.steps) == (3, []), ended.output
    assert failed_now(run) == expected
    assert verify(run).ok


def test_the_list_of_failed_rows_is_missing_while_a_retry_is_unfinished(
    job: Path, failed: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    run = copy(failed, tmp_path)
    assert commands.run(run, "retry-failed", at=Moment(("step", 1), 3)).exit_code == -9
    assert not (run / "failures.parquet").exists()
    assert commands.run(run, job).exit_code == 3
    assert len(failed_now(run)) == 1


def test_all_counts_are_right_after_a_retry(failed: Path, retried: Path) -> None:
    before, now = status(failed).summary, status(retried).summary
    assert (before.rows_ok, before.rows_failed, before.failed_by_class) == (6, 1, {"ImageError": 1})
    assert (now.rows_ok, now.rows_failed, now.failed_by_class, now.rows_open) == (7, 0, {}, 0)
    report = verify(retried, deep=True)
    assert (report.problems, report.shards, report.rows_ok, report.rows_failed) == ([], 3, 7, 0)
    record = Record.from_bytes((retried / "records/00001.r1.json").read_bytes())
    assert (record.rows_ok, record.rows_failed, record.retried_by_class) == (1, 0, {"ImageError": 1})


def test_a_retry_without_failed_rows_does_nothing(retried: Path, commands: ForkedCommands, tmp_path: Path) -> None:
    run = copy(retried, tmp_path)
    ended = commands.run(run, "retry-failed")
    assert (ended.exit_code, ended.steps) == (0, [])
    assert "7 of 7 images done, 0 failed" in ended.output
    assert files(run) == files(retried)


def test_rows_that_fail_again_stay_failed_and_can_be_retried_again(
    job: Path, failed: Path, retried: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    run = copy(failed, tmp_path)
    ended = commands.run(run, "retry-failed")
    assert ended.exit_code == 3, ended.output
    assert "6 of 7 images done, 1 failed, 0 open" in ended.output
    assert not (run / RETRIED).exists()
    assert (run / "failures/00001-r1.parquet").exists()
    assert verify(run).ok
    absent = add_absent_image(job)
    ended = commands.run(run, "retry-failed", "--failures-ok")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    assert read_rows(*(run / "data").iterdir()) == read_rows(*(retried / "data").iterdir())
    assert verify(run).rows_ok == 7
    assert commands.run(run, job).exit_code == 0  # `run` has nothing to do


@pytest.mark.slow
def test_a_retry_killed_before_any_change_is_resumed_by_the_same_command(
    job: Path, failed: Path, retried: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    absent = add_absent_image(job)
    undisturbed = commands.run(copy(failed, tmp_path / "undisturbed"), "retry-failed")
    killed = 0
    for stage, changes in undisturbed.changes().items():
        for count in range(0, changes, 2 if stage[0] in ("write", "end") else 3):
            run = copy(failed, tmp_path / f"{stage[0]}-{stage[1]}-{count}")
            ended = commands.run(run, "retry-failed", at=Moment(stage, count))
            killed += ended.exit_code == -9
            # At any time, what is committed is consistent for readers.
            assert read_rows(*(run / "data").iterdir()).keys() in ({0, 1, 2, 4, 5, 6}, set(range(7)))
            assert status(run).summary.rows_ok in (6, 7)
            again = commands.run(run, "retry-failed")
            assert again.exit_code == 0, again.output
            check_same_output(run, retried)
            steps = len(ended.steps) + len(again.steps)
            assert steps <= STEPS + 2 + 1  # every_steps, and the step that was interrupted
            left = {name.split("/")[0] for name in files(run)}
            assert left == {"job.json", "numerics.json", "contact-sheet.jpg", "data", "failures", "records"}
    absent.unlink()
    assert killed > 8


def test_a_killed_retry_is_shown_by_status(job: Path, failed: Path, commands: ForkedCommands, tmp_path: Path) -> None:
    run = copy(failed, tmp_path)
    absent = add_absent_image(job)
    assert commands.run(run, "retry-failed", at=Moment(("step", 1), 3)).exit_code == -9
    assert "`retry-failed` resumes it" in status(run).describe()
    assert commands.run(run, job).exit_code == 3
    assert (run / "checkpoints/00001").exists()  # `run` keeps the checkpoint of the retry
    ended = commands.run(run, "retry-failed")
    assert ended.exit_code == 0
    assert ended.steps[0][1] > 1
    absent.unlink()


def test_compacted_records_can_be_retried_and_a_damaged_segment_needs_no_sampling(
    job: Path, failed: Path, retried: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    run = copy(failed, tmp_path)
    compact_all(run)
    absent = add_absent_image(job)
    ended = commands.run(run, "retry-failed")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    check_same_output(run, retried)
    compact_all(run)
    assert not list((run / "records").glob("0*"))
    for segment in (run / "records").iterdir():
        segment.write_bytes(segment.read_bytes()[:-1])
    ended = commands.run(run, job)
    assert (ended.exit_code, ended.steps) == (0, []), ended.output
    check_same_output(run, retried)
    assert status(run).summary.rows_ok == 7


def compact_all(run: Path) -> None:
    paths = paths_of(run)
    create_run_folder(paths)
    ledger = Ledger(paths)
    ledger.refresh()
    assert compact(paths, ledger, min_records=1)
    clean(paths)


# --- repair -----------------------------------------------------------------------------------------------------------


def flip_bit(name: str, position: int = 100) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[position] ^= 1
        (run / name).write_bytes(data)

    return damage


def remove(*names: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for name in names:
            (run / name).unlink()

    return damage


def all_of(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage_all(run: Path) -> None:
        for damage in damages:
            damage(run)

    return damage_all


def forge(name: str, **changes: object) -> Callable[[Path], None]:
    """Replace a record with one whose digest is right."""

    def damage(run: Path) -> None:
        record = Record.from_bytes((run / name).read_bytes())
        (run / name).write_bytes(Record(**{**vars(record), **changes}).to_bytes())  # type: ignore[arg-type]

    return damage


def paths_of(run: Path) -> RunPaths:
    return RunFile.open(run)[1]


# name -> damage, and whether a shard has to be sampled again; if only its record is damaged, it has not
DAMAGES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "byte of data": (flip_bit("data/train-00000-of-00003.parquet"), True),
    "byte of failures": (flip_bit("failures/00001.parquet"), True),
    "byte of a record": (flip_bit("records/00002.json"), False),
    "byte of a later record": (flip_bit("records/00001.r1.json"), False),
    "byte of later data": (flip_bit(RETRIED), True),
    "data missing": (remove("data/train-00002-of-00003.parquet"), True),
    "data missing, with a later generation": (remove("data/train-00001-of-00003.parquet"), True),
    "record missing": (remove("records/00000.json"), False),
    "record missing, with a later generation": (remove("records/00001.json"), False),
    "later record missing": (remove("records/00001.r1.json"), False),
    "all files of a shard missing": (
        remove("records/00001.json", "data/train-00001-of-00003.parquet", "failures/00001.parquet"),
        True,
    ),
    "edited record": (forge("records/00001.json", rows_ok=3), False),
    "record of another job": (forge("records/00000.json", fingerprint="0" * 64), False),
    "wrong counts of error classes": (forge("records/00001.json", failed_by_class={"Other": 1}), False),
    "extra file": (lambda run: (run / "data/extra.parquet").touch(), False),
    "numerics truncated": (lambda run: (run / "numerics.json").write_text("{"), False),
    "two files damaged": (all_of(flip_bit("data/train-00000-of-00003.parquet"), flip_bit(RETRIED)), True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_restores_the_bytes_of_the_run(
    job: Path, retried: Path, commands: ForkedCommands, tmp_path: Path, damage: str
) -> None:
    apply, samples_again = DAMAGES[damage]
    run = copy(retried, tmp_path)
    apply(run)
    assert not verify(run).ok, "verify reports it"
    absent = add_absent_image(job)
    ended = commands.run(run, "repair", "--deep")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    assert "Traceback" not in ended.output
    assert bool(ended.steps) == samples_again, ended.steps
    check_same_output(run, retried)
    assert (status(run).summary.rows_ok, status(run).summary.rows_failed) == (7, 0)


def test_repair_of_an_undamaged_run_changes_nothing(retried: Path, commands: ForkedCommands, tmp_path: Path) -> None:
    run = copy(retried, tmp_path)
    ended = commands.run(run, "repair")
    assert (ended.exit_code, ended.steps) == (0, [])
    assert files(run) == files(retried)


def test_repair_is_refused_while_a_run_works_in_the_folder_and_changes_nothing(
    job: Path, failed: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = commands.start(run, job, at=Moment(("end", None), 0, signal.SIGSTOP))
    try:
        until(lambda: _state(first.process.pid) == "T")
        before = files(run)
        refused = commands.run(run, "repair")
        assert refused.exit_code == 1
        assert f"another run works in this folder: pid {first.process.pid}" in refused.output
        assert files(run) == before
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert first.ended().exit_code == 3
    check_same_output(run, failed)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_a_killed_repair_is_resumed_by_the_same_command(
    job: Path, retried: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    absent = add_absent_image(job)
    undisturbed: EndedProcess | None = None
    for count in (None, 0, 2, 5):
        run = copy(retried, tmp_path / str(count))
        all_of(flip_bit("data/train-00000-of-00003.parquet"), flip_bit(RETRIED), flip_bit("records/00002.json"))(run)
        if count is None:
            undisturbed = commands.run(run, "repair")
            continue
        assert undisturbed is not None
        for stage in [stage for stage in undisturbed.changes() if stage[0] in ("start", "write")][:4]:
            commands.run(run, "repair", at=Moment(stage, count))
        assert commands.run(run, "repair").exit_code == 0
        check_same_output(run, retried)
    absent.unlink()


def test_commands_need_a_run_folder(tmp_path: Path) -> None:
    for verb in ("retry-failed", "repair"):
        code, output = stylemill(verb, tmp_path)
        assert code == 2
        assert "is not a run folder" in output
        assert "Traceback" not in output
    (tmp_path / "job.json").write_text(json.dumps({"rows": 1}))
    code, output = stylemill("repair", tmp_path)
    assert code == 2
    assert "damaged, or written by another program" in output
