"""Publish files atomically and durably, never replacing one; move damaged files to quarantine."""

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
# A hard link is the only portable way to give a file a name only if the name is free: without it, a disk is refused.
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names `path` and says how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise StorageError(
                f"{path}: the disk is full; nothing committed is lost: free some space, then the same command resumes"
            ) from error
        raise StorageError(f"{path}: {error.strerror or error}; the same command resumes once this is fixed") from error


def publish(tmp: Path, final: Path) -> bool:
    """Move the finished file `tmp` to the path `final`, durably, unless `final` exists.

    Returns False if `final` exists; then neither file is changed. Raises StorageError, and OutputError if the
    filesystem has no hard links. In a bucket, one put does it: a put is atomic and durable, and an object that it
    replaces has the same bytes, because the digest is part of the name.
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
            # The link may be ours: NFS can report this for a link that it made, and an earlier fsync may have failed.
            if not os.path.samefile(tmp, final):
                return False
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                raise OutputError(
                    f"{final}: this filesystem has no hard links ({error.strerror}), so shards cannot be published "
                    "safely; choose a folder on another disk with --output"
                ) from error
            raise
        failpoint("mid-publish", folder=final.parent.name)
        sync(final.parent)
        tmp.unlink(missing_ok=True)
        return True


def publish_bytes(paths: RunPaths, final: Path, data: bytes, attempt: str) -> bool:
    """Write `data` to tmp/ and publish it as `final`, as `publish` does. Only a kill leaves a file in tmp/."""
    if isinstance(final, BucketPath):
        failpoint("mid-write", folder=final.parent.name)
        created = final.bucket.create(final.key, data)
        failpoint("mid-publish", folder=final.parent.name)
        return created
    tmp = paths.tmp_file(final, attempt)
    try:
        with storage_errors(final), open(tmp, "xb") as file:
            file.write(data)
            failpoint("mid-write", folder=final.parent.name)
        return publish(tmp, final)
    finally:
        discard(tmp)


def replace_bytes(paths: RunPaths, final: Path, data: bytes) -> None:
    """Replace the content of `final` atomically. Only for files that are not data: a plan or a report."""
    if isinstance(final, BucketPath):
        final.bucket.put(final.key, data)
        return
    tmp = paths.tmp_file(final, uuid4().hex[:12])
    try:
        with storage_errors(final):
            paths.tmp.mkdir(exist_ok=True)
            tmp.write_bytes(data)
        replace_file(tmp, final)
    finally:
        discard(tmp)


def replace_file(tmp: Path, final: Path) -> None:
    """Move the finished local file `tmp` to the path `final` atomically, as `replace_bytes` does."""
    with storage_errors(final):
        if isinstance(final, BucketPath):
            final.bucket.upload(tmp, final.key)
            return
        sync(tmp)
        os.replace(tmp, final)
        sync(final.parent)


def sync_published(path: Path) -> None:
    """Make a file durable that another attempt published: that attempt may have been killed before its fsync."""
    if isinstance(path, BucketPath):
        return
    with storage_errors(path):
        sync(path)
        sync(path.parent)


def discard(path: Path | None) -> None:
    """Remove an unfinished file. Errors are ignored: `clean` removes the file later."""
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder and its content. Errors are ignored: the next `clean` removes what is left."""
    if not isinstance(folder, BucketPath):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(StorageError):
        folder.bucket.delete([path.key for path in folder.walk_files()])


def quarantine(paths: RunPaths, path: Path, reason: str) -> None:
    """Move `path` to the quarantine folder and note the reason there. A file that is gone already is no error."""
    target = paths.quarantine / f"{paths.relative(path).replace('/', '-')}.{uuid4().hex[:8]}"
    if isinstance(target, BucketPath):
        _quarantine_object(path, target, reason)
        return
    with storage_errors(path):
        paths.quarantine.mkdir(exist_ok=True)
        try:
            os.rename(path, target)
        except FileNotFoundError:
            return  # another process was faster
        sync(path.parent)
        with suppress(OSError), open(paths.quarantine / "reasons.txt", "a", encoding="utf-8") as reasons:
            reasons.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {target.name}: {reason}\n")
    _log.warning("%s: %s; moved to %s", path, reason, paths.relative(target))


def _quarantine_object(path: Path, target: BucketPath, reason: str) -> None:
    if not isinstance(path, BucketPath):
        discard(path)  # a file of the local cache
        return
    try:
        path.bucket.copy(path.key, target.key)
    except FileNotFoundError:
        return
    path.unlink()
    target.bucket.put(f"{target.key}.reason.txt", f"{path}: {reason}\n".encode())
    _log.warning("%s: %s; moved to quarantine/%s", path, reason, target.name)


def digest(path: Path) -> str:
    """SHA-256 of the bytes of a file, in hex. Raises StorageError."""
    with storage_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_in_name(data: bytes) -> str:
    """The digest that the name of a file with these bytes contains: the first 32 hex digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
