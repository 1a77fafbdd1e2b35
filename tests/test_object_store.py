"""Whole runs on S3 give the same images as on a disk, whatever is killed, and also if another machine resumes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import fake_engine_ray
from demo_job import EVERY_STEPS, EndedProcess, ForkedCommands, lasting, until, write_job
from s3_store import BUCKET, ObjectStore, Proxy, every_nth, running_proxy, serving_s3, use_environment
from store_shards import files
from stylemill.report.status import status
from stylemill.store.object_store import requests
from stylemill.store.paths import RunPaths
from stylemill.store.verify import verify

SHORT_PAUSES = {
    "stylemill.store.object_store.requests:PAUSE": 0.01,
    "stylemill.store.object_store.lock:POLL_SECONDS": 0.1,
}
# The lock of a dead driver is taken over after a second. A live driver renews its lock ten times a second.
SHORT_TIMES = SHORT_PAUSES | {
    "stylemill.store.object_store.lock:STALE_SECONDS": 1.0,
    "stylemill.store.object_store.lock:RENEW_SECONDS": 0.1,
}


@pytest.fixture(scope="module")
def with_fake_engine() -> bool:
    return True


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serving_s3() as store:
        yield store


class Runs:
    """Runs one job in s3://runs/NAME, on machines that share only the store."""

    def __init__(self, job: Path, commands: ForkedCommands, store: ObjectStore, folder: Path) -> None:
        self.job = job
        self.commands = commands
        self.store = store
        self.folder = folder
        self.name = folder.name
        self.uri = f"s3://{BUCKET}/{self.name}"

    def environment(self, machine: str, proxy: Proxy | None = None, failpoints: str = "") -> dict[str, str]:
        state = self.folder / "failpoints"
        state.mkdir(exist_ok=True)
        rules = {"STYLEMILL_FAILPOINTS": failpoints, "STYLEMILL_FAILPOINTS_STATE": str(state)} if failpoints else {}
        return self.store.environment(self.folder / machine, proxy.url if proxy else None) | rules

    def run(
        self,
        machine: str,
        *arguments: object,
        proxy: Proxy | None = None,
        failpoints: str = "",
        constants: dict[str, object] | None = None,
    ) -> EndedProcess:
        environment = self.environment(machine, proxy, failpoints)
        return self.commands.run(
            self.uri, *(arguments or [self.job]), faults=environment, constants=constants or SHORT_TIMES
        )


@pytest.fixture
def runs(
    job: Path, commands: ForkedCommands, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Runs:
    made = Runs(job, commands, store, tmp_path)
    use_environment(made.environment("reader"), monkeypatch)
    return made


def check_same(runs: Runs, whole: Path) -> None:
    """The run is finished, and holds the same files as `whole`, and no others."""
    found, expected = runs.store.objects(runs.name), files(whole)
    paths = RunPaths(Path(runs.uri), len([name for name in expected if name.startswith("records/")]))
    named = {}
    for name, data in expected.items():
        if name.startswith("records/"):
            ours, theirs = lasting(found[name]), lasting(data)
            for kind in ("data", "failures"):
                if theirs[kind]:
                    final = paths.committed_path(paths.output / theirs[kind]["name"], theirs[kind]["sha256"])
                    named[theirs[kind]["name"]] = theirs[kind]["name"] = paths.relative(final)
            assert ours == theirs
    assert sorted(found) == sorted(named.get(name, name) for name in expected)
    for name, data in expected.items():
        if not name.startswith(("records/", "job.json")):
            assert found[named.get(name, name)] == data, name
    report = verify(runs.uri, deep=True)
    assert report.ok, report.problems


def test_a_run_on_s3_equals_a_run_on_a_disk(runs: Runs, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_proxy(runs.store) as proxy:
        ended = runs.run("first", proxy=proxy)
    assert ended.exit_code == 3, ended.output
    assert f'load_dataset("parquet", data_files="{runs.uri}/data/*.parquet", split="train")' in ended.output
    check_same(runs, whole)
    assert "finished" in status(runs.uri).describe()
    again = runs.run("second")
    assert (again.exit_code, again.steps) == (3, []), again.output
    assert not list((runs.folder / "first").glob("*/tmp/*")), "no unfinished file stays on the machine"
    read_as_the_readme_says(runs, whole)


def read_as_the_readme_says(runs: Runs, whole: Path) -> None:
    import fsspec

    rows = pq.read_table(f"{BUCKET}/{runs.name}/data", filesystem=fsspec.filesystem("s3", skip_instance_cache=True))
    assert rows.column("row").to_pylist() == pq.read_table(whole / "data").column("row").to_pylist()


@pytest.mark.parametrize(
    ("place", "resumes"),
    [
        ("mid-sample:kill:shard=1:step=3", [(1, 3)]),
        pytest.param("after-publish:kill:shard=1", [(2, 1)], marks=pytest.mark.slow),
        pytest.param("before-record:kill:shard=1", [(2, 1)], marks=pytest.mark.slow),
        pytest.param("mid-publish:kill:folder=records", [(1, 1)], marks=pytest.mark.slow),
    ],
)
def test_another_machine_resumes_from_the_store(
    runs: Runs, whole: Path, place: str, resumes: list[tuple[int, int]]
) -> None:
    """The disk of the first machine is lost. At most the steps since the last checkpoint are repeated."""
    killed = runs.run("first", failpoints=place)
    assert killed.exit_code == -signal.SIGKILL, killed.output
    resumed = runs.run("second")
    assert resumed.exit_code == 3, resumed.output
    assert resumed.steps[:1] == resumes
    repeated = [step for step in killed.steps if step in resumed.steps]
    assert len(repeated) <= EVERY_STEPS
    check_same(runs, whole)


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_the_driver_repeats_an_attempt_whose_record_it_cannot_publish_or_read(
    runs: Runs, whole: Path, method: str
) -> None:
    """The store refuses more requests for the record of shard 1 than one attempt makes. No step is sampled again."""
    published, refused = [], []

    def rule(request_method: str, path: str) -> int | None:
        if "records/00001.json" not in path:
            return None
        if request_method == method and (published or method == "PUT") and len(refused) < requests.TRIES:
            refused.append(path)
            return 503
        if request_method == "PUT":
            published.append(path)
        return None

    with running_proxy(runs.store, rule) as proxy:
        ended = runs.run("first", proxy=proxy, constants=SHORT_TIMES | {"stylemill.execution.local:LONGEST_PAUSE": 0.0})
    assert ended.exit_code == 3, ended.output
    assert len(refused) == requests.TRIES
    assert "warning: shard 1, attempt 1 of 4: s3://runs/" in ended.output
    assert len(set(ended.steps)) == len(ended.steps)
    check_same(runs, whole)


@pytest.mark.slow
def test_a_run_on_a_store_that_often_fails(runs: Runs, whole: Path) -> None:
    """Every seventh request is refused, lost or late, and the driver is killed once."""
    kinds = [503, "lost", "slow"]
    rules = [every_nth(7 * len(kinds) + 2 * number, kind) for number, kind in enumerate(kinds)]

    def rule(method: str, path: str) -> int | str | None:
        return next((treatment for treatment in [rule(method, path) for rule in rules] if treatment), None)

    with running_proxy(runs.store, rule) as lossy:
        killed = runs.run("first", proxy=lossy, failpoints="mid-sample:kill:shard=1:step=3")
        assert killed.exit_code == -signal.SIGKILL, killed.output
        ended = runs.run("second", proxy=lossy)
        assert ended.exit_code == 3, ended.output
        assert lossy.treated > 5
    check_same(runs, whole)


@pytest.mark.slow
def test_a_run_on_a_store_without_conditional_puts(runs: Runs, whole: Path) -> None:
    with running_proxy(runs.store, lambda method, path: "plain") as plain:
        killed = runs.run("first", proxy=plain, failpoints="mid-sample:kill:shard=1:step=3")
        assert killed.exit_code == -signal.SIGKILL, killed.output
        ended = runs.run("second", proxy=plain)
        assert (ended.exit_code, ended.steps[0]) == (3, (1, 3)), ended.output
    check_same(runs, whole)


@pytest.mark.slow
def test_after_an_outage_the_same_command_finishes_the_run(runs: Runs, whole: Path) -> None:
    down: list[str] = []

    def rule(method: str, path: str) -> int | None:
        if "/data/" in path and method == "PUT":
            down.append(path)
        return 503 if down else None

    few_tries = SHORT_TIMES | {"stylemill.store.object_store.requests:TRIES": 3}
    with running_proxy(runs.store, rule) as unavailable:
        failed = runs.run("first", runs.job, "--set", "retries=0", proxy=unavailable, constants=few_tries)
    assert failed.exit_code == 1, failed.output
    assert "the same command resumes" in failed.output
    assert "Traceback" not in failed.output
    ended = runs.run("first", runs.job, "--set", "retries=0")
    assert ended.exit_code == 3, ended.output
    check_same(runs, whole)


def test_a_stopped_driver_loses_its_lock_and_changes_nothing_when_it_continues(runs: Runs, whole: Path) -> None:
    environment = runs.environment("first", failpoints="before-record:stop:shard=1")
    stopped = runs.commands.start(runs.uri, runs.job, faults=environment, constants=SHORT_TIMES)
    try:
        until(lambda: _state(stopped.process.pid) == "T")
        ended = runs.run("second")
        assert ended.exit_code == 3, ended.output
        before = runs.store.objects(runs.name)
        check_same(runs, whole)
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)
    late = stopped.ended()
    assert late.exit_code == 1, late.output
    assert "another run has taken over" in late.output
    assert runs.store.objects(runs.name) == before


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_a_second_driver_is_refused_until_the_first_one_is_dead(runs: Runs, whole: Path) -> None:
    """The first driver hangs, but still renews its lock."""
    environment = runs.environment("first", failpoints="mid-sample:hang:shard=1:step=3")
    long_lock = SHORT_TIMES | {"stylemill.store.object_store.lock:STALE_SECONDS": 60.0}
    first = runs.commands.start(runs.uri, runs.job, faults=environment, constants=long_lock)
    try:
        until(lambda: "checkpoints/00001" in " ".join(runs.store.names(runs.name)))
        assert f"pid {first.process.pid} on host" in str(status(runs.uri).worked_on_by)
        refused = runs.run("second", constants=long_lock)
        assert refused.exit_code == 1, refused.output
        assert f"another run works in this folder: pid {first.process.pid}" in refused.output
    finally:
        os.kill(first.process.pid, signal.SIGKILL)
    assert first.ended().exit_code == -signal.SIGKILL
    second = runs.run("second")
    assert second.exit_code == 3, second.output
    assert second.steps[0][0] == 1
    check_same(runs, whole)


@pytest.mark.slow
def test_failed_rows_are_retried_and_damage_is_repaired(
    commands: ForkedCommands, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    runs = Runs(write_job(folder), commands, store, tmp_path)
    use_environment(runs.environment("reader"), monkeypatch)
    assert runs.run("first").exit_code == 3
    (folder / "absent.png").write_bytes((folder / "street.png").read_bytes())
    killed = runs.run("first", "retry-failed", failpoints="mid-sample:kill:shard=1:step=3")
    assert killed.exit_code == -signal.SIGKILL, killed.output
    retried = runs.run("second", "retry-failed")
    assert (retried.exit_code, retried.steps[0]) == (0, (1, 3)), retried.output
    assert "7 of 7 images done, 0 failed" in retried.output
    assert verify(runs.uri, deep=True).problems == []
    whole = runs.store.objects(runs.name)
    data = sorted(name for name in whole if name.startswith("data/"))
    assert ["-r1-" in name for name in data] == [False, False, True, False]

    broken = bytearray(whole[data[0]])
    broken[100] ^= 1
    runs.store.put(f"{runs.name}/{data[0]}", bytes(broken))
    runs.store.remove(f"{runs.name}/records/00002.json")
    repaired = runs.run("third", "repair")
    assert repaired.exit_code == 0, repaired.output
    assert {shard for shard, _ in repaired.steps} == {0}, "the files of shard 2 were valid"
    after = runs.store.objects(runs.name)
    quarantined = [after.pop(name) for name in list(after) if name.startswith("quarantine/")]
    assert bytes(broken) in quarantined
    assert {name: after[name] for name in data} == {name: whole[name] for name in data}
    assert sorted(after) == sorted(whole)
    assert verify(runs.uri, deep=True).problems == []


@pytest.mark.slow
def test_a_run_on_ray_with_a_killed_worker(runs: Runs, whole: Path) -> None:
    environment = runs.environment("first", failpoints="mid-sample:kill:shard=1:step=3")
    ended = subprocess.run(
        [sys.executable, fake_engine_ray.__file__, "run", runs.job, "--output", runs.uri, "--workers", "2"],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 3, ended.stdout
    assert "died" in ended.stdout
    check_same(runs, whole)
