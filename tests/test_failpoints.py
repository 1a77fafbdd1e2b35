"""Whatever happens at whatever point of the protocol, the same command finishes with the same bytes and no strays."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from demo_job import Ended, Warm, check_same, start, until
from store_shards import files, in_child
from stylemill.errors import StorageError
from stylemill.testing.failpoints import ACTIONS, POINTS, failpoint, parse


def faults(folder: Path, rules: str) -> dict[str, str]:
    """The environment in which `rules` hold, counted in `folder`."""
    folder.mkdir(exist_ok=True)
    return {"STYLEMILL_FAILPOINTS": rules, "STYLEMILL_FAILPOINTS_STATE": str(folder)}


# --- the points themselves --------------------------------------------------------------------------------------------


def arm(monkeypatch: pytest.MonkeyPatch, folder: Path, rules: str) -> None:
    for name, value in faults(folder, rules).items():
        monkeypatch.setenv(name, value)


def test_a_fault_comes_once_over_all_processes_and_where_its_conditions_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(monkeypatch, tmp_path, "mid-sample:kill:shard=1:row=7:hit=2")
    calls = [{"shard": 0, "row": [7]}, {"shard": 1, "row": [6]}, {"shard": 1}, *[{"shard": 1, "row": [6, 7]}] * 4]
    ended = [in_child(lambda facts=facts: failpoint("mid-sample", **facts)) for facts in calls]  # type: ignore[misc]
    assert ended == [0, 0, 0, 0, -signal.SIGKILL, 0, 0]


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -signal.SIGKILL), ("exit", 1), ("segfault", -signal.SIGSEGV), ("delay:seconds=0", 0)]
)
def test_actions_end_a_process_as_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, code: int
) -> None:
    arm(monkeypatch, tmp_path, f"load:{action}:times=always")
    assert [in_child(lambda: failpoint("load")) for _ in range(2)] == [code, code]


def test_a_fault_raises_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, tmp_path, "load:raise; load:raise:error=ENOSPC; load:raise:error=StorageError")
    for kind, words in ((RuntimeError, "injected at load"), (OSError, "No space left"), (StorageError, "injected")):
        with pytest.raises(kind, match=words):
            failpoint("load")
    failpoint("load")


def test_rules_that_name_no_point_or_action_are_refused() -> None:
    for rules in ("after-reed:kill", "after-read:kil"):
        with pytest.raises(ValueError, match=rules.split(":")[1]):
            parse(rules)


def test_every_point_is_passed_somewhere_and_no_other_is_named() -> None:
    import re

    import stylemill

    sources = [path.read_text() for path in Path(stylemill.__file__).parent.rglob("*.py")]
    passed = {point for source in sources for point in re.findall(r'\bfault\("([a-z-]+)"', source)}
    assert passed == set(POINTS)


# --- killed at each point ---------------------------------------------------------------------------------------------

DEATHS = {
    "load": "",
    "before-read": "shard=1",
    "read-image": "hit=2",
    "after-read": "shard=1",
    "mid-sample": "shard=1:step=3",
    "before-checkpoint": "shard=1:step=4",
    "after-checkpoint": "shard=1:step=2",
    "before-decode": "shard=1",
    "mid-write": "folder=data:hit=2",
    "mid-write of failures": "folder=failures",
    "mid-write of a checkpoint": "folder=00001",
    "mid-write of a record": "folder=records",
    "before-publish": "shard=1",
    "mid-publish": "folder=data",
    "mid-publish of a checkpoint": "folder=00001",
    "mid-publish of a record": "folder=records",
    "after-publish": "shard=1",
    "before-record": "shard=1",
    "after-record": "shard=1",
    "mid-clean": "",
    "mid-clean at the end": "folder=checkpoints",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", DEATHS)
def test_killed_at_any_point_the_same_command_finishes(
    job: Path, whole: Path, warm: Warm, tmp_path: Path, place: str
) -> None:
    point, condition = place.split(" ")[0], DEATHS[place]
    environment = faults(tmp_path / "faults", f"{point}:kill" + f":{condition}" * bool(condition))
    run = tmp_path / "run"
    killed = warm.run(run, job, faults=environment)
    assert killed.exit_code == -signal.SIGKILL, killed.output
    finished = warm.run(run, job, faults=environment)
    assert finished.exit_code == 3, finished.output
    check_same(run, whole)


def test_the_places_of_death_are_all_points() -> None:
    assert {place.split(" ")[0] for place in DEATHS} == set(POINTS)
    assert "kill" in ACTIONS


# --- disks ------------------------------------------------------------------------------------------------------------


def check_kept_and_resumed(
    job: Path, whole: Path, warm: Warm, run: Path, failed: Ended, words: str, options: tuple[str, ...]
) -> None:
    assert failed.exit_code == 1, failed.output
    assert words in failed.output
    assert "the same command resumes" in failed.output
    assert "Traceback" not in failed.output
    finished = warm.run(run, job, *options)
    assert finished.exit_code == 3, finished.output
    check_same(run, whole)


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("mid-write:raise:error=ENOSPC:folder=data:times=always", "the disk is full"),
        ("mid-write:raise:error=EROFS:folder=records:times=always", "Read-only file system"),
        ("mid-write:raise:error=EIO:folder=00001:times=always", "Input/output error"),
    ],
)
def test_a_disk_that_fails_costs_no_row(
    job: Path, whole: Path, warm: Warm, tmp_path: Path, fails: str, words: str
) -> None:
    run, options = tmp_path / "run", ("--set", "retries=0")
    failed = warm.run(run, job, *options, faults=faults(tmp_path / "faults", fails))
    check_kept_and_resumed(job, whole, warm, run, failed, words, options)


@pytest.mark.slow
def test_files_that_the_system_cuts_short_are_no_data(job: Path, whole: Path, warm: Warm, tmp_path: Path) -> None:
    """A real limit, met by whoever writes: Python, pyarrow, safetensors."""
    run = tmp_path / "run"
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    command = ("run", job, "--inline", "--output", run, "--set", "retries=0")
    process = start(*command, preexec_fn=limit)
    output = process.communicate()[0]
    assert process.returncode == 1, output
    assert "File too large" in output
    assert not files(run / "data")
    assert warm.run(run, job, "--set", "retries=0").exit_code == 3
    check_same(run, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount; the tests above meet the same errors without")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_really_full_or_read_only(job: Path, whole: Path, warm: Warm, small_disk: Path) -> None:
    run, options = small_disk / "run", ("--set", "retries=0")
    full = warm.run(run, job, *options)
    assert full.exit_code == 1, full.output
    assert "the disk is full" in full.output
    subprocess.run(["mount", "-o", "remount,ro,size=64m", small_disk], check=True)
    read_only = warm.run(run, job, *options)
    assert (read_only.exit_code, "cannot be written (Read-only" in read_only.output) == (2, True), read_only.output
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    check_kept_and_resumed(job, whole, warm, run, full, "the disk is full", options)


# --- zombies and second drivers ---------------------------------------------------------------------------------------

ATTEMPT = """
import os, sys
from contextlib import nullcontext
from pathlib import Path
from stylemill.config.job import Job
from stylemill.execution.attempt import Run
from stylemill.planning.plan import plan
from stylemill.execution.shard import process_shard
from stylemill.execution.worker_engine import load_engine
from stylemill.store.paths import RunPaths
planned = plan(Job.load(sys.argv[1], {"output": sys.argv[2]}))
paths = RunPaths(Path(sys.argv[2]), planned.shards)
paths.create()
fingerprint, pairs = planned.fingerprint_sha256, planned.pairs_per_shard
run = Run(planned.job, paths, planned.manifest, fingerprint, pairs, planned.model.label)
shard = 1
attempt, engine = run.new_attempt(shard, planned.occurrences), load_engine(run, None)
record = process_shard(run, attempt, engine, nullcontext(), lambda _: None, lambda: False)
print("committed by", record.attempt)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["mid-sample:step=3", "before-checkpoint:step=4", "mid-write:folder=data"])
def test_a_worker_that_was_given_up_and_comes_back_changes_nothing(
    job: Path, whole: Path, warm: Warm, tmp_path: Path, place: str
) -> None:
    """It stands still wherever it is, the run is finished without it, and then it goes on."""
    point, condition = place.split(":")
    environment = faults(tmp_path / "faults", f"{point}:stop:{condition}")
    run = tmp_path / "run"
    warm.run(run, job, faults=faults(tmp_path / "before", "load:kill"))  # the folder is a run's now
    zombie = subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, str(job), str(run)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        os.waitpid(zombie.pid, os.WUNTRACED)
        finished = warm.run(run, job)
        assert finished.exit_code == 3, finished.output
        check_same(run, whole)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    finally:
        os.kill(zombie.pid, signal.SIGCONT)
    output = zombie.communicate()[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before, output
    again = warm.run(run, job)
    assert again.exit_code == 3, again.output
    check_same(run, whole)


def test_a_driver_is_refused_beside_a_stopped_one_and_takes_over_from_a_dead_one(
    job: Path, whole: Path, warm: Warm, tmp_path: Path
) -> None:
    """Stopped, it may go on at any time; dead, it cannot, though nobody removed its lock."""
    run = tmp_path / "run"
    first = warm.start(run, job, faults=faults(tmp_path / "faults", "mid-sample:stop:shard=1:step=3"))
    try:
        until(lambda: _state(first.process.pid) == "T")
        refused = warm.run(run, job)
        assert (refused.exit_code, f"pid {first.process.pid}" in refused.output) == (1, True), refused.output
    finally:
        os.kill(first.process.pid, signal.SIGKILL)
    assert first.ended().exit_code == -signal.SIGKILL
    assert (run / "lock").exists()
    second = warm.run(run, job)
    assert second.exit_code == 3, second.output
    assert second.steps[0] == (1, 3), "it goes on from the checkpoint of step 2"
    check_same(run, whole)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
