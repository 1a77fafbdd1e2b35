"""SIGINT and SIGTERM ask a run to stop: workers write checkpoints and leave."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Interruption:
    """Whether a run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.signal: int | None = None
        self._since = 0.0

    def handle(self, number: int, frame: object) -> None:
        """A second signal ends the process at once. Within a second of the first it is the same Ctrl-C, sent twice."""
        if self.stopping.is_set() and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        self.signal, self._since = number, time.monotonic()
        self.stopping.set()


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Handle SIGINT and SIGTERM until the block ends. In another thread than the main one no signal is handled."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = {number: signal.signal(number, interruption.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
