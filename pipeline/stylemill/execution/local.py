"""The local executor: shards in this process, without Ray, sampled one after another. For debugging and notebooks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from stylemill.errors import TransientError
from stylemill.execution.attempt import Listener, Run
from stylemill.execution.shard import process_shard
from stylemill.execution.worker_engine import load_engine, loading_phase, numerics

if TYPE_CHECKING:
    from stylemill.engine import Engine

LONGEST_PAUSE = 30.0  # seconds before another attempt at a shard
LOOK_SECONDS = 0.2  # how often a pause looks whether the run ends
SHARDS_AT_A_TIME = 2  # one is sampled while the inputs of the next are read, or the images of the last are written


def run_inline(
    run: Run, shards: Sequence[int], occurrences: Mapping[int, int], listener: Listener, stopping: threading.Event
) -> dict[int, str]:
    """Commit every shard, or return {shard: why it is open}. Leaves with a checkpoint once `stopping` is set.

    Shards are sampled in their order. Each has a thread, so that its files are read and written while another is
    sampled. An error that no retry can cure ends the run, and the other shard leaves with a checkpoint.
    """
    auto = listener.auto_settings
    listener.phase(loading_phase(run, auto))
    engine = load_engine(run, auto)
    listener.record_numerics(numerics(engine))
    listener.phase("sampling")
    executor = _Executor(run, occurrences, engine, listener, stopping)
    executor.process(shards)
    return executor.reasons


class _Executor:
    """Processes shards in threads, of which one at a time has the device."""

    def __init__(
        self, run: Run, occurrences: Mapping[int, int], engine: Engine, listener: Listener, stopping: threading.Event
    ) -> None:
        self.reasons: dict[int, str] = {}  # why a shard is open
        self._run = run
        self._occurrences = occurrences
        self._engine = engine
        self._listener = listener
        self._listening = threading.Lock()  # the listener is called from one thread at a time, except for progress
        self._stopping = stopping
        self._device = threading.Lock()
        self._error: BaseException | None = None  # that ends the run

    def process(self, shards: Sequence[int]) -> None:
        """Start a thread for each shard in turn: when the shard before it has got the device, and another has ended."""
        free = threading.Semaphore(SHARDS_AT_A_TIME)
        try:
            for shard in shards:
                free.acquire()
                has_device = threading.Event()
                # A daemon: a second Ctrl-C ends the process without waiting for a step.
                arguments = (shard, has_device, free)
                threading.Thread(target=self._thread, args=arguments, name=f"shard {shard}", daemon=True).start()
                has_device.wait()
                if self._leaving():
                    break
            for _ in range(SHARDS_AT_A_TIME):
                free.acquire()  # all have ended
        except BaseException as error:
            self._error = error
        if self._error:
            raise self._error

    def _leaving(self) -> bool:
        return self._stopping.is_set() or self._error is not None

    def _thread(self, shard: int, has_device: threading.Event, free: threading.Semaphore) -> None:
        try:
            self._with_retries(shard, has_device)
        except TransientError as error:
            self.reasons[shard] = str(error)
        except BaseException as error:
            self._error = self._error or error
        finally:
            has_device.set()
            free.release()

    def _with_retries(self, shard: int, has_device: threading.Event) -> None:
        """Make attempts at a shard until it is committed, or until asked to stop. Raises the last TransientError."""
        attempts = 1 + self._run.job.retries

        def warn(state: RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            with self._listening:
                self._listener.warn(f"shard {shard}, attempt {state.attempt_number} of {attempts}: {error}")

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(max=LONGEST_PAUSE),
            sleep=self._pause,
            after=warn,
            reraise=True,
        )

        def attempt() -> None:
            if not self._leaving():  # the run may have ended during the pause
                self._attempt(shard, retrying.statistics["attempt_number"] == attempts, has_device)

        retrying(attempt)

    def _pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the run."""
        end = time.monotonic() + seconds
        while not self._leaving() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))

    def _attempt(self, shard: int, last: bool, has_device: threading.Event) -> None:
        new = replace(self._run.new_attempt(shard, self._occurrences), last=last)
        with self._listening:
            record = self._listener.committed_record(new)
        if record is None:
            device, progress = _holding(self._device, has_device), self._listener.progress
            record = process_shard(self._run, new, self._engine, device, progress, self._leaving)
        if record is not None:
            with self._listening:
                self._listener.committed(record)


@contextmanager
def _holding(device: threading.Lock, has_device: threading.Event) -> Iterator[None]:
    with device:
        has_device.set()
        yield
