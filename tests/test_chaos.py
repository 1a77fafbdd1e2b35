"""A small chaos run, and tests that each of its checks can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import chaos
from chaos_check import check, steps_repeated, tracebacks
from store_shards import ROWS, attempt, run_folder
from stylemill.store.commit import clean, commit
from stylemill.testing.failpoints import POINTS, parse_rules

SHARDS = 2
FIRST = "data/train-00000-of-00002.parquet"


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    paths = run_folder(tmp_path, SHARDS)
    for shard in range(SHARDS):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * ROWS]))
    clean(paths)
    return paths.output


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(undisturbed, tmp_path / "disturbed")


def remove_a_row(run: Path) -> None:
    pq.write_table(pq.read_table(run / FIRST).slice(1), run / FIRST)


def flip_a_bit(run: Path) -> None:
    data = bytearray((run / FIRST).read_bytes())
    data[100] ^= 1
    (run / FIRST).write_bytes(data)


def commit_rows_twice(run: Path) -> None:
    shutil.copy(run / FIRST, run / FIRST.replace("-of-00002", "-of-00002-r1"))


def test_a_run_that_equals_the_undisturbed_one_has_no_problems(run: Path, undisturbed: Path) -> None:
    assert check(run, undisturbed, SHARDS * ROWS) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove_a_row, "1 rows are lost: [1]"),
        (lambda run: (run / "failures/00001.parquet").unlink(), "1 rows are lost: [4]"),
        (commit_rows_twice, "3 rows are there more than once: [1, 2, 3]"),
        (flip_a_bit, f"{FIRST}: has other content"),
        (flip_a_bit, "verify --deep: "),
        (lambda run: (run / FIRST).unlink(), f"1 files are missing: {FIRST}"),
        (lambda run: (run / "data/left.tmp").touch(), "1 stray files: data/left.tmp"),
        (lambda run: (run / "tmp").mkdir(), "1 stray files: tmp"),
        (lambda run: (run / "quarantine/1").mkdir(parents=True), "1 stray files: quarantine/1"),
    ],
)
def test_each_damage_is_reported(run: Path, undisturbed: Path, damage: Callable[[Path], None], problem: str) -> None:
    damage(run)
    reported = check(run, undisturbed, SHARDS * ROWS)
    assert any(line.startswith(problem) for line in reported), reported


def test_too_many_repeated_steps_and_missing_steps_are_reported() -> None:
    assert list(steps_repeated(taken=130, needed=100, limit=30)) == []
    assert list(steps_repeated(taken=131, needed=100, limit=30)) == ["31 steps were repeated, 30 at most may be"]
    assert list(steps_repeated(taken=99, needed=100, limit=30)) == ["1 steps were left out"]


def test_errors_that_were_not_injected_are_reported() -> None:
    injected = "OSError: [Errno 28] No space left on device\nRuntimeError: injected at load\nerror: disk full\n"
    assert list(tracebacks(injected)) == []
    assert list(tracebacks(f"{injected}Traceback (…)\n  in remove\nKeyError: 2\n")) == ["not injected: KeyError: 2"]


def test_a_seed_draws_the_same_faults_again_and_many_seeds_draw_all_kinds() -> None:
    plans = [chaos.draw(seed, 3, on_ray=True, faults=12, gap=5, steps=10) for seed in (1, 1, *range(2, 40))]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    rules = [rule for plan in plans for rule in parse_rules(";".join(plan.rules))]
    assert {rule.point for rule in rules} == set(POINTS)
    assert {rule.action for rule in rules} == {action.partition(":")[0] for action in chaos.ACTIONS}
    assert {(target, number) for plan in plans for _, target, number in plan.signals} > set(chaos.SIGNALS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "fake", "--faults", "25", "--pairs", "128", "--ray-share", "0.4", "--seed", "11"],
        ["--engine", "demo", "--faults", "5", "--pairs", "16", "--ray-share", "0", "--seed", "12"],
    ],
    ids=["fake engine", "demo model"],
)
def test_a_job_with_random_faults_ends_like_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code = chaos.main([*arguments, "--folder", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
