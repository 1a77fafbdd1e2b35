"""Whole runs from the command line: a killed and resumed run leaves the same bytes, with any number of workers.

Every run is compared with an undisturbed run of the demo job (tests/demo_job.py).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from demo_job import (
    ABSENT,
    CARRIED,
    EVERY_STEPS,
    SHARDS,
    STEPS,
    EndedProcess,
    ForkedCommands,
    Moment,
    Stage,
    check_same,
    start,
    stylemill,
    until,
)
from store_shards import files
from stylemill.store.verify import verify

FINISHED = [
    "contact-sheet.jpg",
    *(f"data/train-0000{shard}-of-00003.parquet" for shard in range(SHARDS)),
    "failures.parquet",
    "failures/00001.parquet",
    "job.json",
    "numerics.json",
    *(f"records/0000{shard}.json" for shard in range(SHARDS)),
]
ALL_STEPS = [(shard, step) for shard in range(SHARDS) for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def whole(job: Path, commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EndedProcess]:
    """The run folder of an undisturbed run, which no test may change, and how the run ended."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, commands.run(output, job)


# --- one undisturbed run ----------------------------------------------------------------------------------------------


def test_a_run_commits_every_row_once_as_an_image_or_as_a_failure(whole: tuple[Path, EndedProcess]) -> None:
    run, ended = whole
    assert ended.exit_code == 3, ended.output
    assert "6 of 7 images done, 1 failed, 0 open" in ended.output
    assert "absent.png" in ended.output
    assert ended.steps == ALL_STEPS
    assert sorted(files(run)) == FINISHED
    report = verify(run, deep=True)
    assert (report.problems, report.shards, report.rows_ok, report.rows_failed) == ([], SHARDS, 6, 1)


def test_the_data_folder_is_a_dataset_with_all_carried_columns(
    whole: tuple[Path, EndedProcess], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(
        "parquet", data_dir=str(whole[0] / "data"), split="train", cache_dir=str(tmp_path / "cache")
    )
    rows = list(data)
    assert [row["row"] for row in rows] == [row for row in range(7) if row != ABSENT]
    assert {(row["image"].size, row["image"].mode) for row in rows} == {((64, 64), "RGB")}
    for name, values in CARRIED.items():
        assert [row[name] for row in rows] == [value for row, value in enumerate(values) if row != ABSENT]
    assert len({row["pair_id"] for row in rows}) == 6
    assert rows[-1]["pair_id"] == rows[0]["pair_id"] + "-2", "the last row repeats the first row"
    assert rows[-1]["image"].tobytes() == rows[0]["image"].tobytes()
    stars = rows[0]["style"][0]
    assert re.fullmatch("sha256:[0-9a-f]{64}", stars)
    assert [row["content"] for row in rows] == ["face.png", "street.png", None, "face.png", "street.png", "face.png"]
    assert [row["style"] for row in rows[1:4]] == [["waves.png"], ["waves.png", stars], [stars, "waves.png"]]
    assert [row["content_weight"] for row in rows] == [0.25, 0.0, 0.25, 0.5, 0.25, 0.25]
    assert [row["prompt"] for row in rows] == [None, None, "a red boat", None, "a hill", None]


def test_the_python_functions_do_what_the_commands_do(
    job: Path, whole: tuple[Path, EndedProcess], tmp_path: Path
) -> None:
    import stylemill

    run = tmp_path / "run"
    planned = stylemill.plan(job, {"output": str(run)})
    assert (planned.rows, planned.shards, list(planned.rows_of(2))) == (7, SHARDS, [6])
    assert not run.exists()
    before = signal.getsignal(signal.SIGINT)
    result = stylemill.run(job, {"output": str(run)}, inline=True, quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert (result.exit_code, result.open, result.signal) == (3, {}, None)
    assert (result.summary.rows_ok, result.summary.failed_by_class) == (6, {"ImageError": 1})
    status = stylemill.status(run)
    assert (status.finished, status.worked_on_by, status.in_flight) == (True, None, [])
    assert stylemill.verify(run, deep=True).ok
    check_same(run, whole[0])


# --- a second start in the same run folder ----------------------------------------------------------------------------

COUNT_MODULES = """
import sys
from stylemill.cli import main
code = main(sys.argv[1:])
print("loaded:", *sorted({name.split(".")[0] for name in sys.modules}))
sys.exit(code)
"""


@pytest.mark.parametrize("executor", [(), ("--inline",)], ids=["ray", "inline"])
def test_a_finished_run_is_only_summarized(
    job: Path, whole: tuple[Path, EndedProcess], executor: tuple[str, ...]
) -> None:
    run, ended = whole
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    command = ["run", str(job), "--output", str(run), "--failures-ok", *executor]
    again = subprocess.run([sys.executable, "-c", COUNT_MODULES, *command], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    *output, loaded = again.stdout.splitlines()
    assert not {"torch", "ray", "diffusers", "transformers"} & set(loaded.split())
    assert output == [line for line in ended.output.splitlines() if "img in" not in line]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_of_another_job_is_refused_naming_each_difference(job: Path, whole: tuple[Path, EndedProcess]) -> None:
    before = files(whole[0])
    options = ("--set", "sampling.steps=7", "--set", "image.fit=pad", "--workers", "2")
    code, output = stylemill("run", job, "--output", whole[0], *options)
    assert code == 2, output
    differences = re.findall(r"^  (.*): run has (.*), job has (.*)$", output, re.M)
    assert sorted(differences) == [("image.fit", "crop", "pad"), ("sampling.steps", str(STEPS), "7")]
    assert "--output" in output
    assert files(whole[0]) == before


def test_a_second_run_in_the_folder_is_refused_naming_the_first(
    job: Path, whole: tuple[Path, EndedProcess], commands: ForkedCommands, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = commands.start(run, job, at=Moment(("sample", 1), 0, signal.SIGSTOP))
    try:
        until(lambda: stopped(first.process.pid))
        code, output = stylemill("run", job, "--output", run)
        assert (code, f"pid {first.process.pid} on host {socket.gethostname()}" in output) == (1, True), output
        assert f"pid {first.process.pid}" in stylemill("status", run)[1]
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert first.ended().exit_code == 3
    check_same(run, whole[0])


# --- killed and interrupted runs --------------------------------------------------------------------------------------


def check_resumed(before: EndedProcess, after: EndedProcess, lost: int) -> None:
    """Assert that no shard repeats more than `lost` steps after a kill."""
    reached = dict(before.steps)  # the last step of each shard
    for shard in {shard for shard, _ in after.steps} & set(reached):
        resumed_at = next(step for other, step in after.steps if other == shard)
        assert resumed_at > reached[shard] - lost, f"shard {shard}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_in_every_stage_is_finished_by_the_same_command(
    job: Path, whole: tuple[Path, EndedProcess], commands: ForkedCommands, tmp_path: Path, seed: int
) -> None:
    draw, changes = random.Random(seed), whole[1].changes()
    of_shards: list[Stage] = [(stage, shard) for shard in range(SHARDS) for stage in ("sample", "write")]
    before = None
    for stage in [("start", None), *of_shards, ("end", None)]:
        moment = Moment(stage, draw.randrange(changes[stage]))
        killed = commands.run(tmp_path / "run", job, at=moment)
        assert killed.exit_code == -signal.SIGKILL, (moment, killed.output)
        if before:
            check_resumed(before, killed, lost=EVERY_STEPS)
        before = killed
    last = commands.run(tmp_path / "run", job)
    assert (last.exit_code, last.steps) == (3, []), last.output
    check_same(tmp_path / "run", whole[0])


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, EVERY_STEPS + 1)])
def test_a_run_that_is_asked_to_stop_loses_no_step(
    job: Path,
    whole: tuple[Path, EndedProcess],
    commands: ForkedCommands,
    tmp_path: Path,
    number: signal.Signals,
    step: int,
) -> None:
    assert step % EVERY_STEPS, "at other steps a checkpoint is written anyway"
    run = tmp_path / "run"
    stopped = commands.run(run, job, at=Moment(("step", 1), step - 1, number))
    assert stopped.exit_code == 128 + number, stopped.output
    assert stopped.steps[-1] == (1, step)
    assert (
        stopped.output.count("stopping: workers write checkpoints, then end; press Ctrl-C again to end at once\n") == 1
    )
    assert stopped.output.endswith("\n2 shards are open; the same command resumes\n"), "nothing failed"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00001"]
    assert os.listdir(run / "tmp") == []
    assert "stopped; the command that started it resumes it" in stylemill("status", run)[1]
    resumed = commands.run(run, job)
    assert resumed.exit_code == 3, resumed.output
    assert stopped.steps + resumed.steps == ALL_STEPS
    check_same(run, whole[0])


def test_shards_in_another_order_give_the_same_bytes(
    job: Path, whole: tuple[Path, EndedProcess], commands: ForkedCommands, tmp_path: Path
) -> None:
    run, order = tmp_path / "run", [2, 0, 1]
    killed = commands.run(run, job, order=order, at=Moment(("sample", 0), whole[1].changes()["sample", 0] - 1))
    assert killed.exit_code == -signal.SIGKILL, killed.output
    assert killed.steps == [(shard, step) for shard in (2, 0) for step in range(1, STEPS + 1)]
    finished = commands.run(run, job, order=[1, 0, 2])
    assert (finished.exit_code, finished.steps[0]) == (3, (1, 1)), finished.output
    check_same(run, whole[0])


# --- damaged files ----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_damaged_files_go_to_quarantine_and_are_redone(
    job: Path, whole: tuple[Path, EndedProcess], commands: ForkedCommands, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed = commands.run(run, job, at=Moment(("write", 2), 0))
    assert killed.exit_code == -signal.SIGKILL, killed.output
    older, newest = sorted((run / "checkpoints" / "00002").glob("progress-*"))
    damaged = [run / "records" / "00000.json", run / "data" / "train-00001-of-00003.parquet", newest]
    for path in damaged:
        truncate(path)
    assert not verify(run).ok

    finished = commands.run(run, job)
    assert finished.exit_code == 3, finished.output
    # Shard 0 lost its record, shard 1 its data file, shard 2 the steps after its older checkpoint.
    kept = int(older.name.split("-")[1])
    assert finished.steps == [entry for entry in ALL_STEPS if entry[0] < 2 or entry[1] > kept]
    aside = sorted(path.name.rsplit(".", 1)[0] for path in (run / "quarantine").iterdir() if path.suffix != ".txt")
    names = {path.relative_to(run).as_posix().replace("/", "-") for path in [*damaged, run / "records" / "00001.json"]}
    assert set(aside) >= names, "a record without its data file is not valid"
    check_same(run, whole[0], set_aside=len(aside))


# --- with Ray ---------------------------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[int, str]]:
    """Session and command line of every live process."""
    live = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session, *_ = _stat(pid)
            if state not in "ZX":
                command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                live[pid] = (int(session), command.replace("\0", " ").strip())
    return live


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has stopped the process."""
    return _stat(pid)[0] == "T"


def _stat(pid: int) -> list[str]:
    # The process name comes before, in parentheses, and may contain spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Terminal:
    """Starts runs with Ray, each in its own session, and removes their processes and folders."""

    def __init__(self) -> None:
        self.sessions: list[int] = []
        self.folders: set[str] = set()

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        process = start(*arguments)
        self.sessions.append(process.pid)
        return process

    def note_folders(self) -> None:
        for command in self.alive().values():
            self.folders.update(re.findall(r"/tmp/stylemill-\w+", command))

    def alive(self) -> dict[int, str]:
        """Processes and their command lines."""
        return {pid: command for pid, (session, command) in processes().items() if session in self.sessions}

    def workers(self) -> list[str]:
        return [command for command in self.alive().values() if "Worker" in command]

    def close(self) -> None:
        while alive := self.alive():
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


@pytest.mark.slow
def test_ray_runs_resume_after_ctrl_c_and_after_a_killed_driver(
    job: Path, commands: ForkedCommands, terminal: Terminal, tmp_path: Path
) -> None:
    """The job has more steps than in other tests, so that the runs are still working when they are interrupted."""
    run = tmp_path / "run"
    longer = ("--set", "sampling.steps=15", "--set", "checkpoint.every_steps=1")
    command = ("run", job, "--output", run, *longer)

    def checkpoints() -> list[str]:
        return [path.name for path in (run / "checkpoints").glob("*/progress-*")]

    # As Ctrl-C does, the signal reaches the processes of Ray too.
    first = terminal.start(*command, "--workers", 1)
    until(lambda: checkpoints() or first.poll() is not None)
    os.killpg(first.pid, signal.SIGINT)
    output = first.communicate()[0]
    assert first.returncode == 130, output
    assert "shards are open; the same command resumes" in output
    assert checkpoints()
    until(lambda: not terminal.alive())

    second = terminal.start(*command, "--workers", 2)
    until(lambda: list((run / "data").glob("*.parquet")) or second.poll() is not None)
    terminal.note_folders()
    second.kill()
    assert second.wait() == -signal.SIGKILL

    # Start the third run at once, while workers of the second may still run.
    third = terminal.start(*command, "--workers", 3)
    output = third.communicate()[0]
    assert third.returncode == 3, output
    until(lambda: not terminal.workers())  # other processes of Ray exit a minute after their driver

    undisturbed = commands.run(tmp_path / "whole", job, *longer)
    assert undisturbed.exit_code == 3, undisturbed.output
    check_same(run, tmp_path / "whole")
