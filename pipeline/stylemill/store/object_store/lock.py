"""The lock of a run on an object store: an object that its holder renews, for no store drops it when the holder dies.

Who meets a lock watches it: renewed, its holder lives and the run is refused; not renewed for STALE seconds by the
watcher's own clock (or, by the store's clock, already long ago), it is taken over. A holder that could not renew its
lock in time, because it stood still or the store did not answer, must do so before it writes or deletes anything more
(`Bucket.guards` ask), and cannot where another took over.
What that cannot stop, a request already on its way, does no harm: records are created, never replaced.
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
BEAT = 10.0  # seconds between two renewals
STALE = 60.0  # seconds without one after which a lock is taken over
LOOK = 2.0  # seconds between two looks at another's lock
MARGIN = 0.75  # of STALE: after that, a holder must renew its own lock before it goes on


@contextmanager
def held(path: BucketPath, machine: str) -> Iterator[None]:
    """Hold the lock object at `path`. Raises LockedError naming the holder that lives.

    `machine` is known to nobody but who holds the flock of this machine's scratch folder for the run: a lock that bears
    it is that of a dead process.
    """
    lock, guards, below = _Lock(path, machine), path.bucket.guards, path.parent
    assert isinstance(below, BucketPath)
    below.try_out()
    lock.acquire()
    guards[below.prefix] = lock.check
    beating = threading.Thread(target=lock.beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        lock.ended.set()
        beating.join()
        del guards[below.prefix]
        lock.release()


def signed(path: BucketPath) -> str | None:
    """Who holds the lock, as pid and host; None: nobody, or one that has not renewed it for long."""
    found = _look(path)
    return None if found is None or found.age > STALE else found.holder


class _Lock:
    def __init__(self, path: BucketPath, machine: str) -> None:
        self._path = path
        self._machine = machine
        self._token = uuid4().hex
        self._tag = ""
        self._beats = 0
        self._renewed = 0.0
        self._turn = threading.Lock()
        self.ended = threading.Event()

    def acquire(self) -> None:
        while True:
            self._renewed = _now()
            if self._path.bucket.create(self._path.key, self._body()):
                self._let_others_write()
                seen = _look(self._path)
                if seen is not None and seen.token == self._token:
                    self._tag = seen.tag
                    return
                continue
            seen = _look(self._path)
            if seen is not None and self._taken_over(seen):
                return

    def _taken_over(self, seen: _Seen) -> bool:
        """Whether the lock is ours now; False: look again. Raises LockedError when its holder is seen alive."""
        since = _now()
        if seen.machine != self._machine and seen.age <= STALE:
            _log.warning(
                "%s: locked by %s; waiting up to %.0f s to see whether that one lives", self._path, seen.holder, STALE
            )
        while seen.machine != self._machine and seen.age <= STALE and _now() - since <= STALE:
            self.ended.wait(LOOK)
            now = _look(self._path)
            if now is None:
                return False
            if now.tag != seen.tag:
                raise LockedError(
                    f"{self._path.parent}: another run works in this folder: {now.holder}; wait until it ends or "
                    "choose another folder with --output"
                )
        self._renewed = _now()
        try:
            self._tag = self._path.bucket.swap(self._path.key, self._body(), seen.tag)
        except (FileExistsError, FileNotFoundError):
            return False  # another was faster, or its holder has ended
        self._let_others_write()
        now = _look(self._path)
        return now is not None and now.token == self._token

    def _let_others_write(self) -> None:
        """Without conditional puts, another that saw no lock either may write its own now, and the later one has it."""
        if not self._path.bucket.conditional:
            self.ended.wait(LOOK)

    def beat(self) -> None:
        """Renew the lock until `ended`, or until another has it."""
        while not self.ended.wait(BEAT):
            try:
                self._renew(tries=1)
            except LockedError:
                return  # `check` says so to whoever wants to write
            except StylemillError as error:
                _log.debug("%s: not renewed: %s", self._path, error)

    def check(self) -> None:
        """Raises LockedError where another has the lock by now, StorageError where that cannot be known."""
        if _now() - self._renewed > MARGIN * STALE:
            self._renew()

    def _renew(self, tries: int = 0) -> None:
        with self._turn:
            at = _now()
            self._beats += 1
            try:
                self._tag = self._path.bucket.swap(self._path.key, self._body(), self._tag, tries)
            except (FileExistsError, FileNotFoundError):
                seen = _look(self._path)
                if seen is None or seen.token != self._token:
                    raise LockedError(
                        f"{self._path.parent}: this run stood still, or did not reach the store, for more than "
                        f"{STALE:.0f} s, and another has taken over; nothing committed is lost"
                    ) from None
                self._tag = seen.tag  # of our own last renewal, whose answer was lost
            self._renewed = at

    def release(self) -> None:
        with suppress(StylemillError, OSError):
            seen = _look(self._path)
            if seen is not None and seen.token == self._token:
                self._path.unlink()

    def _body(self) -> bytes:
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        return json.dumps({**holder, "machine": self._machine, "token": self._token, "beats": self._beats}).encode()


class _Seen:
    """A lock object as it was found."""

    def __init__(self, head: Any, data: bytes) -> None:
        self.tag = str(head["ETag"])
        self.age = _age(head)
        try:
            values = dict(json.loads(data))
        except (ValueError, TypeError):
            values = {}
        self.token, self.machine = values.get("token"), values.get("machine")
        named = {"pid", "host"} <= values.keys()
        self.holder = f"pid {values['pid']} on host {values['host']}" if named else "a process that has not signed"


def _look(path: BucketPath) -> _Seen | None:
    try:
        return _Seen(path.bucket.head(path.key), path.read_bytes())
    except FileNotFoundError:
        return None


def _age(head: Any) -> float:
    """Seconds since the object was written, by the store's clock alone; 0 where it does not say."""
    try:
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - head["LastModified"]).total_seconds())
    except (KeyError, TypeError, ValueError):
        return 0.0


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps
