"""The local executor: shards one after another in this process, without Ray. For debugging and notebooks."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential,
)

from stylemill.errors import TransientError
from stylemill.execution.attempt import Listener, Run
from stylemill.execution.shard import process_shard
from stylemill.execution.worker_engine import load_engine, loading_phase, numerics

if TYPE_CHECKING:
    from stylemill.engine import Engine

LONGEST_PAUSE = 30.0  # seconds before another attempt at a shard


def run_inline(
    run: Run, shards: Sequence[int], occurrences: Mapping[int, int], listener: Listener, stopping: threading.Event
) -> dict[int, str]:
    """Commit every shard, or return {shard: why it is open}. Leaves with a checkpoint once `stopping` is set."""
    auto = listener.auto_settings
    listener.phase(loading_phase(run, auto))
    engine = load_engine(run, auto)
    listener.record_numerics(numerics(engine))
    listener.phase("sampling")
    reasons: dict[int, str] = {}
    for shard in shards:
        if stopping.is_set():
            break
        try:
            _with_retries(run, shard, occurrences, engine, listener, stopping)
        except TransientError as error:
            reasons[shard] = str(error)
    return reasons


def _with_retries(
    run: Run,
    shard: int,
    occurrences: Mapping[int, int],
    engine: Engine,
    listener: Listener,
    stopping: threading.Event,
) -> None:
    """Make attempts at a shard until it is committed, or until asked to stop. Raises the last TransientError."""
    attempts = 1 + run.job.retries

    def warn(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        listener.warn(f"shard {shard}, attempt {state.attempt_number} of {attempts}: {error}")

    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        stop=stop_after_attempt(attempts) | stop_when_event_set(stopping),
        wait=wait_exponential(max=LONGEST_PAUSE),
        sleep=sleep_using_event(stopping),
        after=warn,
        reraise=True,
    )

    def attempt() -> None:
        if stopping.is_set():  # during the pause
            return
        last = retrying.statistics["attempt_number"] == attempts
        new = replace(run.new_attempt(shard, occurrences), last=last)
        record = listener.committed_record(new)
        if record is None:
            record = process_shard(run, new, engine, nullcontext(), listener.progress, stopping.is_set)
        if record is not None:
            listener.committed(record)

    retrying(attempt)
