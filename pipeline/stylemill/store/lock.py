"""Locks between processes, by flock: the kernel releases a lock when the process that holds it ends, also by a kill."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from stylemill.errors import LockedError, OutputError
from stylemill.store.atomic import storage_errors
from stylemill.store.object_store.lock import hold_lock, read_holder
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths

_TRIES = 3  # `lock_holder` in another process holds the lock for an instant
_held_descriptors: set[int] = set()


def _close_inherited() -> None:
    # A forked child shares the open file and would keep the lock after its parent died. Closing the file in the child
    # does not release the lock of the parent. Programs that are executed do not inherit it (O_CLOEXEC).
    for descriptor in _held_descriptors:
        os.close(descriptor)
    _held_descriptors.clear()


os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def file_lock(path: Path, wait: bool = True, folder: Path | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is created, and removed at the end.

    If another process holds it, waits, or without `wait` raises LockedError, which names that process and the `folder`
    that the lock protects. A lock file that a killed process left is not a lock. Raises StorageError, and OutputError
    if the filesystem cannot lock files.
    """
    descriptor = _acquire(path, wait, folder or path.parent)
    try:
        yield
    finally:
        if descriptor in _held_descriptors:  # not in a forked child that leaves the block of its parent
            # Removed before the lock is released: a waiting process then sees that its open file is not at `path`.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            _close(descriptor)


def _acquire(path: Path, wait: bool, folder: Path) -> int:
    while True:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _held_descriptors.add(descriptor)
        try:
            _flock(descriptor, path, wait, folder)
            if _is_at(descriptor, path):
                if not wait:  # processes that wait do not show the holder
                    _write_holder(descriptor)
                return descriptor
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)


def _flock(descriptor: int, path: Path, wait: bool, folder: Path) -> None:
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    for number in range(_TRIES):
        try:
            return fcntl.flock(descriptor, operation)
        except BlockingIOError:
            time.sleep(0.05 if number < _TRIES - 1 else 0)
        except OSError as error:
            raise OutputError(
                f"{path}: this filesystem cannot lock files ({error.strerror}); choose another disk with --output"
            ) from error
    raise LockedError(
        f"{folder}: another run works in this folder: {_read_holder(descriptor)}; "
        "wait until it ends or choose another folder with --output"
    )


def _close(descriptor: int) -> None:
    _held_descriptors.discard(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    with suppress(OSError):  # a full disk does not stop a run from resuming
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


class RunLock:
    """`with RunLock(paths):` makes sure that one process at a time works on a run.

    The lock of a dead process is taken over at once. For a run on an object store, flock covers this machine, and
    `object_store.lock` the others. Raises LockedError, which names the pid and host of the holder, and OutputError if
    the filesystem cannot lock files.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._locks = ExitStack()

    def __enter__(self) -> RunLock:
        paths = self._paths
        with ExitStack() as locks:
            locks.enter_context(file_lock(paths.scratch / "lock", wait=False, folder=paths.output))
            if isinstance(paths.lock, BucketPath):
                locks.enter_context(hold_lock(paths.lock, _machine_id(paths)))
            self._locks = locks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._locks.close()


def lock_holder(paths: RunPaths) -> str | None:
    """The process that works on the run, as pid and host; None if there is none. Changes nothing."""
    if isinstance(paths.lock, BucketPath):
        return read_holder(paths.lock)
    with storage_errors(paths.lock):
        try:
            descriptor = os.open(paths.lock, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_holder(descriptor)
        finally:
            os.close(descriptor)
    return None


def _machine_id(paths: RunPaths) -> str:
    """A unique id of the scratch folder of a run on this machine, created by the process that holds the flock there."""
    file = paths.scratch / "machine"
    with storage_errors(file):
        if not file.exists():
            file.write_text(uuid4().hex)
        return file.read_text()
