"""Locks between processes: flock, which the kernel drops the moment its holder dies, however it dies."""

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
from stylemill.store.object_store.lock import held, signed
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths

_LOOKS = 3  # `holder` of another process has the lock for an instant
_held: set[int] = set()


def _drop_inherited() -> None:
    # A forked child shares the open file, and with it the lock, and would keep it beyond its parent's death.
    # Closing it here gives up the child's share only; started programs never get it (O_CLOEXEC).
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_inherited)


@contextmanager
def exclusive(path: Path, wait: bool = True, of: Path | None = None) -> Iterator[None]:
    """Hold the lock file `path`; another holder is waited for, or named in a LockedError with the folder it is `of`.

    The file is removed at the end and left by a kill. That it is there says nothing: only the kernel's lock counts.
    """
    descriptor = _acquire(path, wait, of or path.parent)
    try:
        yield
    finally:
        if descriptor in _held:  # else this is a forked child leaving its parent's block
            # Removed while still held: whoever waits for it finds in `_acquire` that its file is no longer the one.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            _close(descriptor)


def _acquire(path: Path, wait: bool, of: Path) -> int:
    while True:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _held.add(descriptor)
        try:
            _flock(descriptor, path, wait, of)
            if _is_at(descriptor, path):
                if not wait:  # who waits asks for no name
                    _sign(descriptor)
                return descriptor
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)


def _flock(descriptor: int, path: Path, wait: bool, of: Path) -> None:
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    for look in range(_LOOKS):
        try:
            return fcntl.flock(descriptor, operation)
        except BlockingIOError:
            time.sleep(0.05 if look < _LOOKS - 1 else 0)
        except OSError as error:
            raise OutputError(
                f"{path}: this filesystem cannot lock files ({error.strerror}); choose another disk with --output"
            ) from error
    raise LockedError(
        f"{of}: another run works in this folder: {_signature(descriptor)}; "
        "wait until it ends or choose another folder with --output"
    )


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # a full disk shall not keep a run from going on
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _signature(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not signed yet"


class RunLock:
    """`with RunLock(paths):` one run at a time works in a folder. A dead one's lock is taken over at once.

    On an object store that holds for one machine; elsewhere, see `bucket_lock`. Raises LockedError naming the holder's
    pid and host, OutputError where the filesystem has no locks.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._locks = ExitStack()

    def __enter__(self) -> RunLock:
        paths = self._paths
        with ExitStack() as locks:
            locks.enter_context(exclusive(paths.scratch / "lock", wait=False, of=paths.output))
            if isinstance(paths.lock, BucketPath):
                locks.enter_context(held(paths.lock, _machine(paths)))
            self._locks = locks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._locks.close()


def lock_holder(paths: RunPaths) -> str | None:
    """Who works in the run folder now, as pid and host; None: nobody. Changes nothing."""
    if isinstance(paths.lock, BucketPath):
        return signed(paths.lock)
    with storage_errors(paths.lock):
        try:
            descriptor = os.open(paths.lock, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _signature(descriptor)
        finally:
            os.close(descriptor)
    return None


def _machine(paths: RunPaths) -> str:
    """A name for this machine's scratch folder of a run, which whoever holds its lock may use."""
    file = paths.scratch / "machine"
    with storage_errors(file):
        if not file.exists():
            file.write_text(uuid4().hex)
        return file.read_text()
