"""Ray: a supervised pool of workers, each with a resident model. The only place that imports ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Event

from stylemill.cluster.pool import Pool
from stylemill.cluster.session import session
from stylemill.cluster.timeouts import Timeouts
from stylemill.execution.attempt import Listener, Run

__all__ = ["Timeouts", "run_on_ray"]


def run_on_ray(
    run: Run,
    shards: Sequence[int],
    occurrences: Mapping[int, int],
    listener: Listener,
    stopping: Event,
    patience: Timeouts | None = None,
) -> dict[int, str]:
    """Work until each of `shards` is committed or its attempts are used up; returns why the open ones are open.

    `occurrences` maps manifest row to occurrence, as `Manifest.repeated_rows` gives it. Once `stopping` is set, workers
    write checkpoints and leave. Raises ClusterError when Ray cannot be reached or has no room, InputError when no
    attempt can succeed, StylemillError when no worker survives its start, and whatever `listener` raises.
    """
    if not shards:
        return {}
    patience = patience or Timeouts()
    with session(run.job.cluster, patience.connect) as embedded:
        return Pool(run, shards, occurrences, listener, stopping, embedded, patience).work()
