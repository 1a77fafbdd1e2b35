"""The store on S3: commits, uploads, the lock and `verify`, with stores that fail, killed processes and late ones."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s3_store import BUCKET, ObjectStore, Proxy, every_nth, first_requests, running_proxy, serving_s3, use_environment
from store_shards import FINGERPRINT, ROWS, attempt, in_child, retry_attempt
from stylemill.cli import main
from stylemill.errors import LockedError, OutputError, StorageError
from stylemill.store import checkpoints
from stylemill.store.commit import clean, commit, confirm
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock, lock_holder
from stylemill.store.object_store import bucket, requests
from stylemill.store.object_store import lock as bucket_lock
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.run_file import RunFile, create_run_folder, refuse_foreign_files
from stylemill.store.verify import verify


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serving_s3() as store:
        yield store


@pytest.fixture
def use_machine(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that gives this process the environment of a machine, which may reach the store through a proxy."""

    def use_machine(machine: str, proxy: Proxy | None = None) -> None:
        use_environment(store.environment(tmp_path / machine, proxy.url if proxy else None), monkeypatch)

    monkeypatch.setattr(requests, "PAUSE", 0.001)
    use_machine("first")
    return use_machine


@pytest.fixture
def paths(store: ObjectStore, tmp_path: Path, use_machine: object) -> RunPaths:
    """A run folder of two shards, of 4 rows each."""
    return run_folder(store, tmp_path.name)


def run_folder(store: ObjectStore, name: str, shards: int = 2) -> RunPaths:
    paths = RunPaths(Path(f"s3://{BUCKET}/{name}"), shards)
    create_run_folder(paths)
    file = RunFile({}, FINGERPRINT, shards * ROWS, shards, ROWS, {"manifest": "pairs.parquet"}, {})
    store.put(f"{name}/job.json", file.to_bytes())
    return paths


def run_key(paths: RunPaths) -> str:
    assert isinstance(paths.output, BucketPath)
    return paths.output.key


def commit_and_confirm(paths: RunPaths, name: str, shard: int = 0, **options: object) -> Record:
    """Commit a shard as a worker does, and confirm it as the driver does."""
    return confirm(paths, commit(paths, *attempt(paths, name, shard, **options)))  # type: ignore[arg-type]


def read_ledger(paths: RunPaths) -> Ledger:
    ledger = Ledger(paths)
    ledger.refresh()
    return ledger


# --- a store that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("treatment", [503, 500, "lost", "slow"])
def test_requests_to_a_store_that_sometimes_fails_are_retried(
    store: ObjectStore, paths: RunPaths, use_machine: Callable[..., None], treatment: int | str
) -> None:
    with running_proxy(store, every_nth(3, treatment)) as lossy:
        use_machine("first", lossy)
        with RunLock(paths):
            for shard in range(2):
                commit_and_confirm(paths, f"a{shard}", shard, failed=[shard * ROWS])
            clean(paths)
        assert lossy.treated > 10
        assert verify(paths.output, deep=True).problems == []
    use_machine("first")
    assert sorted(store.objects(run_key(paths))) == sorted(
        ["job.json", "records/00000.json", "records/00001.json", *committed_files(paths)]
    )


def committed_files(paths: RunPaths) -> list[str]:
    return [entry.name for record in read_ledger(paths).records() for entry in record.files]


def test_a_request_without_a_response_is_retried(
    store: ObjectStore, paths: RunPaths, use_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "TIMEOUT", 0.3)
    with running_proxy(store, first_requests(1, "silent", "PUT")) as silent:
        use_machine("first", silent)
        commit_and_confirm(paths, "a0")
        assert [method for method, _ in silent.requests].count("PUT") == 3, "the data twice, the record once"
    assert read_ledger(paths).has_record(0, 0)


def test_pauses_between_tries_grow_up_to_a_limit_and_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise ConnectionError("refused")

    first, second = list[float](), list[float]()
    for pauses in (first, second):
        monkeypatch.setattr(time, "sleep", pauses.append)
        with pytest.raises(StorageError, match="refused"):
            requests.send(refuse, BUCKET, "key")
    assert first != second
    assert len(first) == requests.TRIES - 1, "no pause after the last try"
    for number, pause in enumerate(first):
        longest = min(requests.PAUSE * 2**number, requests.LONGEST_PAUSE)
        assert longest / 2 <= pause <= longest


def test_an_outage_leaves_the_shard_open_and_no_record(
    store: ObjectStore, paths: RunPaths, use_machine: Callable[..., None]
) -> None:
    with running_proxy(store, lambda method, path: 503 if method == "PUT" else None) as down:
        use_machine("first", down)
        with pytest.raises(StorageError, match=r"data/train-00000.*the same command resumes"):
            commit_and_confirm(paths, "a0")
        assert len(down.requests) >= requests.TRIES
    assert list(store.objects(run_key(paths))) == ["job.json"]
    assert not list(paths.tmp.iterdir()), "files that were not uploaded are removed"
    use_machine("first")
    assert commit_and_confirm(paths, "a1").attempt == "a1"


# --- multipart uploads ------------------------------------------------------------------------------------------------

LARGE = 3 * (5 << 20) + 17


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)  # the minimum of S3
    file = tmp_path / "large"
    file.write_bytes(np.random.default_rng(0).bytes(LARGE))
    return file


def test_large_files_are_uploaded_and_downloaded_in_parts(
    store: ObjectStore, paths: RunPaths, large: Path, tmp_path: Path
) -> None:
    target = paths.data_folder / "large"
    assert isinstance(target, BucketPath)
    target.bucket.upload(large, target.key)
    assert "-4" in store.client.head_object(Bucket=BUCKET, Key=target.key)["ETag"], "four parts"
    assert target.bucket.download(target.key, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()


def test_a_killed_upload_leaves_no_visible_object(
    store: ObjectStore, paths: RunPaths, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEMILL_FAILPOINTS", "mid-publish:kill:hit=2:folder=data")
    monkeypatch.setenv("STYLEMILL_FAILPOINTS_STATE", str(tmp_path))
    target = paths.data_folder / "large"
    assert isinstance(target, BucketPath)
    assert in_child(lambda: target.bucket.upload(large, target.key)) == -signal.SIGKILL
    assert store.uploads() == [target.key], "its parts are left to a lifecycle rule"
    assert not target.exists()
    assert list(store.objects(run_key(paths))) == ["job.json"]
    upload = store.client.list_multipart_uploads(Bucket=BUCKET)["Uploads"][0]
    store.client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])


def test_the_parts_of_a_failed_upload_are_removed(
    store: ObjectStore, paths: RunPaths, large: Path, use_machine: Callable[..., None]
) -> None:
    with running_proxy(store, lambda method, path: 503 if "partNumber=3" in path else None) as broken:
        use_machine("first", broken)
        target = paths.data_folder / "large"
        assert isinstance(target, BucketPath)
        with pytest.raises(StorageError, match="data/large"):
            target.bucket.upload(large, target.key)
    assert store.uploads() == []


# --- commits, late workers --------------------------------------------------------------------------------------------


def test_a_shard_is_not_committed_before_the_driver_confirms_it(store: ObjectStore, paths: RunPaths) -> None:
    record = commit(paths, *attempt(paths, "worker"))
    assert read_ledger(paths).totals().shards == 0
    assert verify(paths.output).problems == ["shards 0, 1 are not committed yet; the same run command resumes"]
    assert confirm(paths, record) == record
    assert read_ledger(paths).totals().rows_ok == ROWS
    assert confirm(paths, record) == record, "confirming again changes nothing"


def test_a_late_attempt_changes_nothing(store: ObjectStore, paths: RunPaths) -> None:
    late = attempt(paths, "late", model="other bytes")
    first, _ = commit_and_confirm(paths, "a0"), commit_and_confirm(paths, "a1", 1)
    before = store.objects(run_key(paths))
    assert commit(paths, *late) == first, "it gets the committed record"
    assert store.objects(run_key(paths)) == before


def test_files_that_a_late_worker_uploads_never_count(store: ObjectStore, paths: RunPaths) -> None:
    """The worker looked for a record before the other attempt published one. No driver waits for what it returns."""
    late = commit(paths, *attempt(paths, "late", model="other bytes"))
    first, _ = commit_and_confirm(paths, "a0"), commit_and_confirm(paths, "a1", 1)
    assert confirm(paths, late) == first, "a driver cannot confirm it either"
    assert [record.attempt for record in read_ledger(paths).records()] == ["a0", "a1"]
    (problem,) = verify(paths.output).problems
    assert problem.startswith("data/ has 1 file that is not the run's")
    clean(paths)
    assert verify(paths.output, deep=True).problems == []
    assert len(store.objects(f"{run_key(paths)}/data")) == 2


def test_two_attempts_with_the_same_bytes_share_one_file(store: ObjectStore, paths: RunPaths) -> None:
    commit(paths, *attempt(paths, "killed before its driver confirmed it"))
    commit_and_confirm(paths, "a0")
    assert len(store.objects(f"{run_key(paths)}/data")) == 1


def test_record_files_are_compacted_into_a_segment(store: ObjectStore, paths: RunPaths) -> None:
    for shard in range(2):
        commit_and_confirm(paths, f"a{shard}", shard, failed=[shard * ROWS])
    ledger = read_ledger(paths)
    before = ledger.totals()
    assert compact(paths, ledger, min_records=2)
    (segment,) = store.objects(f"{run_key(paths)}/records")
    assert segment.startswith("compact-000000-")
    assert read_ledger(paths).totals() == ledger.totals() == before
    retried = confirm(paths, commit(paths, *retry_attempt(paths, [0])))
    assert (retried.generation, read_ledger(paths).totals().rows_ok) == (1, before.rows_ok + 1)
    assert verify(paths.output, deep=True).problems == []


def test_a_store_without_conditional_puts_works_too(
    store: ObjectStore, paths: RunPaths, use_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_lock, "POLL_SECONDS", 0.01)
    for rule in (plain, refuses_conditions):
        with running_proxy(store, rule) as simple:
            use_machine("first", simple)
            with RunLock(paths):
                assert not paths.output.bucket.conditional_puts  # type: ignore[attr-defined]
                first = commit_and_confirm(paths, "a0")
                assert confirm(paths, replace(first, attempt="another")) == first
                assert not paths.output.bucket.create(f"{run_key(paths)}/job.json", b"of another job")  # type: ignore[attr-defined]
                use_machine("second", simple)
                with monkeypatch.context() as patch:
                    patch.setattr(bucket_lock, "RENEW_SECONDS", 0.02)
                    with pytest.raises(LockedError):
                        enter_lock(paths)
            use_machine("first", simple)
            assert lock_holder(paths) is None


def plain(method: str, path: str) -> str:
    return "plain"


def refuses_conditions(method: str, path: str) -> int | str:
    return 501 if "probe" in path and method == "PUT" else "plain"


# --- the lock ---------------------------------------------------------------------------------------------------------


def enter_lock(paths: RunPaths) -> None:
    with RunLock(paths):
        pass


@pytest.fixture
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(bucket_lock, "POLL_SECONDS", 0.02)


@pytest.mark.usefixtures("short_intervals")
def test_a_second_driver_is_refused_while_the_first_one_is_alive(
    paths: RunPaths, use_machine: Callable[..., None]
) -> None:
    this_process = f"pid {os.getpid()} on host {socket.gethostname()}"
    assert lock_holder(paths) is None
    with RunLock(paths):
        assert lock_holder(paths) == this_process
        with pytest.raises(LockedError, match=rf"s3://{BUCKET}/.*another run works in this folder: {this_process}"):
            enter_lock(paths)  # on the same machine
        use_machine("second")
        with pytest.raises(LockedError, match=this_process):
            enter_lock(paths)
        use_machine("first")
    assert lock_holder(paths) is None
    assert not paths.lock.exists()


def kill_while_locked(paths: RunPaths) -> None:
    def driver() -> None:
        with RunLock(paths):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(driver) == -signal.SIGKILL
    assert paths.lock.exists()


def test_the_lock_of_a_dead_driver_is_taken_over_at_once_on_the_same_machine(paths: RunPaths) -> None:
    kill_while_locked(paths)
    with RunLock(paths):
        pass
    assert not paths.lock.exists()


@pytest.mark.usefixtures("short_intervals")
def test_the_lock_of_a_dead_driver_is_taken_over_on_another_machine_when_it_is_stale(
    paths: RunPaths, use_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_while_locked(paths)
    assert lock_holder(paths), "the lock is not stale yet"
    monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 1.0)
    use_machine("second")
    with RunLock(paths):
        assert lock_holder(paths)
    assert not paths.lock.exists()


def test_a_driver_that_lost_its_lock_writes_and_deletes_nothing(
    store: ObjectStore, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver was stopped, and meanwhile another driver started and ended."""
    record = commit(paths, *attempt(paths, "stopped"))
    with RunLock(paths):
        store.put(f"{run_key(paths)}/lock", b"{}")  # of the other driver
        monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 0.0)  # a renewal is overdue
        for work in (lambda: confirm(paths, record), lambda: paths.job.unlink()):
            with pytest.raises(LockedError, match="another run has taken over"):
                work()
    assert {"lock", "job.json"} < store.objects(run_key(paths)).keys(), "nor is the lock of the other driver removed"
    assert read_ledger(paths).totals().shards == 0
    store.remove(f"{run_key(paths)}/lock")


def _record_file(paths: RunPaths, large: Path) -> None:
    confirm(paths, commit(paths, *attempt(paths, "a0")))


def _part_of_a_file(paths: RunPaths, large: Path) -> None:
    target = paths.data_folder / "large"
    assert isinstance(target, BucketPath)
    target.bucket.upload(large, target.key)


def _removal(paths: RunPaths, large: Path) -> None:
    paths.job.unlink()


@pytest.mark.parametrize(
    ("work", "method", "name"),
    [
        (_record_file, "PUT", "records/00000.json"),
        (_part_of_a_file, "PUT", "partNumber=2"),
        (_removal, "DELETE", "job.json"),
    ],
)
def test_a_lock_that_is_lost_between_two_tries_of_a_request_stops_the_second(
    store: ObjectStore,
    paths: RunPaths,
    large: Path,
    use_machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[RunPaths, Path], None],
    method: str,
    name: str,
) -> None:
    monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 0.0)  # a renewal is always overdue
    tries: list[str] = []

    def rule(request_method: str, path: str) -> int | None:
        if request_method != method or name not in path:
            return None
        tries.append(path)
        store.put(f"{run_key(paths)}/lock", b"{}")  # of another driver
        return 503 if len(tries) == 1 else None

    with running_proxy(store, rule) as proxy:
        use_machine("first", proxy)
        with pytest.raises(LockedError, match="another run has taken over"), RunLock(paths):
            work(paths, large)
    assert len(tries) == 1
    assert store.get(f"{run_key(paths)}/job.json")
    assert "records/00000.json" not in store.names(run_key(paths))
    assert not store.uploads()


def test_a_driver_that_was_stopped_continues_if_it_still_has_the_lock(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLock(paths):
        monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 0.0)
        assert commit_and_confirm(paths, "a0").attempt == "a0"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_on_the_store_and_the_newest_undamaged_one_is_loaded(
    store: ObjectStore, paths: RunPaths, use_machine: Callable[..., None]
) -> None:
    meta = {"fingerprint": FINGERPRINT}
    inputs = checkpoints.save_inputs(paths, 0, "a0", {"latent": np.ones(3)}, meta)
    for step in (2, 4, 6):
        checkpoints.save_progress(paths, 0, step, "a0", {"z": np.full(3, step)}, meta, inputs)
    use_machine("second")
    assert checkpoints.newest_step(paths, 0) == 6
    kept = [name for name in store.objects(f"{run_key(paths)}/checkpoints") if "progress" in name]
    assert len(kept) == 2, "the newest and the one before"
    newest = f"{run_key(paths)}/checkpoints/{kept[-1]}"
    store.put(newest, store.get(newest)[:-1])
    checkpoint = checkpoints.load(paths, 0, meta)
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert (checkpoint.arrays["z"].tolist(), checkpoint.inputs["latent"].tolist()) == ([4.0] * 3, [1.0] * 3)
    quarantined = store.objects(f"{run_key(paths)}/quarantine")
    assert len(quarantined) == 2, "the damaged file, and the reason"
    assert any("truncated" in reason.decode(errors="replace") for reason in quarantined.values())
    checkpoints.clear(paths, 0)
    assert not store.objects(f"{run_key(paths)}/checkpoints")


# --- verify -----------------------------------------------------------------------------------------------------------

Damage = Callable[[ObjectStore, RunPaths, Record], object]


def key(paths: RunPaths, name: str) -> str:
    return f"{run_key(paths)}/{name}"


def flip_bit(store: ObjectStore, name: str, position: int = 60) -> None:
    data = bytearray(store.get(name))
    data[position] ^= 1
    store.put(name, bytes(data))


def data_key(paths: RunPaths, record: Record) -> str:
    assert record.data is not None
    return key(paths, record.data.name)


def forge(store: ObjectStore, paths: RunPaths, record: Record, **changes: object) -> None:
    store.put(key(paths, "records/00001.json"), replace(record, **changes).to_bytes())  # type: ignore[arg-type]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "flipped byte": (lambda store, paths, record: flip_bit(store, data_key(paths, record)), "SHA-256 differs"),
    "missing file": (lambda store, paths, record: store.remove(data_key(paths, record)), "train-00001.* is missing"),
    "other size": (lambda store, paths, record: store.put(data_key(paths, record), b"short"), "has 5 bytes, not"),
    "extra file": (
        lambda store, paths, record: store.put(data_key(paths, record).replace("-of-", "-0f-"), b"extra"),
        "data/ has 1 file that is not the run's",
    ),
    "edited record": (
        lambda store, paths, record: flip_bit(store, key(paths, "records/00001.json")),
        "records/00001.json: the record",
    ),
    "missing record": (
        lambda store, paths, record: store.remove(key(paths, "records/00001.json")),
        "shard 1 is not committed yet",
    ),
    "wrong count": (
        lambda store, paths, record: forge(store, paths, record, rows_ok=3),
        "contradict each other",
    ),
    "record of another job": (
        lambda store, paths, record: forge(store, paths, record, fingerprint="0" * 64),
        "belongs to another job",
    ),
    "leftover checkpoint": (
        lambda store, paths, record: store.put(key(paths, "checkpoints/00001/x"), b""),
        "checkpoints/ has 1 file that",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damage_and_changes_nothing(store: ObjectStore, paths: RunPaths, damage: str) -> None:
    commit_and_confirm(paths, "a0", 0, failed=[1])
    record = commit_and_confirm(paths, "a1", 1)
    clean(paths)
    assert verify(paths.output, deep=True).problems == []
    apply, problem = DAMAGES[damage]
    apply(store, paths, record)
    before = store.objects(run_key(paths))
    report = verify(paths.output, deep=True)
    assert not report.ok
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(report.describe())
    assert store.objects(run_key(paths)) == before


def test_a_damaged_record_is_quarantined_and_its_shard_is_open_again(store: ObjectStore, paths: RunPaths) -> None:
    commit_and_confirm(paths, "a0", 0)
    flip_bit(store, key(paths, "records/00000.json"))
    with RunLock(paths):
        assert read_ledger(paths).open_shards(2) == [0, 1]
        assert commit_and_confirm(paths, "a1", 0).attempt == "a1"
    assert [name.split(".")[0] for name in store.objects(key(paths, "quarantine"))] == ["records-00000"] * 2
    assert len(store.objects(key(paths, "data"))) == 1, "the same bytes again"


# --- errors that the user has to fix ----------------------------------------------------------------------------------


def test_a_missing_bucket_is_named(use_machine: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "s3://nowhere/run"]) == 2
    assert "s3://nowhere/run/job.json: there is no bucket nowhere; create it" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_a_missing_right_is_found_before_any_work(
    store: ObjectStore, paths: RunPaths, use_machine: Callable[..., None], method: str
) -> None:
    with running_proxy(store, lambda request_method, path: 403 if request_method == method else None) as strict:
        use_machine("first", strict)
        with pytest.raises(OutputError, match=r"the store refuses access \(AccessDenied\); give this machine"):
            enter_lock(paths)
        assert len(strict.requests) < requests.TRIES, "it is not retried"


def test_missing_credentials_are_named(
    store: ObjectStore, use_machine: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert main(["status", f"s3://{BUCKET}/run"]) == 2
    assert "no credentials were found" in capsys.readouterr().err


def test_a_folder_with_other_objects_is_refused(store: ObjectStore, use_machine: object) -> None:
    store.put("photos/cat.png", b"a cat")
    with pytest.raises(OutputError, match=r"s3://runs/photos: holds other files \(cat.png\) and no run"):
        refuse_foreign_files(RunPaths(Path("s3://runs/photos"), 1))
    refuse_foreign_files(RunPaths(Path("s3://runs/phot"), 1))


def test_a_bucket_path_is_not_used_as_a_local_file(paths: RunPaths) -> None:
    """Code that does not support buckets raises TypeError, and creates no folder named `s3:`."""
    with pytest.raises(TypeError, match=r"s3://runs/.*/job.json is not a local file"):
        os.stat(paths.job)
    assert str(paths.job).startswith("s3://runs/")
    assert paths.job.read_bytes()


def test_a_probe_object_of_a_killed_run_is_removed_when_the_run_is_finished(
    store: ObjectStore, paths: RunPaths
) -> None:
    store.put(key(paths, ".stylemill-probe-0"), b"")
    for shard in range(2):
        commit_and_confirm(paths, f"a{shard}", shard)
    clean(paths)
    assert ".stylemill-probe-0" not in store.objects(run_key(paths))
