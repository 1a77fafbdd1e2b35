"""Failed rows are tried again, and only they; what is damaged is made again, and only that. The bytes say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo_job import ABSENT, STEPS, Ended, Moment, Warm, stylemill
from store_shards import files
from stylemill.report.status import status
from stylemill.store.commit import clean
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.run_file import RunFile
from stylemill.store.verify import verify

RETRIED = "data/train-00001-of-00003-r1.parquet"


def mend(job: Path) -> Path:
    """The absent image appears."""
    path = job.parent / "absent.png"
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def failed(job: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one failed row in its middle shard, not to be changed."""
    output = tmp_path_factory.mktemp("failed") / "run"
    assert warm.run(output, job).exit_code == 3
    return output


@pytest.fixture(scope="module")
def whole(job: Path, failed: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing ever went wrong in."""
    absent = mend(job)
    output = tmp_path_factory.mktemp("whole") / "run"
    assert warm.run(output, job).exit_code == 0
    absent.unlink()
    return output


@pytest.fixture(scope="module")
def retried(job: Path, failed: Path, whole: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = copy(failed, tmp_path_factory.mktemp("retried"))
    absent = mend(job)
    ended = warm.run(output, "retry-failed")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    assert ended.steps == [(1, step) for step in range(1, STEPS + 1)]
    return output


def copy(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def rows(*tables: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for path in tables:
        for row in pq.read_table(path).to_pylist():
            assert row["row"] not in found, "a row is there twice"
            found[row["row"]] = row
    return found


def same_output(run: Path, expected: Path) -> None:
    found, wanted = (
        {name: data for name, data in files(folder).items() if name.split("/")[0] in ("data", "failures")}
        for folder in (run, expected)
    )
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        if name.startswith("data/"):
            assert found[name] == wanted[name], name
        else:  # the words of a failure that was mended since cannot be had again
            columns = ["row", "pair_id", "stage", "error"]
            assert pq.read_table(run / name, columns=columns).equals(pq.read_table(expected / name, columns=columns))
    report = verify(run, deep=True)
    assert report.ok, report.problems


# --- retry-failed -----------------------------------------------------------------------------------------------------


def test_a_retry_gives_what_an_undisturbed_run_would_have_given(failed: Path, whole: Path, retried: Path) -> None:
    before, after = files(failed), files(retried)
    assert {name: after[name] for name in before if name.startswith(("data/", "failures/", "records/"))} == {
        name: data for name, data in before.items() if name.startswith(("data/", "failures/", "records/"))
    }, "nothing committed was touched"
    assert set(after) - set(before) == {RETRIED, "records/00001.r1.json"}
    assert rows(*(retried / "data").iterdir()) == rows(*(whole / "data").iterdir())
    assert list(rows(retried / RETRIED)) == [ABSENT]


def test_every_count_is_right_across_generations(failed: Path, retried: Path) -> None:
    before, now = status(failed).summary, status(retried).summary
    assert (before.rows_ok, before.rows_failed, before.failed_by_class) == (6, 1, {"ImageError": 1})
    assert (now.rows_ok, now.rows_failed, now.failed_by_class, now.rows_open) == (7, 0, {}, 0)
    report = verify(retried, deep=True)
    assert (report.problems, report.shards, report.rows_ok, report.rows_failed) == ([], 3, 7, 0)
    record = Record.from_bytes((retried / "records/00001.r1.json").read_bytes())
    assert (record.rows_ok, record.rows_failed, record.retried_by_class) == (1, 0, {"ImageError": 1})


def test_nothing_to_retry_is_said_without_work(retried: Path, warm: Warm, tmp_path: Path) -> None:
    run = copy(retried, tmp_path)
    ended = warm.run(run, "retry-failed")
    assert (ended.exit_code, ended.steps) == (0, [])
    assert "7 of 7 images done, 0 failed" in ended.output
    assert files(run) == files(retried)


def test_rows_that_fail_again_stay_failed_and_can_be_tried_once_more(
    job: Path, failed: Path, retried: Path, warm: Warm, tmp_path: Path
) -> None:
    run = copy(failed, tmp_path)
    ended = warm.run(run, "retry-failed")
    assert ended.exit_code == 3, ended.output
    assert "6 of 7 images done, 1 failed, 0 open" in ended.output
    assert not (run / RETRIED).exists()
    assert (run / "failures/00001-r1.parquet").exists()
    assert verify(run).ok
    absent = mend(job)
    ended = warm.run(run, "retry-failed", "--failures-ok")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    assert rows(*(run / "data").iterdir()) == rows(*(retried / "data").iterdir())
    assert verify(run).rows_ok == 7
    assert warm.run(run, job).exit_code == 0  # the run's own command has nothing to add


@pytest.mark.slow
def test_a_retry_killed_at_any_change_goes_on_with_the_same_command(
    job: Path, failed: Path, retried: Path, warm: Warm, tmp_path: Path
) -> None:
    absent = mend(job)
    calm = warm.run(copy(failed, tmp_path / "calm"), "retry-failed")
    killed = 0
    for stage, changes in calm.changes().items():
        for count in range(0, changes, 2 if stage[0] in ("write", "end") else 3):
            run = copy(failed, tmp_path / f"{stage[0]}-{stage[1]}-{count}")
            ended = warm.run(run, "retry-failed", at=Moment(stage, count))
            killed += ended.exit_code == -9
            # What stands is right for whoever reads it now, and the run's own command changes none of it.
            assert rows(*(run / "data").iterdir()).keys() in ({0, 1, 2, 4, 5, 6}, set(range(7)))
            assert status(run).summary.rows_ok in (6, 7)
            again = warm.run(run, "retry-failed")
            assert again.exit_code == 0, again.output
            same_output(run, retried)
            steps = len(ended.steps) + len(again.steps)
            assert steps <= STEPS + 2 + 1  # every_steps, and the one on its way
            left = {name.split("/")[0] for name in files(run)}
            assert left == {"job.json", "numerics.json", "contact-sheet.jpg", "data", "failures", "records"}
    absent.unlink()
    assert killed > 8


def test_a_killed_retry_is_shown_by_status(job: Path, failed: Path, warm: Warm, tmp_path: Path) -> None:
    run = copy(failed, tmp_path)
    absent = mend(job)
    assert warm.run(run, "retry-failed", at=Moment(("step", 1), 3)).exit_code == -9
    assert "`retry-failed` resumes it" in status(run).describe()
    assert warm.run(run, job).exit_code == 3
    assert (run / "checkpoints/00001").exists()  # the run's own command leaves the retry its checkpoint
    ended = warm.run(run, "retry-failed")
    assert ended.exit_code == 0
    assert ended.steps[0][1] > 1
    absent.unlink()


def test_compacted_records_are_retried_and_a_damaged_segment_costs_no_sampling(
    job: Path, failed: Path, retried: Path, warm: Warm, tmp_path: Path
) -> None:
    run = copy(failed, tmp_path)
    compact_all(run)
    absent = mend(job)
    ended = warm.run(run, "retry-failed")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    same_output(run, retried)
    compact_all(run)
    assert not list((run / "records").glob("0*"))
    for segment in (run / "records").iterdir():
        segment.write_bytes(segment.read_bytes()[:-1])
    ended = warm.run(run, job)
    assert (ended.exit_code, ended.steps) == (0, []), ended.output
    same_output(run, retried)
    assert status(run).summary.rows_ok == 7


def compact_all(run: Path) -> None:
    paths = paths_of(run)
    paths.create()
    ledger = Ledger(paths)
    ledger.refresh()
    assert compact(paths, ledger, least=1)
    clean(paths)


# --- repair -----------------------------------------------------------------------------------------------------------


def flip(name: str, place: int = 100) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[place] ^= 1
        (run / name).write_bytes(data)

    return damage


def lose(*names: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for name in names:
            (run / name).unlink()

    return damage


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for one in damages:
            one(run)

    return damage


def forge(name: str, **changes: object) -> Callable[[Path], None]:
    """A record that is right in itself."""

    def damage(run: Path) -> None:
        record = Record.from_bytes((run / name).read_bytes())
        (run / name).write_bytes(Record(**{**vars(record), **changes}).to_bytes())  # type: ignore[arg-type]

    return damage


def paths_of(run: Path) -> RunPaths:
    return RunFile.open(run)[1]


# damage -> whether the shard has to be sampled again, for what is whole only gets its record back
DAMAGES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "byte of data": (flip("data/train-00000-of-00003.parquet"), True),
    "byte of failures": (flip("failures/00001.parquet"), True),
    "byte of a record": (flip("records/00002.json"), False),
    "byte of a later record": (flip("records/00001.r1.json"), False),
    "byte of later data": (flip(RETRIED), True),
    "data gone": (lose("data/train-00002-of-00003.parquet"), True),
    "data gone below a later generation": (lose("data/train-00001-of-00003.parquet"), True),
    "record gone": (lose("records/00000.json"), False),
    "record gone below a later generation": (lose("records/00001.json"), False),
    "later record gone": (lose("records/00001.r1.json"), False),
    "all of a shard gone": (
        lose("records/00001.json", "data/train-00001-of-00003.parquet", "failures/00001.parquet"),
        True,
    ),
    "edited record": (forge("records/00001.json", rows_ok=3), False),
    "record of another job": (forge("records/00000.json", fingerprint="0" * 64), False),
    "classes miscounted": (forge("records/00001.json", failed_by_class={"Other": 1}), False),
    "extra file": (lambda run: (run / "data/extra.parquet").touch(), False),
    "numerics truncated": (lambda run: (run / "numerics.json").write_text("{"), False),
    "two at once": (both(flip("data/train-00000-of-00003.parquet"), flip(RETRIED)), True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_leaves_the_bytes_of_an_undisturbed_run(
    job: Path, retried: Path, warm: Warm, tmp_path: Path, damage: str
) -> None:
    spoil, samples = DAMAGES[damage]
    run = copy(retried, tmp_path)
    spoil(run)
    assert not verify(run).ok, "verify sees it"
    absent = mend(job)
    ended = warm.run(run, "repair", "--deep")
    absent.unlink()
    assert ended.exit_code == 0, ended.output
    assert "Traceback" not in ended.output
    assert bool(ended.steps) == samples, ended.steps
    same_output(run, retried)
    assert (status(run).summary.rows_ok, status(run).summary.rows_failed) == (7, 0)


def test_repair_of_a_sound_run_changes_nothing(retried: Path, warm: Warm, tmp_path: Path) -> None:
    run = copy(retried, tmp_path)
    ended = warm.run(run, "repair")
    assert (ended.exit_code, ended.steps) == (0, [])
    assert files(run) == files(retried)


@pytest.mark.slow
def test_a_killed_repair_goes_on_with_the_same_command(job: Path, retried: Path, warm: Warm, tmp_path: Path) -> None:
    absent = mend(job)
    calm: Ended | None = None
    for count in (None, 0, 2, 5):
        run = copy(retried, tmp_path / str(count))
        both(flip("data/train-00000-of-00003.parquet"), flip(RETRIED), flip("records/00002.json"))(run)
        if count is None:
            calm = warm.run(run, "repair")
            continue
        assert calm is not None
        for stage in [stage for stage in calm.changes() if stage[0] in ("start", "write")][:4]:
            warm.run(run, "repair", at=Moment(stage, count))
        assert warm.run(run, "repair").exit_code == 0
        same_output(run, retried)
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
