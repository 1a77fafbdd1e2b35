"""What a run shows while it works: its phase, its pace, and that it was asked to stop."""

from __future__ import annotations

import io
import re
import sys
import threading

import pytest

from demo_job import until
from stylemill.execution import progress
from stylemill.execution.attempt import Progress
from stylemill.execution.pace import Pace
from stylemill.execution.progress import ProgressBar


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def at(shard: int, stage: str, step: int) -> Progress:
    """A report of a shard of 4 pairs and 10 steps."""
    return Progress(shard, f"attempt-{shard}", stage, step, 10, 4)


# --- pace -------------------------------------------------------------------------------------------------------------


def test_the_time_left_follows_from_the_steps_since_sampling_began() -> None:
    clock = Clock()
    pace = Pace(total=20, done=0, first_step=0, clock=clock)
    clock.now += 500  # Ray starts, the model is loaded
    for stage, step in (("read", 0), ("wait", 0), ("encode", 0), ("sample", 1)):
        clock.now += 50
        pace.moved(at(0, stage, step))
        assert (pace.rate(), pace.seconds_left()) == (None, None)
    clock.now += 10
    pace.moved(at(0, "sample", 6))
    assert pace.rate() == pytest.approx(0.2), "half of 4 rows in 10 s"
    assert pace.seconds_left() == pytest.approx((20 - 2.4) / 0.2)
    clock.now += 8
    pace.committed(0, 4)
    assert pace.seconds_left() == pytest.approx(16 / 0.2)
    pace.moved(at(1, "encode", 0))
    clock.now += 20
    pace.moved(at(1, "sample", 5))
    assert pace.rate() == pytest.approx((3.6 + 2) / 38), "all steps of a later shard count"


def test_steps_of_a_checkpoint_are_done_but_do_not_make_the_rate_higher() -> None:
    clock = Clock()
    pace = Pace(total=8, done=4, first_step=2, clock=clock)  # start_step 2: eight steps
    pace.moved(at(1, "encode", 5))
    pace.moved(at(1, "sample", 6))
    clock.now += 10
    pace.moved(at(1, "sample", 8))
    assert pace.share == pytest.approx(0.75)
    assert pace.rate() == pytest.approx(0.1), "a quarter of 4 rows in 10 s"
    assert pace.seconds_left() == pytest.approx(10)
    pace.moved(at(1, "sample", 4))  # another attempt, from an older checkpoint
    assert pace.seconds_left() is None


# --- lines in a log ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def bar_of(clock: Clock, stopping: threading.Event | None = None) -> ProgressBar:
    return ProgressBar(Pace(8, 0, 0, clock), 0, stopping or threading.Event(), quiet=False)


def test_a_log_says_the_phase_at_once_and_the_pace_more_often_at_the_beginning(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = bar_of(clock)

    def lines_of(seconds: int) -> list[str]:
        for _ in range(seconds):
            clock.now += 1
            bar.refresh()
        return capsys.readouterr().err.splitlines()

    bar.phase("starting Ray")
    bar.phase("starting Ray")
    assert lines_of(0) == ["0/8 img in 00:00, starting Ray, time left unknown, failed 0"]
    assert len(lines_of(25)) == 2
    bar.phase("loading the model")
    assert lines_of(0) == ["0/8 img in 00:25, loading the model, time left unknown, failed 0"]
    bar.moved(at(0, "encode", 0))
    assert len(lines_of(100)) == 10, "nothing is committed"
    bar.moved(at(0, "sample", 1))
    lines_of(10)
    bar.moved(at(0, "sample", 5))
    bar.moved(at(1, "encode", 0))
    assert lines_of(10) == ["0/8 img in 02:25, sampling, 2 shards in flight at 25%, 0.08 img/s, 01:15 left, failed 0"]
    bar.committed(0, 4, 1)
    assert len(lines_of(180)) == 3
    bar.moved(at(1, "decode", 10))
    assert lines_of(60)[0].split(", ")[1:3] == ["decoding", "1 shard in flight at 100%"]


def test_a_run_that_is_asked_to_stop_says_so_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = threading.Event()
    bar = bar_of(clock, stopping)
    bar.moved(at(0, "sample", 5))
    stopping.set()
    bar.refresh()
    bar.refresh(now=True)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "stopping: workers write checkpoints, then end; press Ctrl-C again to end at once"
    assert ", stopping, 1 shard in flight at 50%, " in second
    assert ", stopping, 1 shard in flight at 50%, " in third


# --- a terminal -------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_of_a_terminal_moves_and_says_that_the_run_stops_while_the_driver_is_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal, stopping = Terminal(), threading.Event()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "REFRESH", 0.001)
    with ProgressBar(Pace(8, 2, 0), 0, stopping, quiet=False) as bar:
        bar.phase("starting Ray")
        shown = r"2/8 img \[\d\d:\d\d, starting Ray, time left unknown, failed 0\]"
        until(lambda: len(re.findall(shown, frames(terminal))) > 3)
        stopping.set()
        until(lambda: "stopping: workers write checkpoints" in frames(terminal))
    assert frames(terminal).count("stopping: ") == 1


def test_a_quiet_run_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, stopping = Terminal(), threading.Event()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar(Pace(8, 2, 0), 0, stopping, quiet=True) as bar:
        stopping.set()
        bar.moved(at(0, "sample", 5))
        bar.committed(0, 6, 0)
    assert terminal.getvalue() == ""


def frames(terminal: Terminal) -> str:
    return terminal.getvalue().replace("\r", "\n")
