"""Files are published once, complete and durable. A filesystem that cannot do this is refused before any work."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from store_shards import attempt, files, run_folder, table
from stylemill.errors import OutputError, StorageError
from stylemill.store.atomic import publish, publish_bytes, quarantine
from stylemill.store.parquet import write_shard
from stylemill.store.paths import RunPaths
from stylemill.store.run_file import create_run_folder


def test_publish_never_replaces_a_file(tmp_path: Path) -> None:
    tmp, other, final = tmp_path / "tmp", tmp_path / "other", tmp_path / "final"
    tmp.write_bytes(b"first")
    other.write_bytes(b"second")
    assert publish(tmp, final)
    assert not publish(other, final)
    assert files(tmp_path) == {"final": b"first", "other": b"second"}


def test_a_link_that_was_made_in_spite_of_an_error_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp, final = tmp_path / "tmp", tmp_path / "final"
    tmp.write_bytes(b"first")
    real = os.link

    def link_and_fail(*names: Path) -> None:
        real(*names)
        raise FileExistsError(errno.EEXIST, "the server of a network disk received the request twice")

    monkeypatch.setattr(os, "link", link_and_fail)
    assert publish(tmp, final)
    assert files(tmp_path) == {"final": b"first"}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_filesystem_without_hard_links_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_link(*names: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_link)
    paths = RunPaths(tmp_path / "run", 1)
    with pytest.raises(OutputError, match=r"no hard links .*--output"):
        create_run_folder(paths)
    assert files(tmp_path) == {}


def test_no_file_is_left_in_tmp_if_publishing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = run_folder(tmp_path)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        publish_bytes(paths, paths.output / "numerics.json", b"{}", "attempt")
    assert files(paths.output).keys() == {"job.json"}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no permission to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(tiny_disk: Path) -> None:
    paths = run_folder(tiny_disk)
    filler = tiny_disk / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    with pytest.raises(StorageError, match="disk is full"):
        write_shard(paths, 0, "attempt", table(range(4)))
    assert not files(paths.tmp)
    with pytest.raises(OutputError, match="No space left"):
        create_run_folder(RunPaths(tiny_disk / "other", 1))
    filler.unlink()
    assert attempt(paths, "attempt")[1] is not None


def test_an_output_that_cannot_be_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"file.*cannot be written.*--output"):
        create_run_folder(RunPaths(tmp_path / "file", 1))
    with pytest.raises(OutputError, match=r"gs://bucket/run: only local folders and s3:// can be written"):
        RunPaths(Path("gs://bucket/run"), 1)


def test_quarantine_keeps_every_file_and_the_reasons(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    for content in (b"one", b"two"):
        paths.data(0).write_bytes(content)
        quarantine(paths, paths.data(0), "half-written")
    quarantine(paths, paths.data(0), "already gone")
    kept = files(paths.quarantine)
    assert kept.pop("reasons.txt").decode().count("half-written") == 2
    assert sorted(kept.values()) == [b"one", b"two"]


def test_shard_numbers_have_as_many_digits_as_the_run_needs() -> None:
    small, large = RunPaths(Path("run"), 42), RunPaths(Path("run"), 1_234_567)
    assert small.data(7) == Path("run/data/train-00007-of-00042.parquet")
    assert small.data(7, generation=1) == Path("run/data/train-00007-of-00042-r1.parquet")
    assert small.failures(7) == Path("run/failures/00007.parquet")
    assert small.record(7, generation=1) == Path("run/records/00007.r1.json")
    assert large.data(7) == Path("run/data/train-0000007-of-1234567.parquet")
    assert large.tmp_file(large.data(7), "a") != large.tmp_file(large.data(8), "a")
