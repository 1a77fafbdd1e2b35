"""A run that is killed or fails at any point is finished by the same command, with the same bytes and files."""

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

import fake_engine
from demo_job import EndedProcess, ForkedCommands, check_same, until
from store_shards import files, in_child
from stylemill.errors import StorageError
from stylemill.store.verify import verify
from stylemill.testing.failpoints import ACTIONS, POINTS, failpoint, parse_rules


@pytest.fixture(scope="module")
def with_fake_engine() -> bool:
    return True


def failpoint_environment(folder: Path, rules: str) -> dict[str, str]:
    """The environment that activates `rules`, whose hits are counted in `folder`."""
    folder.mkdir(exist_ok=True)
    return {"STYLEMILL_FAILPOINTS": rules, "STYLEMILL_FAILPOINTS_STATE": str(folder)}


# --- rules ------------------------------------------------------------------------------------------------------------


def activate(monkeypatch: pytest.MonkeyPatch, folder: Path, rules: str) -> None:
    for name, value in failpoint_environment(folder, rules).items():
        monkeypatch.setenv(name, value)


def test_a_rule_acts_once_over_all_processes_if_its_conditions_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    activate(monkeypatch, tmp_path, "mid-sample:kill:shard=1:row=7:hit=2")
    calls = [{"shard": 0, "row": [7]}, {"shard": 1, "row": [6]}, {"shard": 1}, *[{"shard": 1, "row": [6, 7]}] * 4]
    codes = [in_child(lambda call=call: failpoint("mid-sample", **call)) for call in calls]  # type: ignore[misc]
    assert codes == [0, 0, 0, 0, -signal.SIGKILL, 0, 0]


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -signal.SIGKILL), ("exit", 1), ("segfault", -signal.SIGSEGV), ("delay:seconds=0", 0)]
)
def test_each_action_ends_the_process_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, code: int
) -> None:
    activate(monkeypatch, tmp_path, f"load:{action}:times=always")
    assert [in_child(lambda: failpoint("load")) for _ in range(2)] == [code, code]


def test_a_rule_raises_the_error_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(monkeypatch, tmp_path, "load:raise; load:raise:error=ENOSPC; load:raise:error=StorageError")
    for kind, message in ((RuntimeError, "injected at load"), (OSError, "No space left"), (StorageError, "injected")):
        with pytest.raises(kind, match=message):
            failpoint("load")
    failpoint("load")


def test_a_rule_with_an_unknown_point_or_action_is_refused() -> None:
    for rules in ("after-reed:kill", "after-read:kil"):
        with pytest.raises(ValueError, match=rules.split(":")[1]):
            parse_rules(rules)


def test_the_code_has_exactly_the_points_in_the_list() -> None:
    import re

    import stylemill

    sources = [path.read_text() for path in Path(stylemill.__file__).parent.rglob("*.py")]
    in_code = {point for source in sources for point in re.findall(r'\bfailpoint\("([a-z-]+)"', source)}
    assert in_code == set(POINTS)


# --- killed at each point ---------------------------------------------------------------------------------------------

KILLS = {
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
@pytest.mark.parametrize("place", KILLS)
def test_after_a_kill_at_any_point_the_same_command_finishes(
    job: Path, whole: Path, commands: ForkedCommands, tmp_path: Path, place: str
) -> None:
    point, condition = place.split(" ")[0], KILLS[place]
    environment = failpoint_environment(tmp_path / "failpoints", f"{point}:kill" + f":{condition}" * bool(condition))
    run = tmp_path / "run"
    killed = commands.run(run, job, faults=environment)
    assert killed.exit_code == -signal.SIGKILL, killed.output
    finished = commands.run(run, job, faults=environment)
    assert finished.exit_code == 3, finished.output
    check_same(run, whole)


def test_there_is_a_kill_at_every_point() -> None:
    assert {place.split(" ")[0] for place in KILLS} == set(POINTS)
    assert "kill" in ACTIONS


# --- disks ------------------------------------------------------------------------------------------------------------


def check_kept_and_resumed(
    job: Path,
    whole: Path,
    commands: ForkedCommands,
    run: Path,
    failed: EndedProcess,
    message: str,
    options: tuple[str, ...],
) -> None:
    assert failed.exit_code == 1, failed.output
    assert message in failed.output
    assert "the same command resumes" in failed.output
    assert "Traceback" not in failed.output
    finished = commands.run(run, job, *options)
    assert finished.exit_code == 3, finished.output
    check_same(run, whole)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("mid-write:raise:error=ENOSPC:folder=data:times=always", "the disk is full"),
        ("mid-write:raise:error=EROFS:folder=records:times=always", "Read-only file system"),
        ("mid-write:raise:error=EIO:folder=00001:times=always", "Input/output error"),
    ],
)
def test_no_row_is_lost_if_the_disk_fails(
    job: Path, whole: Path, commands: ForkedCommands, tmp_path: Path, rule: str, message: str
) -> None:
    run, options = tmp_path / "run", ("--set", "retries=0")
    failed = commands.run(run, job, *options, faults=failpoint_environment(tmp_path / "failpoints", rule))
    check_kept_and_resumed(job, whole, commands, run, failed, message, options)


def test_a_run_goes_on_if_its_numerics_cannot_be_written_at_first(
    job: Path, whole: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    rule = "mid-write:raise:error=EIO:folder=run:hit=2"  # the first file there is job.json
    constants = {"stylemill.execution.listener:LONGEST_PAUSE": 0.0}
    faults = failpoint_environment(tmp_path / "failpoints", rule)
    ended = commands.run(tmp_path / "run", job, faults=faults, constants=constants)
    assert ended.exit_code == 3, ended.output
    assert "numerics.json: Input/output error" in ended.output
    check_same(tmp_path / "run", whole)


def test_a_failed_compaction_is_tried_again_after_a_later_commit(
    job: Path, whole: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    rule = "mid-write:raise:error=ENOSPC:folder=records:hit=3"  # after the records of two shards
    constants = {"stylemill.execution.listener:RECORDS_PER_SEGMENT": 2}
    run, faults = tmp_path / "run", failpoint_environment(tmp_path / "failpoints", rule)
    ended = commands.run(run, job, faults=faults, constants=constants)
    assert ended.exit_code == 3, ended.output
    assert "the records were not compacted, which is tried again later" in ended.output
    assert [path.name[:7] for path in (run / "records").iterdir()] == ["compact"]
    assert ended.steps == commands.run(tmp_path / "undisturbed", job).steps
    assert verify(run).problems == []
    assert files(run / "data") == files(whole / "data")


@pytest.mark.slow
def test_files_that_exceed_a_size_limit_are_not_committed(
    job: Path, whole: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    """A real limit of the system, so it applies to writes of Python, pyarrow and safetensors."""
    run = tmp_path / "run"
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    process = subprocess.Popen(
        [sys.executable, fake_engine.__file__, "run", job, "--inline", "--output", run, "--set", "retries=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit,
    )
    output = process.communicate()[0]
    assert process.returncode == 1, output
    assert "File too large" in output
    assert not files(run / "data")
    assert commands.run(run, job, "--set", "retries=0").exit_code == 3
    check_same(run, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount; the tests above inject the same errors")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_and_a_read_only_disk(job: Path, whole: Path, commands: ForkedCommands, small_disk: Path) -> None:
    run, options = small_disk / "run", ("--set", "retries=0")
    full = commands.run(run, job, *options)
    assert full.exit_code == 1, full.output
    assert "the disk is full" in full.output
    subprocess.run(["mount", "-o", "remount,ro,size=64m", small_disk], check=True)
    read_only = commands.run(run, job, *options)
    assert (read_only.exit_code, "cannot be written (Read-only" in read_only.output) == (2, True), read_only.output
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    check_kept_and_resumed(job, whole, commands, run, full, "the disk is full", options)


# --- late workers and second drivers ----------------------------------------------------------------------------------

FAKE_ENGINE_PATH = {"PYTHONPATH": os.pathsep.join([str(Path(fake_engine.__file__).parent), *sys.path])}
ATTEMPT = """
import os, sys
from contextlib import nullcontext
from pathlib import Path
import fake_engine
from stylemill.config.job import Job
from stylemill.execution.attempt import AutoSettings, Run
from stylemill.planning.plan import plan
from stylemill.execution.shard import process_shard
from stylemill.execution.worker_engine import load_engine
from stylemill.store.paths import RunPaths
from stylemill.store.run_file import create_run_folder
fake_engine.install()
planned = plan(Job.load(sys.argv[1], {"output": sys.argv[2]}))
paths = RunPaths(Path(sys.argv[2]), planned.shards)
create_run_folder(paths)
fingerprint, pairs = planned.fingerprint_sha256, planned.pairs_per_shard
run = Run(planned.job, paths, planned.manifest, fingerprint, pairs, planned.model.label, "base")
shard = 1
attempt, engine = run.new_attempt(shard, planned.occurrences), load_engine(run, AutoSettings())
record = process_shard(run, attempt, engine, nullcontext(), lambda _: None, lambda: False)
print("committed by", record.attempt)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["mid-sample:step=3", "before-checkpoint:step=4", "mid-write:folder=data"])
def test_a_worker_that_was_given_up_and_continues_later_changes_nothing(
    job: Path, whole: Path, commands: ForkedCommands, tmp_path: Path, place: str
) -> None:
    """The worker is stopped, the run is finished without it, and then the worker continues."""
    point, condition = place.split(":")
    environment = failpoint_environment(tmp_path / "failpoints", f"{point}:stop:{condition}")
    run = tmp_path / "run"
    commands.run(run, job, faults=failpoint_environment(tmp_path / "before", "load:kill"))  # creates the run folder
    late_worker = subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, str(job), str(run)],
        env=os.environ | environment | FAKE_ENGINE_PATH,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        os.waitpid(late_worker.pid, os.WUNTRACED)
        finished = commands.run(run, job)
        assert finished.exit_code == 3, finished.output
        check_same(run, whole)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    finally:
        os.kill(late_worker.pid, signal.SIGCONT)
    output = late_worker.communicate()[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before, output
    again = commands.run(run, job)
    assert again.exit_code == 3, again.output
    check_same(run, whole)


def test_a_second_driver_is_refused_while_the_first_one_is_stopped_but_not_when_it_is_dead(
    job: Path, whole: Path, commands: ForkedCommands, tmp_path: Path
) -> None:
    """A stopped driver can continue at any time. A dead one cannot, though its lock file is still there."""
    run = tmp_path / "run"
    first = commands.start(
        run, job, faults=failpoint_environment(tmp_path / "failpoints", "mid-sample:stop:shard=1:step=3")
    )
    try:
        until(lambda: _state(first.process.pid) == "T")
        refused = commands.run(run, job)
        assert (refused.exit_code, f"pid {first.process.pid}" in refused.output) == (1, True), refused.output
    finally:
        os.kill(first.process.pid, signal.SIGKILL)
    assert first.ended().exit_code == -signal.SIGKILL
    assert (run / "lock").exists()
    second = commands.run(run, job)
    assert second.exit_code == 3, second.output
    assert second.steps[0] == (1, 3), "it resumes from the checkpoint of step 2"
    check_same(run, whole)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
