"""The store on S3: what a busy, lossy or simple store, a kill or a late process does, and what must come of it."""

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

from s3_store import BUCKET, Gate, Store, every, gate, here, serving_s3, times
from store_shards import FINGERPRINT, ROWS, attempt, in_child, second_try
from stylemill.cli import main
from stylemill.errors import LockedError, OutputError, StorageError
from stylemill.store import checkpoints
from stylemill.store.commit import clean, commit, confirm
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock, lock_holder
from stylemill.store.object_store import bucket
from stylemill.store.object_store import lock as bucket_lock
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.run_file import RunFile, create_run_folder, refuse_foreign_files
from stylemill.store.verify import verify


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving_s3() as store:
        yield store


@pytest.fixture
def enter(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Be a machine; the second argument is the gate that it asks through."""

    def enter(machine: str, through: Gate | None = None) -> None:
        here(store.environment(tmp_path / machine, through.url if through else None), monkeypatch)

    monkeypatch.setattr(bucket, "PAUSE", 0.001)
    enter("first")
    return enter


@pytest.fixture
def paths(store: Store, tmp_path: Path, enter: object) -> RunPaths:
    """A run folder of two shards, of 4 rows each."""
    return run_folder(store, tmp_path.name)


def run_folder(store: Store, name: str, shards: int = 2) -> RunPaths:
    paths = RunPaths(Path(f"s3://{BUCKET}/{name}"), shards)
    create_run_folder(paths)
    file = RunFile({}, FINGERPRINT, shards * ROWS, shards, ROWS, {"manifest": "pairs.parquet"}, {})
    store.put(f"{name}/job.json", file.to_bytes())
    return paths


def folder(paths: RunPaths) -> str:
    assert isinstance(paths.output, BucketPath)
    return paths.output.key


def done(paths: RunPaths, name: str, shard: int = 0, **how: object) -> Record:
    """A worker commits, and the driver confirms."""
    return confirm(paths, commit(paths, *attempt(paths, name, shard, **how)))  # type: ignore[arg-type]


def settled(paths: RunPaths) -> Ledger:
    ledger = Ledger(paths)
    ledger.refresh()
    return ledger


# --- a store that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("treatment", [503, 500, "lost", "slow"])
def test_a_store_that_fails_now_and_then_costs_nothing(
    store: Store, paths: RunPaths, enter: Callable[..., None], treatment: int | str
) -> None:
    with gate(store, every(3, treatment)) as lossy:
        enter("first", lossy)
        with RunLock(paths):
            for shard in range(2):
                done(paths, f"a{shard}", shard, failed=[shard * ROWS])
            clean(paths)
        assert lossy.treated > 10
        assert verify(paths.output, deep=True).problems == []
    enter("first")
    assert sorted(store.objects(folder(paths))) == sorted(
        ["job.json", "records/00000.json", "records/00001.json", *committed(paths)]
    )


def committed(paths: RunPaths) -> list[str]:
    return [entry.name for record in settled(paths).records() for entry in (record.data, record.failures) if entry]


def test_a_silent_store_is_asked_again(
    store: Store, paths: RunPaths, enter: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "TIMEOUT", 0.3)
    with gate(store, times(1, "silent", "PUT")) as slow:
        enter("first", slow)
        done(paths, "a0")
        assert [method for method, _ in slow.asked].count("PUT") == 3, "data twice, the record"
    assert settled(paths).has_record(0, 0)


def test_pauses_grow_are_bounded_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise ConnectionError("refused")

    first, second = list[float](), list[float]()
    for pauses in (first, second):
        monkeypatch.setattr(time, "sleep", pauses.append)
        with pytest.raises(StorageError, match="refused"):
            bucket.Bucket(BUCKET)._retried(refuse, "key")
    assert first != second
    assert len(first) == bucket.TRIES - 1, "none after the last try"
    for number, pause in enumerate(first):
        most = min(bucket.PAUSE * 2**number, bucket.LONGEST_PAUSE)
        assert most / 2 <= pause <= most


def test_an_outage_leaves_the_shard_open_and_no_record(
    store: Store, paths: RunPaths, enter: Callable[..., None]
) -> None:
    with gate(store, lambda method, path: 503 if method == "PUT" else None) as down:
        enter("first", down)
        with pytest.raises(StorageError, match=r"data/train-00000.*the same command resumes"):
            done(paths, "a0")
        assert len(down.asked) >= bucket.TRIES
    assert list(store.objects(folder(paths))) == ["job.json"]
    assert not list(paths.tmp.iterdir()), "what was not uploaded does not stay here either"
    enter("first")
    assert done(paths, "a1").attempt == "a1"


# --- uploads in parts -------------------------------------------------------------------------------------------------

LARGE = 3 * (5 << 20) + 17


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bucket, "PART", 5 << 20)  # the least that S3 takes
    file = tmp_path / "large"
    file.write_bytes(np.random.default_rng(0).bytes(LARGE))
    return file


def test_large_files_go_up_and_come_down_in_parts(store: Store, paths: RunPaths, large: Path, tmp_path: Path) -> None:
    target = paths.data_folder / "large"
    assert isinstance(target, BucketPath)
    target.bucket.upload(large, target.key)
    assert "-4" in store.client.head_object(Bucket=BUCKET, Key=target.key)["ETag"], "four parts"
    assert target.bucket.download(target.key, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()


def test_an_upload_killed_in_the_middle_leaves_nothing_visible(
    store: Store, paths: RunPaths, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEMILL_FAILPOINTS", "mid-publish:kill:hit=2:folder=data")
    monkeypatch.setenv("STYLEMILL_FAILPOINTS_STATE", str(tmp_path))
    target = paths.data_folder / "large"
    assert isinstance(target, BucketPath)
    assert in_child(lambda: target.bucket.upload(large, target.key)) == -signal.SIGKILL
    assert store.uploads() == [target.key], "parts are there, for a lifecycle rule to remove"
    assert not target.exists()
    assert list(store.objects(folder(paths))) == ["job.json"]
    upload = store.client.list_multipart_uploads(Bucket=BUCKET)["Uploads"][0]
    store.client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])


def test_an_upload_that_fails_takes_its_parts_along(
    store: Store, paths: RunPaths, large: Path, enter: Callable[..., None]
) -> None:
    with gate(store, lambda method, path: 503 if "partNumber=3" in path else None) as broken:
        enter("first", broken)
        target = paths.data_folder / "large"
        assert isinstance(target, BucketPath)
        with pytest.raises(StorageError, match="data/large"):
            target.bucket.upload(large, target.key)
    assert store.uploads() == []


# --- commits, zombies -------------------------------------------------------------------------------------------------


def test_nothing_counts_before_the_driver_has_confirmed_it(store: Store, paths: RunPaths) -> None:
    record = commit(paths, *attempt(paths, "worker"))
    assert settled(paths).totals().shards == 0
    assert verify(paths.output).problems == ["shards 0, 1 are not committed yet; the same run command goes on"]
    assert confirm(paths, record) == record
    assert settled(paths).totals().rows_ok == ROWS
    assert confirm(paths, record) == record, "confirming twice is once"


def test_an_attempt_that_comes_too_late_changes_nothing(store: Store, paths: RunPaths) -> None:
    late = attempt(paths, "zombie", model="other bytes")
    first, _ = done(paths, "a0"), done(paths, "a1", 1)
    before = store.objects(folder(paths))
    assert commit(paths, *late) == first, "it learns what stands"
    assert store.objects(folder(paths)) == before


def test_bytes_that_a_zombie_uploads_beside_the_committed_ones_never_count(store: Store, paths: RunPaths) -> None:
    """It looked for a record before the other attempt had one. What it returns, no driver waits for any more."""
    zombies = commit(paths, *attempt(paths, "zombie", model="other bytes"))
    first, _ = done(paths, "a0"), done(paths, "a1", 1)
    assert confirm(paths, zombies) == first, "even an older driver cannot confirm it"
    assert [record.attempt for record in settled(paths).records()] == ["a0", "a1"]
    (problem,) = verify(paths.output).problems
    assert problem.startswith("data/ has 1 files that are not the run's")
    clean(paths)
    assert verify(paths.output, deep=True).problems == []
    assert len(store.objects(f"{folder(paths)}/data")) == 2


def test_the_same_bytes_of_two_attempts_are_one_file(store: Store, paths: RunPaths) -> None:
    commit(paths, *attempt(paths, "killed before its driver confirmed it"))
    done(paths, "a0")
    assert len(store.objects(f"{folder(paths)}/data")) == 1


def test_thousands_of_records_become_a_segment(store: Store, paths: RunPaths) -> None:
    for shard in range(2):
        done(paths, f"a{shard}", shard, failed=[shard * ROWS])
    ledger = settled(paths)
    before = ledger.totals()
    assert compact(paths, ledger, least=2)
    (segment,) = store.objects(f"{folder(paths)}/records")
    assert segment.startswith("compact-000000-")
    assert settled(paths).totals() == ledger.totals() == before
    again = confirm(paths, commit(paths, *second_try(paths, [0])))
    assert (again.generation, settled(paths).totals().rows_ok) == (1, before.rows_ok + 1)
    assert verify(paths.output, deep=True).problems == []


def test_a_store_without_conditional_puts_serves_as_well(
    store: Store, paths: RunPaths, enter: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_lock, "LOOK", 0.01)
    for rule in (plain, refuses_conditions):
        with gate(store, rule) as simple:
            enter("first", simple)
            with RunLock(paths):
                assert not paths.output.bucket.conditional  # type: ignore[attr-defined]
                first = done(paths, "a0")
                zombies = replace(first, attempt="another")
                assert confirm(paths, zombies) == first
                assert not paths.output.bucket.create(f"{folder(paths)}/job.json", b"another job's")  # type: ignore[attr-defined]
                enter("second", simple)
                with monkeypatch.context() as patch:
                    patch.setattr(bucket_lock, "BEAT", 0.02)
                    with pytest.raises(LockedError):
                        refused_or_taken(paths)
            enter("first", simple)
            assert lock_holder(paths) is None


def plain(method: str, path: str) -> str:
    return "plain"


def refuses_conditions(method: str, path: str) -> int | str:
    return 501 if "probe" in path and method == "PUT" else "plain"


# --- the lock ---------------------------------------------------------------------------------------------------------


def refused_or_taken(paths: RunPaths) -> None:
    with RunLock(paths):
        pass


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_lock, "BEAT", 0.05)
    monkeypatch.setattr(bucket_lock, "LOOK", 0.02)


@pytest.mark.usefixtures("brisk")
def test_a_second_driver_is_refused_while_the_first_one_lives(paths: RunPaths, enter: Callable[..., None]) -> None:
    me = f"pid {os.getpid()} on host {socket.gethostname()}"
    assert lock_holder(paths) is None
    with RunLock(paths):
        assert lock_holder(paths) == me
        with pytest.raises(LockedError, match=rf"s3://{BUCKET}/.*another run works in this folder: {me}"):
            refused_or_taken(paths)  # on this machine
        enter("second")
        with pytest.raises(LockedError, match=me):
            refused_or_taken(paths)
        enter("first")
    assert lock_holder(paths) is None
    assert not paths.lock.exists()


def killed_with_the_lock(paths: RunPaths) -> None:
    def driver() -> None:
        with RunLock(paths):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(driver) == -signal.SIGKILL
    assert paths.lock.exists()


def test_the_lock_of_a_dead_driver_is_taken_over_at_once_on_its_machine(paths: RunPaths) -> None:
    killed_with_the_lock(paths)
    with RunLock(paths):
        pass
    assert not paths.lock.exists()


@pytest.mark.usefixtures("brisk")
def test_and_elsewhere_when_it_has_not_been_renewed_for_long(
    paths: RunPaths, enter: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_with_the_lock(paths)
    assert lock_holder(paths), "nobody can tell yet"
    monkeypatch.setattr(bucket_lock, "STALE", 1.0)
    enter("second")
    with RunLock(paths):
        assert lock_holder(paths)
    assert not paths.lock.exists()


def test_a_driver_that_was_taken_over_writes_and_deletes_nothing_more(
    store: Store, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still, and another driver came and went."""
    record = commit(paths, *attempt(paths, "its own"))
    with RunLock(paths):
        store.put(f"{folder(paths)}/lock", b"{}")  # the other's
        monkeypatch.setattr(bucket_lock, "STALE", 0.0)  # the time for a renewal is over
        for work in (lambda: confirm(paths, record), lambda: paths.job.unlink()):
            with pytest.raises(LockedError, match="another has taken over"):
                work()
    assert {"lock", "job.json"} < store.objects(folder(paths)).keys(), "nor does it remove the other's lock"
    assert settled(paths).totals().shards == 0
    store.remove(f"{folder(paths)}/lock")


def test_a_driver_that_stood_still_goes_on_where_nobody_took_over(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLock(paths):
        monkeypatch.setattr(bucket_lock, "STALE", 0.0)
        assert done(paths, "a0").attempt == "a0"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_on_the_store_and_the_newest_whole_one_counts(
    store: Store, paths: RunPaths, enter: Callable[..., None]
) -> None:
    meta = {"fingerprint": FINGERPRINT}
    inputs = checkpoints.save_inputs(paths, 0, "a0", {"latent": np.ones(3)}, meta)
    for step in (2, 4, 6):
        checkpoints.save_progress(paths, 0, step, "a0", {"z": np.full(3, step)}, meta, inputs)
    enter("second")
    assert checkpoints.newest_step(paths, 0) == 6
    kept = [name for name in store.objects(f"{folder(paths)}/checkpoints") if "progress" in name]
    assert len(kept) == 2, "the newest and the one before"
    newest = f"{folder(paths)}/checkpoints/{kept[-1]}"
    store.put(newest, store.get(newest)[:-1])
    found = checkpoints.load(paths, 0, meta)
    assert found is not None
    assert (found.step, found.arrays["z"].tolist(), found.inputs["latent"].tolist()) == (4, [4.0] * 3, [1.0] * 3)
    aside = store.objects(f"{folder(paths)}/quarantine")
    assert len(aside) == 2, "the damaged one, and the reason"
    assert any("truncated" in reason.decode(errors="replace") for reason in aside.values())
    checkpoints.clear(paths, 0)
    assert not store.objects(f"{folder(paths)}/checkpoints")


# --- verify -----------------------------------------------------------------------------------------------------------

Spoil = Callable[[Store, RunPaths, Record], object]


def key(paths: RunPaths, name: str) -> str:
    return f"{folder(paths)}/{name}"


def flip(store: Store, name: str, place: int = 60) -> None:
    whole = bytearray(store.get(name))
    whole[place] ^= 1
    store.put(name, bytes(whole))


def data_of(paths: RunPaths, record: Record) -> str:
    assert record.data is not None
    return key(paths, record.data.name)


def forge(store: Store, paths: RunPaths, record: Record, **changes: object) -> None:
    store.put(key(paths, "records/00001.json"), replace(record, **changes).to_bytes())  # type: ignore[arg-type]


DAMAGES: dict[str, tuple[Spoil, str]] = {
    "flipped byte": (lambda store, paths, record: flip(store, data_of(paths, record)), "SHA-256 differs"),
    "missing file": (lambda store, paths, record: store.remove(data_of(paths, record)), "train-00001.* is missing"),
    "other size": (lambda store, paths, record: store.put(data_of(paths, record), b"short"), "has 5 bytes, not"),
    "extra file": (
        lambda store, paths, record: store.put(data_of(paths, record).replace("-of-", "-0f-"), b"extra"),
        "data/ has 1 files that are not the run's",
    ),
    "edited record": (
        lambda store, paths, record: flip(store, key(paths, "records/00001.json")),
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
    "another job's": (
        lambda store, paths, record: forge(store, paths, record, fingerprint="0" * 64),
        "belongs to another job",
    ),
    "left checkpoint": (
        lambda store, paths, record: store.put(key(paths, "checkpoints/00001/x"), b""),
        "checkpoints/ has 1 files",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damage_and_changes_nothing(store: Store, paths: RunPaths, damage: str) -> None:
    done(paths, "a0", 0, failed=[1])
    record = done(paths, "a1", 1)
    clean(paths)
    assert verify(paths.output, deep=True).problems == []
    spoil, words = DAMAGES[damage]
    spoil(store, paths, record)
    before = store.objects(folder(paths))
    report = verify(paths.output, deep=True)
    assert not report.ok
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(report.describe())
    assert store.objects(folder(paths)) == before


def test_a_damaged_record_is_set_aside_and_its_shard_open_again(store: Store, paths: RunPaths) -> None:
    done(paths, "a0", 0)
    flip(store, key(paths, "records/00000.json"))
    with RunLock(paths):
        assert settled(paths).open_shards(2) == [0, 1]
        assert done(paths, "a1", 0).attempt == "a1"
    assert [name.split(".")[0] for name in store.objects(key(paths, "quarantine"))] == ["records-00000"] * 2
    assert len(store.objects(key(paths, "data"))) == 1, "the same bytes again"


# --- what the user must change ----------------------------------------------------------------------------------------


def test_a_missing_bucket_is_named(enter: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "s3://nowhere/run"]) == 2
    assert "s3://nowhere/run/job.json: there is no bucket nowhere; create it" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_a_right_that_is_missing_is_found_before_any_work(
    store: Store, paths: RunPaths, enter: Callable[..., None], method: str
) -> None:
    with gate(store, lambda asked, path: 403 if asked == method else None) as strict:
        enter("first", strict)
        with pytest.raises(OutputError, match=r"the store refuses access \(AccessDenied\); give this machine"):
            refused_or_taken(paths)
        assert len(strict.asked) < bucket.TRIES, "asking again would not help"


def test_missing_credentials_are_named(
    store: Store, enter: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert main(["status", f"s3://{BUCKET}/run"]) == 2
    assert "no credentials were found" in capsys.readouterr().err


def test_a_folder_with_other_things_in_it_is_refused(store: Store, enter: object) -> None:
    store.put("photos/cat.png", b"a cat")
    with pytest.raises(OutputError, match=r"s3://runs/photos: holds other files \(cat.png\) and no run"):
        refuse_foreign_files(RunPaths(Path("s3://runs/photos"), 1))
    refuse_foreign_files(RunPaths(Path("s3://runs/phot"), 1))


def test_a_folder_of_a_bucket_is_no_file_of_this_machine(paths: RunPaths) -> None:
    """What was forgotten in the code is an error, not a folder named `s3:`."""
    with pytest.raises(TypeError, match=r"s3://runs/.*/job.json is no file of this machine"):
        os.stat(paths.job)
    assert str(paths.job).startswith("s3://runs/")
    assert paths.job.read_bytes()


def test_a_probe_that_a_kill_left_goes_when_the_run_is_finished(store: Store, paths: RunPaths) -> None:
    store.put(key(paths, ".stylemill-probe-0"), b"")
    for shard in range(2):
        done(paths, f"a{shard}", shard)
    clean(paths)
    assert ".stylemill-probe-0" not in store.objects(folder(paths))
