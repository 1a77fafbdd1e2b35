"""While a shard is sampled, the next one is read, and checkpoints, images and files of the last one are written.

No test measures time. Where two things must go on at the same time, one waits until the other has begun or ended: if
they did not, the test would wait in vain.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_fixed

import stylemill.engine
import stylemill.execution.checkpointing
import stylemill.execution.local
import stylemill.execution.shard
from device_busy import Event, busy_and_idle
from fake_engine import FakeEngine
from ray_runs import RecordingListener, data_files, make_run
from stylemill.cluster.worker import Worker
from stylemill.errors import TransientError
from stylemill.execution.attempt import AutoSettings, Run
from stylemill.execution.local import run_inline

SHARDS, PAIRS, STEPS, EVERY_STEPS = 3, 2, 5, 2
LONGEST_WAIT = 60.0  # seconds, of a test that fails
DEVICE = {"step", "measure", "decode"}
HOST = {
    "read": (stylemill.execution.shard, "read_pairs"),
    "encode": (stylemill.execution.shard, "with_encoded_image"),
    "write": (stylemill.execution.shard, "write_tables"),
    "commit": (stylemill.execution.shard, "commit"),
    "checkpoint": (stylemill.execution.checkpointing, "save_progress"),
}


class Journal:
    """What threads began and ended, in order, as (thread, what). Each shard has a thread of its name."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda thread, what: None  # called before an entry
        self._happened: defaultdict[tuple[str, str], threading.Event] = defaultdict(threading.Event)
        self._lock = threading.Lock()

    def add(self, what: str) -> None:
        thread = threading.current_thread().name
        self.before(thread, what)
        with self._lock:
            self.entries.append((thread, what))
            self._happened[thread, what].set()

    def wait_for(self, thread: str, what: str) -> None:
        with self._lock:
            happened = self._happened[thread, what]
        assert happened.wait(LONGEST_WAIT), f"{thread}: no {what}"

    def of(self, thread: str) -> list[str]:
        return [what for name, what in self.entries if name == thread]

    def around(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.add(f"{what} begins")
            result = function(*arguments, **options)
            self.add(f"{what} ends")
            return result

        return call


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    journal = Journal()

    class Engine(FakeEngine):
        def sample(self, *arguments: Any, **options: Any) -> Iterator[Any]:
            states = super().sample(*arguments, **options)
            for step in range(1, STEPS + 1):
                yield journal.around(f"step {step}", next)(states)

        distances = journal.around("measure", FakeEngine.distances)
        decode = journal.around("decode", FakeEngine.decode)

    monkeypatch.setitem(vars(stylemill.engine), "Engine", Engine)
    for what, (module, name) in HOST.items():
        monkeypatch.setattr(module, name, journal.around(what, getattr(module, name)))
    return journal


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make(tmp_path / "run")


def make(folder: Path) -> Run:
    folder.mkdir()
    settings = {"sampling": {"steps": STEPS}, "checkpoint": {"every_steps": EVERY_STEPS}, "cluster": {"micro_batch": 2}}
    return make_run(folder, SHARDS * PAIRS, PAIRS, **settings)


def process_locally(run: Run) -> None:
    assert run_inline(run, range(SHARDS), {}, RecordingListener(), threading.Event()) == {}


def process_in_a_worker(run: Run, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the driver does with an actor: the next attempt is assigned while the first one is sampled."""
    monkeypatch.setattr(Worker, "_import_engine", lambda worker: None)
    worker = Worker(run)
    worker.load(AutoSettings())
    threads = []
    for shard in range(SHARDS):
        attempt = run.new_attempt(shard, {})
        threads.append(threading.Thread(target=worker.run_attempt, args=(attempt,), name=f"shard {shard}"))
        threads[-1].start()
        journal.wait_for(f"shard {shard}", "step 1 begins")
    for thread in threads:
        thread.join()


@pytest.fixture(params=["local", "worker"])
def process(request: pytest.FixtureRequest, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    if request.param == "local":
        return process_locally
    return lambda run: process_in_a_worker(run, journal, monkeypatch)


def test_the_next_shard_is_read_and_the_last_one_committed_while_the_device_works(
    process: Callable[[Run], None], journal: Journal, run: Run
) -> None:
    def before(thread: str, what: str) -> None:
        shard = int(thread.split()[-1].partition("_")[0])
        if what == "decode ends" and shard + 1 < SHARDS:
            journal.wait_for(f"shard {shard + 1}", "read ends")
        if what == f"step {STEPS} begins" and shard:
            journal.wait_for(f"shard {shard - 1}", "commit ends")

    journal.before = before
    process(run)
    assert len(data_files(run)) == SHARDS


def test_a_thread_that_holds_the_device_does_nothing_that_needs_no_device(
    process: Callable[[Run], None], journal: Journal, run: Run
) -> None:
    process(run)
    steps = [f"step {step}" for step in range(1, STEPS + 1)]
    stages = ["read", *steps, "measure", "decode", *["encode"] * PAIRS, "write", "commit"]
    for shard in range(SHARDS):
        assert journal.of(f"shard {shard}") == [f"{stage} {edge}" for stage in stages for edge in ("begins", "ends")]
    users = [thread for thread, what in journal.entries if what.split()[0] in DEVICE]
    assert users == sorted(users), "no shard uses the device before the one before it has left it"


def test_a_checkpoint_is_written_during_the_next_step_and_the_last_one_before_the_commit(
    process: Callable[[Run], None], journal: Journal, run: Run
) -> None:
    """One is written at a time, and it is published before the next step's result is used."""
    during = ["step 3", "step 5", "measure"]  # the work of the device after each checkpoint
    writes: defaultdict[str, Iterator[str]] = defaultdict(lambda: iter(during))

    def before(thread: str, what: str) -> None:
        if what == "checkpoint ends":
            shard = thread.partition("_")[0].removeprefix("checkpoints of ")
            journal.wait_for(shard, f"{next(writes[shard])} begins")

    journal.before = before
    process(run)
    for shard in range(SHARDS):
        own = [what for thread, what in journal.entries if f"shard {shard}" in thread]
        ends = [place for place, what in enumerate(own) if what == "checkpoint ends"]
        assert len(ends) == len(during)
        assert ends[0] < own.index("step 4 begins")
        assert ends[1] < own.index("measure begins")
        assert ends[2] < own.index("encode begins")
        edges = [what for what in own if what.startswith("checkpoint")]
        assert edges == ["checkpoint begins", "checkpoint ends"] * len(during)


def test_the_bytes_are_those_of_a_run_with_one_shard_at_a_time(
    process: Callable[[Run], None], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(run)
    alone = make(tmp_path / "alone")
    monkeypatch.setattr(stylemill.execution.local, "SHARDS_AT_A_TIME", 1)
    process_locally(alone)
    assert data_files(run) == data_files(alone)
    assert len(data_files(run)) == SHARDS


def test_an_error_that_no_retry_cures_ends_the_run_and_the_other_shard_leaves_with_a_checkpoint(
    journal: Journal, run: Run
) -> None:
    def before(thread: str, what: str) -> None:
        if (thread, what) == ("shard 0", "commit begins"):
            journal.wait_for("shard 1", "step 3 begins")
            raise RuntimeError("injected")
        if (thread, what) == ("shard 1", "step 3 ends"):
            for other in threading.enumerate():
                if other.name == "shard 0":
                    other.join()

    journal.before = before
    with pytest.raises(RuntimeError, match="injected"):
        process_locally(run)
    assert journal.of("shard 1")[-1] == "step 3 ends"
    (newest,) = (run.paths.checkpoints(1)).glob("progress-00003-*")
    assert newest.is_file()
    assert "shard 2" not in {thread for thread, _ in journal.entries}
    assert data_files(run) == {}


def test_an_error_that_ends_the_run_ends_the_pause_before_another_attempt(
    journal: Journal, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(thread: str, what: str) -> None:
        if (thread, what) == ("shard 0", "commit begins"):
            raise TransientError("the store is busy")
        if (thread, what) == ("shard 1", "decode begins"):
            journal.wait_for("shard 0", "pause begins")
            raise RuntimeError("injected")

    journal.before = before
    executor = stylemill.execution.local._Executor
    monkeypatch.setattr(executor, "_pause", journal.around("pause", executor._pause))
    monkeypatch.setattr(stylemill.execution.local, "wait_exponential", lambda max: wait_fixed(10 * LONGEST_WAIT))
    with pytest.raises(RuntimeError, match="injected"):
        process_locally(run)
    assert journal.of("shard 0")[-1] == "pause ends"


def test_the_benchmark_puts_each_wait_of_the_device_down_to_its_cause() -> None:
    events = [
        Event("step", 1, 0.0, 10.0, 9.5),
        Event("checkpoint", 1, 10.0, 11.0),
        Event("encode image files", 3, 10.0, 12.0),  # of a thread that neither had nor gets the device
        Event("decode", 1, 12.0, 20.0, 8.0),
        Event("read", 2, 15.0, 23.0),
        Event("encode image files", 1, 20.0, 24.0),
        Event("step", 2, 25.0, 30.0, 5.0),
    ]
    wall, busy, idle = busy_and_idle(events)
    assert (wall, busy) == (30.0, {"step": 14.5, "decode": 8.0})
    causes = {"late wake-up": 0.5, "checkpoint": 1.0, "read": 3.0, "encode image files": 1.0, "other": 2.0}
    assert {what: seconds for what, seconds in idle.items() if seconds} == causes
