"""The progress of a run on stderr: images committed, rate, time left, failures.

A terminal shows a bar. Anything else, such as a log file, gets a line a minute.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from stylemill.execution.attempt import Progress

LINE_INTERVAL = 60.0  # seconds


class ProgressBar:
    """The bar counts committed rows. Shards in flight are shown behind it, with the share of their steps."""

    def __init__(self, total: int, done: int, failed: int, quiet: bool) -> None:
        self.failed = failed
        self.in_flight: dict[int, Progress] = {}
        self._shows_bar = sys.stderr.isatty() and not quiet
        self._prints_lines = not sys.stderr.isatty() and not quiet
        self.started = self.last_line = time.monotonic()
        self.first = done
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="img",
            disable=not self._shows_bar,
            dynamic_ncols=True,
            smoothing=0.1,
            leave=True,
        )
        self.done = done
        self.total = total

    def __enter__(self) -> ProgressBar:
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.in_flight.clear()
        self._show(end=True)
        self.bar.close()

    def moved(self, progress: Progress) -> None:
        self.in_flight[progress.shard] = progress
        self._show()

    def committed(self, shard: int, done: int, failed: int) -> None:
        self.in_flight.pop(shard, None)
        self.bar.update(done - self.done)
        self.done, self.failed = done, failed
        self._show()

    def warn(self, message: str) -> None:
        self.bar.clear()
        print(f"warning: {message}", file=sys.stderr, flush=True)

    def _show(self, end: bool = False) -> None:
        if self._shows_bar:
            self.bar.set_postfix_str(self._suffix(), refresh=True)
        elif self._prints_lines and (end or time.monotonic() - self.last_line >= LINE_INTERVAL):
            self.last_line = time.monotonic()
            rate = (self.done - self.first) / max(self.last_line - self.started, 1e-9)
            left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "time left unknown"
            print(
                f"{self.done}/{self.total} img, {rate:.2f} img/s, {left}, {self._suffix()}", file=sys.stderr, flush=True
            )

    def _suffix(self) -> str:
        sampling = [progress for progress in self.in_flight.values() if progress.stage not in ("read", "wait")]
        share = sum(p.step for p in sampling) / max(sum(p.steps for p in sampling), 1)
        flight = f", {len(sampling)} shards in flight at {share:.0%}" if sampling else ""
        return f"failed {self.failed}{flight}"
