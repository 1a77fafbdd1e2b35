"""Run shards one after another in this process, without Ray: for debugging, notebooks and machines without Ray."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from stylemill.errors import TransientError
from stylemill.execution.attempt import Listener, Run
from stylemill.execution.shard import process_shard
from stylemill.execution.worker_engine import load_engine, numerics


def run_inline(
    run: Run, shards: Sequence[int], occurrences: Mapping[int, int], listener: Listener, stopping: threading.Event
) -> dict[int, str]:
    """Commit every shard, or return {shard: why it is still open}; leaves with a checkpoint when `stopping` is set."""
    engine = load_engine(run, listener.micro_batch)
    listener.settle(numerics(engine))
    still_open: dict[int, str] = {}
    for shard in shards:
        for number in range(1 + run.job.retries):
            if stopping.is_set():
                break
            attempt = run.new_attempt(shard, occurrences)
            try:
                record = process_shard(run, attempt, engine, nullcontext(), listener.progress, stopping.is_set)
            except TransientError as error:
                still_open[shard] = str(error)
                listener.warn(f"shard {shard}, attempt {number + 1} of {1 + run.job.retries}: {error}")
                if number < run.job.retries:
                    stopping.wait(min(2.0**number, 30.0))
                continue
            if record:
                still_open.pop(shard, None)
                listener.committed(record)
            break
        if stopping.is_set():
            break
    return still_open
