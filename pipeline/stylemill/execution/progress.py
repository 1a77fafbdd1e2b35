"""The progress of a run on stderr: its phase, images committed, rate, time left, failures.

A terminal shows a bar. Anything else, such as a log file, gets lines.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

from stylemill.execution.attempt import Progress
from stylemill.execution.pace import Pace
from stylemill.plural import counted

REFRESH = 0.25  # seconds between two looks at the clock and at the request to stop
FIRST_LINES, LATER_LINES = 10.0, 60.0  # seconds between two lines: in the first minute or before a commit, and later

STOPPING = "stopping: workers write checkpoints, then end; press Ctrl-C again to end at once"
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} img [{elapsed}{postfix}]"
# Of several shards in flight, the phase is that of the one whose stage comes first here.
_PHASES = {
    "sample": "sampling",
    "encode": "encoding images",
    "measure": "measuring distances",
    "decode": "decoding",
    "write": "writing",
    "read": "reading images",
    "wait": "reading images",
}


class ProgressBar:
    """The bar counts committed rows. Behind it are the phase, and the share of the steps of the shards in flight.

    A thread shows it, so that its clock moves while Ray starts or a model is loaded. `stopping` is set when the run is
    asked to stop.
    """

    def __init__(self, pace: Pace, failed: int, stopping: threading.Event, quiet: bool) -> None:
        self.pace = pace
        self.failed = failed
        self._phase = "starting"
        self._stopping = stopping
        self._told_to_stop = False
        self._quiet = quiet
        self._shows_bar = sys.stderr.isatty() and not quiet
        self._prints_lines = not sys.stderr.isatty() and not quiet
        self._any_committed = False
        self._started = time.monotonic()
        self._last_line = -LATER_LINES
        self._ended = threading.Event()
        self._lock = threading.RLock()  # of the thread and the driver
        self._thread = threading.Thread(target=self._keep_showing, daemon=True)
        self._bar = tqdm(disable=True)

    def __enter__(self) -> ProgressBar:
        if self._shows_bar:
            self._bar = tqdm(total=self.pace.total, initial=self.pace.done, bar_format=_BAR, dynamic_ncols=True)
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if not self._quiet:
            self._thread.join()
        self.pace.in_flight.clear()
        self._phase = "ended"
        self.refresh(now=True)
        self._bar.close()

    def phase(self, text: str) -> None:
        """What the run does while no shard is in flight."""
        with self._lock:
            if text != self._phase:
                self._phase = text
                self.pace.in_flight.clear()  # of workers that are gone
                self.refresh(now=True)

    def moved(self, progress: Progress) -> None:
        with self._lock:
            self.pace.moved(progress)

    def committed(self, shard: int, done: int, failed: int) -> None:
        with self._lock:
            self.pace.committed(shard, done)
            self.failed = failed
            self._any_committed = True
            self.refresh()

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def _keep_showing(self) -> None:
        while True:
            self.refresh()
            if self._ended.wait(REFRESH):
                return

    def refresh(self, now: bool = False) -> None:
        """Draw the bar, or print a line if one is due or wanted `now`."""
        with self._lock:
            if self._stopping.is_set() and not self._told_to_stop and not self._quiet:
                self._told_to_stop = True
                self._print(STOPPING)
            if self._shows_bar:
                self._bar.n = self.pace.done
                self._bar.set_postfix_str(self._text(), refresh=True)
            elif self._prints_lines and (now or self._line_is_due()):
                self._last_line = time.monotonic()
                elapsed = tqdm.format_interval(self._last_line - self._started)
                self._print(f"{self.pace.done}/{self.pace.total} img in {elapsed}, {self._text()}")

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        first = not self._any_committed or now - self._started < LATER_LINES
        return now - self._last_line >= (FIRST_LINES if first else LATER_LINES)

    def _print(self, line: str) -> None:
        with self._lock:
            self._bar.clear()
            print(line, file=sys.stderr, flush=True)

    def _text(self) -> str:
        """Such as: sampling, 2 shards in flight at 45%, 0.31 img/s, 02:10 left, failed 0."""
        stages = {progress.stage for progress in self.pace.in_flight.values()}
        phase = next((text for stage, text in _PHASES.items() if stage in stages), self._phase)
        parts = ["stopping" if stages and self._stopping.is_set() else phase]
        if count := len(self.pace.sampling):
            parts.append(f"{counted(count, 'shard')} in flight at {self.pace.share:.0%}")
        if rate := self.pace.rate():
            parts.append(f"{rate:.2f} img/s")
        if not self._ended.is_set():
            left = self.pace.seconds_left()
            parts.append("time left unknown" if left is None else f"{tqdm.format_interval(left)} left")
        return ", ".join([*parts, f"failed {self.failed}"])
