"""A record counts only if it is undamaged and its files exist. The ledger reads each record once."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from store_shards import FINGERPRINT, attempt, files, run_folder
from stylemill.errors import DamagedError
from stylemill.store.commit import clean, commit
from stylemill.store.ledger import Ledger
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record


def committed(folder: Path, shards: int = 1) -> RunPaths:
    paths = run_folder(folder, shards)
    for shard in range(shards):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * 4]))
    return paths


def test_a_truncated_or_edited_record_is_refused(tmp_path: Path) -> None:
    data = committed(tmp_path).record(0).read_bytes()
    record = Record.from_bytes(data)
    assert (record.rows_ok, record.fingerprint, record.timings) == (3, FINGERPRINT, {"read": 0.5})
    assert record.to_bytes() == data
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            Record.from_bytes(data[:length])
    for position in range(len(data)):
        with pytest.raises(DamagedError):
            Record.from_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    for edited in (data.replace(b'"rows_ok": 3', b'"rows_ok": 4'), data + b"\n", b"[]", b"null", b'{"sha256": ""}'):
        with pytest.raises(DamagedError):
            Record.from_bytes(edited)


def test_a_deeply_nested_record_with_a_right_digest_is_damaged() -> None:
    inner = b'\n "deep": ' + b"[" * 100_000
    digest_line = f'\n "sha256": "{sha256(b"{" + inner).hexdigest()}",'.encode()
    with pytest.raises(DamagedError, match="it is not a record"):
        Record.from_bytes(b"{" + digest_line + inner)


def truncate_record(paths: RunPaths) -> None:
    paths.record(1).write_bytes(paths.record(1).read_bytes()[:-1])


def remove_data(paths: RunPaths) -> None:
    paths.data(1).unlink()


def truncate_failures(paths: RunPaths) -> None:
    paths.failures(1).write_bytes(paths.failures(1).read_bytes()[:-1])


def copy_the_record_of_another_shard(paths: RunPaths) -> None:
    paths.record(1).write_bytes(paths.record(0).read_bytes())


DAMAGES = [truncate_record, remove_data, truncate_failures, copy_the_record_of_another_shard]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("finished", [False, True])
def test_a_shard_with_a_damaged_record_or_file_is_open_again(tmp_path: Path, damage, finished: bool) -> None:  # type: ignore[no-untyped-def]
    paths = committed(tmp_path, 2)
    if finished:
        clean(paths)
    damage(paths)
    before = files(paths.output)

    reading = Ledger(paths, read_only=True)
    assert reading.open_shards(2) == [1]
    assert files(paths.output) == before

    ledger = Ledger(paths)
    assert ledger.open_shards(2) == [1]
    assert ledger.read(1) is None
    assert not paths.record(1).exists()
    assert len(list(paths.quarantine.glob("records-*"))) == 1
    paths.tmp.mkdir(exist_ok=True)
    commit(paths, *attempt(paths, "again", 1, failed=[4]))
    assert ledger.open_shards(2) == []


def test_the_ledger_reads_only_new_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = run_folder(tmp_path, 3)
    ledger = Ledger(paths)
    ledger.refresh()
    assert ledger.totals().shards == 0
    read: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real(path))[1])
    for shard in (2, 0):
        commit(paths, *attempt(paths, f"a{shard}", shard, failed=[shard * 4]))
        read.clear()
        ledger.refresh()
        assert read == [paths.record(shard).name]
    (paths.records_folder / "00009.json").write_text("not of this run")
    (paths.records_folder / "notes.json").write_text("not of this run")
    ledger.refresh()
    assert [record.shard for record in ledger.records()] == [0, 2]
    assert ledger.open_shards(3) == [1]
    totals = ledger.totals()
    assert (totals.shards, totals.rows_ok, totals.rows_failed, totals.failed_by_class) == (2, 6, 2, {"ImageError": 2})
    paths.record(2).unlink()
    assert ledger.open_shards(3) == [1, 2]
