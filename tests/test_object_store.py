"""Whole runs on S3: the same images as on a disk, whatever is killed, and whichever machine goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from demo_job import EVERY_STEPS, Ended, Warm, lasting, until, write_job
from s3_store import BUCKET, Gate, Store, every, gate, here, serving_s3
from store_shards import files
from stylemill.report.status import status
from stylemill.store.paths import RunPaths
from stylemill.store.verify import verify

BRISK = {"stylemill.store.object_store.bucket:PAUSE": 0.01, "stylemill.store.object_store.lock:LOOK": 0.1}
# A dead driver's lock is taken over after a second, a living one's is renewed ten times in that.
HASTY = BRISK | {"stylemill.store.object_store.lock:STALE": 1.0, "stylemill.store.object_store.lock:BEAT": 0.1}


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving_s3() as store:
        yield store


class Runs:
    """Runs one job on s3://runs/NAME, on machines that share nothing but the store."""

    def __init__(self, job: Path, warm: Warm, store: Store, folder: Path) -> None:
        self.job = job
        self.warm = warm
        self.store = store
        self.folder = folder
        self.name = folder.name
        self.uri = f"s3://{BUCKET}/{self.name}"

    def environment(self, machine: str, through: Gate | None = None, faults: str = "") -> dict[str, str]:
        hits = self.folder / "faults"
        hits.mkdir(exist_ok=True)
        injected = {"STYLEMILL_FAILPOINTS": faults, "STYLEMILL_FAILPOINTS_STATE": str(hits)} if faults else {}
        return self.store.environment(self.folder / machine, through.url if through else None) | injected

    def run(
        self,
        machine: str,
        *arguments: object,
        through: Gate | None = None,
        faults: str = "",
        constants: dict[str, object] | None = None,
    ) -> Ended:
        environment = self.environment(machine, through, faults)
        return self.warm.run(self.uri, *(arguments or [self.job]), faults=environment, constants=constants or HASTY)


@pytest.fixture
def runs(job: Path, warm: Warm, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(job, warm, store, tmp_path)
    here(made.environment("reader"), monkeypatch)
    return made


def check_same(runs: Runs, whole: Path) -> None:
    """The run is finished, holds what `whole` holds, and nothing else."""
    found, expected = runs.store.objects(runs.name), files(whole)
    paths = RunPaths(Path(runs.uri), len([name for name in expected if name.startswith("records/")]))
    named = {}
    for name, data in expected.items():
        if name.startswith("records/"):
            ours, theirs = lasting(found[name]), lasting(data)
            for kind in ("data", "failures"):
                if theirs[kind]:
                    final = paths.committed(paths.output / theirs[kind]["name"], theirs[kind]["sha256"])
                    named[theirs[kind]["name"]] = theirs[kind]["name"] = paths.relative(final)
            assert ours == theirs
    assert sorted(found) == sorted(named.get(name, name) for name in expected)
    for name, data in expected.items():
        if not name.startswith(("records/", "job.json")):
            assert found[named.get(name, name)] == data, name
    report = verify(runs.uri, deep=True)
    assert report.ok, report.problems


def test_a_run_on_s3_is_the_run_on_a_disk(runs: Runs, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with gate(runs.store) as seen:
        ended = runs.run("first", through=seen)
    assert ended.exit_code == 3, ended.output
    assert f'load_dataset("parquet", data_files="{runs.uri}/data/*.parquet", split="train")' in ended.output
    check_same(runs, whole)
    assert "finished" in status(runs.uri).describe()
    again = runs.run("second")
    assert (again.exit_code, again.steps) == (3, []), again.output
    assert not list((runs.folder / "first").glob("*/tmp/*")), "a machine keeps nothing unfinished"
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
def test_another_machine_goes_on_from_what_is_on_the_store(
    runs: Runs, whole: Path, place: str, resumes: list[tuple[int, int]]
) -> None:
    """Nothing but the store is left of the first one; no more than the checkpoint interval is sampled again."""
    killed = runs.run("first", faults=place)
    assert killed.exit_code == -signal.SIGKILL, killed.output
    went_on = runs.run("second")
    assert went_on.exit_code == 3, went_on.output
    assert went_on.steps[:1] == resumes
    repeated = [step for step in killed.steps if step in went_on.steps]
    assert len(repeated) <= EVERY_STEPS
    check_same(runs, whole)


@pytest.mark.slow
def test_a_whole_run_over_a_lossy_store(runs: Runs, whole: Path) -> None:
    """Every seventh request is refused, lost or late; on the way, the driver is killed."""
    kinds = [503, "lost", "slow"]
    rules = [every(7 * len(kinds) + 2 * number, kind) for number, kind in enumerate(kinds)]

    def rule(method: str, path: str) -> int | str | None:
        return next((found for found in [rule(method, path) for rule in rules] if found), None)

    with gate(runs.store, rule) as lossy:
        killed = runs.run("first", through=lossy, faults="mid-sample:kill:shard=1:step=3")
        assert killed.exit_code == -signal.SIGKILL, killed.output
        ended = runs.run("second", through=lossy)
        assert ended.exit_code == 3, ended.output
        assert lossy.treated > 5
    check_same(runs, whole)


@pytest.mark.slow
def test_a_whole_run_on_a_store_without_conditional_puts(runs: Runs, whole: Path) -> None:
    with gate(runs.store, lambda method, path: "plain") as plain:
        killed = runs.run("first", through=plain, faults="mid-sample:kill:shard=1:step=3")
        assert killed.exit_code == -signal.SIGKILL, killed.output
        ended = runs.run("second", through=plain)
        assert (ended.exit_code, ended.steps[0]) == (3, (1, 3)), ended.output
    check_same(runs, whole)


@pytest.mark.slow
def test_an_outage_leaves_the_run_open_and_the_same_command_finishes_it(runs: Runs, whole: Path) -> None:
    down: list[str] = []

    def rule(method: str, path: str) -> int | None:
        if "/data/" in path and method == "PUT":
            down.append(path)
        return 503 if down else None

    short = HASTY | {"stylemill.store.object_store.bucket:TRIES": 3}
    with gate(runs.store, rule) as gone:
        failed = runs.run("first", runs.job, "--set", "retries=0", through=gone, constants=short)
    assert failed.exit_code == 1, failed.output
    assert "the same command resumes" in failed.output
    assert "Traceback" not in failed.output
    ended = runs.run("first", runs.job, "--set", "retries=0")
    assert ended.exit_code == 3, ended.output
    check_same(runs, whole)


def test_a_stopped_driver_is_taken_over_and_harms_nothing_when_it_comes_back(runs: Runs, whole: Path) -> None:
    environment = runs.environment("first", faults="before-record:stop:shard=1")
    stopped = runs.warm.start(runs.uri, runs.job, faults=environment, constants=HASTY)
    try:
        until(lambda: _state(stopped.process.pid) == "T")
        ended = runs.run("second")
        assert ended.exit_code == 3, ended.output
        before = runs.store.objects(runs.name)
        check_same(runs, whole)
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)
    zombie = stopped.ended()
    assert zombie.exit_code == 1, zombie.output
    assert "another has taken over" in zombie.output
    assert runs.store.objects(runs.name) == before


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_a_second_driver_is_refused_while_the_first_one_lives_and_takes_over_when_it_died(
    runs: Runs, whole: Path
) -> None:
    """The first one hangs, and goes on renewing its lock."""
    environment = runs.environment("first", faults="mid-sample:hang:shard=1:step=3")
    patient = HASTY | {"stylemill.store.object_store.lock:STALE": 60.0}
    first = runs.warm.start(runs.uri, runs.job, faults=environment, constants=patient)
    try:
        until(lambda: "checkpoints/00001" in " ".join(runs.store.objects(runs.name)))
        assert f"pid {first.process.pid} on host" in str(status(runs.uri).worked_on_by)
        refused = runs.run("second", constants=patient)
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
def test_failed_rows_are_tried_again_and_damage_is_repaired(
    warm: Warm, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    runs = Runs(write_job(folder), warm, store, tmp_path)
    here(runs.environment("reader"), monkeypatch)
    assert runs.run("first").exit_code == 3
    (folder / "absent.png").write_bytes((folder / "street.png").read_bytes())
    killed = runs.run("first", "retry-failed", faults="mid-sample:kill:shard=1:step=3")
    assert killed.exit_code == -signal.SIGKILL, killed.output
    tried = runs.run("second", "retry-failed")
    assert (tried.exit_code, tried.steps[0]) == (0, (1, 3)), tried.output
    assert "7 of 7 images done, 0 failed" in tried.output
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
    assert {shard for shard, _ in repaired.steps} == {0}, "the other's files were whole"
    after = runs.store.objects(runs.name)
    aside = [after.pop(name) for name in list(after) if name.startswith("quarantine/")]
    assert bytes(broken) in aside
    assert {name: after[name] for name in data} == {name: whole[name] for name in data}
    assert sorted(after) == sorted(whole)
    assert verify(runs.uri, deep=True).problems == []


@pytest.mark.slow
def test_two_workers_on_ray_of_which_one_is_killed(runs: Runs, whole: Path) -> None:
    from demo_job import stylemill

    environment = runs.environment("first", faults="mid-sample:kill:shard=1:step=3")
    with pytest.MonkeyPatch.context() as patch:
        here(environment, patch)
        code, output = stylemill("run", runs.job, "--output", runs.uri, "--workers", 2)
    assert code == 3, output
    assert "died" in output
    check_same(runs, whole)
