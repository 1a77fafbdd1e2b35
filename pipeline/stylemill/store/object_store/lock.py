"""The lock of a run on an object store: an object that its holder renews every RENEW_SECONDS.

An object store does not release a lock when its holder dies. A process that finds a lock therefore watches it. If the
lock is renewed meanwhile, its holder is alive and LockedError is raised. If it is not renewed for STALE_SECONDS, or by
the clock of the store has not been for that long already, the process takes it over.

A holder that did not renew its lock in time, because it was stopped or the store did not answer, renews it before it
writes or deletes anything more (see `Bucket.write_checks`), and fails if another process took the lock over. A request
that is already on its way is harmless: records are created, never replaced.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

from stylemill.errors import LockedError, StylemillError
from stylemill.store.object_store.path import BucketPath

_log = logging.getLogger(__name__)
RENEW_SECONDS = 10.0  # between two renewals
STALE_SECONDS = 60.0  # without a renewal, after which a lock may be taken over
POLL_SECONDS = 2.0  # between two requests for the state of the lock of another process
SAFE_FRACTION = 0.75  # of STALE_SECONDS: a holder with an older renewal must renew the lock before it writes


@contextmanager
def hold_lock(path: BucketPath, machine: str) -> Iterator[None]:
    """Hold the lock object at `path`. Raises LockedError, which names the holder, if that is alive.

    `machine` is known only to processes that hold the flock of this machine's scratch folder for the run. A lock object
    with the same `machine` was therefore left by a dead process.
    """
    lock, write_checks, folder = _Lock(path, machine), path.bucket.write_checks, path.parent
    assert isinstance(folder, BucketPath)
    folder.probe()
    lock.acquire()
    write_checks[folder.prefix] = lock.check
    renewal = threading.Thread(target=lock.renew_until_ended, daemon=True)
    renewal.start()
    try:
        yield
    finally:
        lock.ended.set()
        renewal.join()
        del write_checks[folder.prefix]
        lock.release()


def read_holder(path: BucketPath) -> str | None:
    """The holder of the lock, as pid and host; None if there is no lock or it is stale."""
    state = _read_state(path)
    return None if state is None or state.age > STALE_SECONDS else state.holder


class _Lock:
    def __init__(self, path: BucketPath, machine: str) -> None:
        self._path = path
        self._machine = machine
        self._token = uuid4().hex
        self._etag = ""
        self._renewals = 0
        self._renewed_at = 0.0
        self._renewing = threading.Lock()
        self.ended = threading.Event()

    def acquire(self) -> None:
        while True:
            self._renewed_at = _now()
            if self._path.bucket.create(self._path.key, self._body()):
                self._wait_for_concurrent_puts()
                state = _read_state(self._path)
                if state is not None and state.token == self._token:
                    self._etag = state.etag
                    return
                continue
            state = _read_state(self._path)
            if state is not None and self._take_over(state):
                return

    def _take_over(self, state: _LockState) -> bool:
        """Whether the lock, found in `state`, is ours now. Raises LockedError if its holder renews it meanwhile."""
        since = _now()
        if state.machine != self._machine and state.age <= STALE_SECONDS:
            _log.warning(
                "%s: locked by %s; waiting up to %.0f s to see whether that process is alive",
                self._path,
                state.holder,
                STALE_SECONDS,
            )
        while state.machine != self._machine and state.age <= STALE_SECONDS and _now() - since <= STALE_SECONDS:
            self.ended.wait(POLL_SECONDS)
            current = _read_state(self._path)
            if current is None:
                return False
            if current.etag != state.etag:
                raise LockedError(
                    f"{self._path.parent}: another run works in this folder: {current.holder}; wait until it ends or "
                    "choose another folder with --output"
                )
        self._renewed_at = _now()
        try:
            self._etag = self._path.bucket.replace(self._path.key, self._body(), state.etag)
        except (FileExistsError, FileNotFoundError):
            return False  # another process took it over, or its holder released it
        self._wait_for_concurrent_puts()
        current = _read_state(self._path)
        return current is not None and current.token == self._token

    def _wait_for_concurrent_puts(self) -> None:
        """Without conditional puts, another process that saw no lock may put its own now; the later put wins."""
        if not self._path.bucket.conditional_puts:
            self.ended.wait(POLL_SECONDS)

    def renew_until_ended(self) -> None:
        """Renew the lock every RENEW_SECONDS until `ended` is set or another process has the lock."""
        while not self.ended.wait(RENEW_SECONDS):
            try:
                self._renew(tries=1)
            except LockedError:
                return  # the next `check` raises it again
            except StylemillError as error:
                _log.debug("%s: not renewed: %s", self._path, error)

    def check(self) -> None:
        """Renew an overdue lock. Raises LockedError if another process has it, StorageError if the store fails."""
        if _now() - self._renewed_at > SAFE_FRACTION * STALE_SECONDS:
            self._renew()

    def _renew(self, tries: int = 0) -> None:
        with self._renewing:
            started = _now()
            self._renewals += 1
            try:
                self._etag = self._path.bucket.replace(self._path.key, self._body(), self._etag, tries)
            except (FileExistsError, FileNotFoundError):
                state = _read_state(self._path)
                if state is None or state.token != self._token:
                    raise LockedError(
                        f"{self._path.parent}: this run was stopped, or did not reach the store, for more than "
                        f"{STALE_SECONDS:.0f} s, and another run has taken over; nothing committed is lost"
                    ) from None
                self._etag = state.etag  # of our own last renewal, whose response was lost
            self._renewed_at = started

    def release(self) -> None:
        with suppress(StylemillError, OSError):
            state = _read_state(self._path)
            if state is not None and state.token == self._token:
                self._path.unlink()

    def _body(self) -> bytes:
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        return json.dumps({**holder, "machine": self._machine, "token": self._token, "beats": self._renewals}).encode()


class _LockState:
    """A lock object as it was read."""

    def __init__(self, head: Any, data: bytes) -> None:
        self.etag = str(head["ETag"])
        self.age = _age(head)
        try:
            values = dict(json.loads(data))
        except (ValueError, TypeError):
            values = {}
        self.token, self.machine = values.get("token"), values.get("machine")
        known = {"pid", "host"} <= values.keys()
        self.holder = f"pid {values['pid']} on host {values['host']}" if known else "an unknown process"


def _read_state(path: BucketPath) -> _LockState | None:
    try:
        return _LockState(path.bucket.head(path.key), path.read_bytes())
    except FileNotFoundError:
        return None


def _age(head: Any) -> float:
    """Seconds since the object was written, by the clock of the store; 0 if its response has no date."""
    try:
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - head["LastModified"]).total_seconds())
    except (KeyError, TypeError, ValueError):
        return 0.0


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # also counts the time that the machine sleeps
