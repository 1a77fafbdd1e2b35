"""Files get their final name complete, durable and only if that name is free; damaged ones are moved out of the way."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from stylemill.errors import OutputError, StorageError
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths
from stylemill.testing.failpoints import failpoint

_log = logging.getLogger(__name__)
# Nothing else that is portable gives a file a name only if that name is free, so these disks are refused.
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV}
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Any OSError of the block becomes a StorageError that names `path` and the way on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"{path}: the disk is full; nothing committed is lost: free some space, then the same command resumes"
            ) from error
        raise StorageError(f"{path}: {error.strerror or error}; the same command resumes once this is cured") from error


def publish(tmp: Path, final: Path) -> bool:
    """Give the finished file `tmp` the name `final` if nothing stands there, and make both survive a power cut.

    Returns False, and leaves `tmp`, where `final` already stands: it is never replaced. Raises StorageError, and
    OutputError where the filesystem makes no hard links. In a bucket, where the digest is part of a file's name, a put
    is all that: it is atomic and durable, and what it may replace has the same bytes.
    """
    if isinstance(final, BucketPath):
        final.bucket.upload(tmp, final.key)
        discard(tmp)
        return True
    with storage_errors(final):
        sync(tmp)
        try:
            os.link(tmp, final)
        except FileExistsError:
            # NFS may answer so to a link that it made, and so does a link whose fsync failed the first time.
            if not os.path.samefile(tmp, final):
                return False
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                raise OutputError(
                    f"{final}: this filesystem makes no hard links ({error.strerror}), so a shard cannot be published "
                    "safely; choose a folder on another disk with --output"
                ) from error
            raise
        failpoint("mid-publish", folder=final.parent.name)
        sync(final.parent)
        tmp.unlink(missing_ok=True)
        return True


def publish_bytes(paths: RunPaths, final: Path, data: bytes, attempt: str) -> bool:
    """Write `data` below tmp/ and publish it; nothing stays in tmp/ whatever happens short of a kill."""
    if isinstance(final, BucketPath):
        failpoint("mid-write", folder=final.parent.name)
        created = final.bucket.create(final.key, data)
        failpoint("mid-publish", folder=final.parent.name)
        return created
    tmp = paths.tmp_name(final, attempt)
    try:
        with storage_errors(final), open(tmp, "xb") as file:
            file.write(data)
            failpoint("mid-write", folder=final.parent.name)
        return publish(tmp, final)
    finally:
        discard(tmp)


def replace_bytes(paths: RunPaths, final: Path, data: bytes) -> None:
    """Give `final` new bytes, all at once: for a plan or a report, of which the newest is the right one."""
    if isinstance(final, BucketPath):
        final.bucket.put(final.key, data)
        return
    tmp = paths.tmp_name(final, uuid4().hex[:12])
    try:
        with storage_errors(final):
            paths.tmp.mkdir(exist_ok=True)
            tmp.write_bytes(data)
            sync(tmp)
            os.replace(tmp, final)
            sync(final.parent)
    finally:
        discard(tmp)


def persist(path: Path) -> None:
    """Make a file that another attempt published survive a power cut: it may have been killed before its own fsync."""
    if isinstance(path, BucketPath):
        return
    with storage_errors(path):
        sync(path)
        sync(path.parent)


def discard(path: Path | None) -> None:
    """Remove an unfinished file; cleaning up hides no other error, and `clean` removes what stays."""
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, as far as that goes: what stays is left to the next clean-up."""
    if not isinstance(folder, BucketPath):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(StorageError):
        folder.bucket.delete([path.key for path in folder.walk_files()])


def quarantine(paths: RunPaths, path: Path, why: str) -> None:
    """Move `path` out of the way, keeping it and the reason for whoever wants to know what happened."""
    aside = paths.quarantine / f"{paths.relative(path).replace('/', '-')}.{uuid4().hex[:8]}"
    if isinstance(aside, BucketPath):
        _quarantine_object(path, aside, why)
        return
    with storage_errors(path):
        paths.quarantine.mkdir(exist_ok=True)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return  # another process moved or removed it first
        sync(path.parent)
        with suppress(OSError), open(paths.quarantine / "reasons.txt", "a", encoding="utf-8") as reasons:
            reasons.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {aside.name}: {why}\n")
    _log.warning("%s: %s; moved to %s", path, why, paths.relative(aside))


def _quarantine_object(path: Path, aside: BucketPath, why: str) -> None:
    if not isinstance(path, BucketPath):
        discard(path)  # of this machine's cache
        return
    try:
        path.bucket.copy(path.key, aside.key)
    except FileNotFoundError:
        return
    path.unlink()
    aside.bucket.put(f"{aside.key}.reason.txt", f"{path}: {why}\n".encode())
    _log.warning("%s: %s; moved to quarantine/%s", path, why, aside.name)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with storage_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
