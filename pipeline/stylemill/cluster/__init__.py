"""The executor that runs shards on Ray: a supervised pool of workers, each with the model loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Event

from stylemill.cluster.pool import Pool
from stylemill.cluster.session import ray_session
from stylemill.cluster.timeouts import Timeouts
from stylemill.execution.attempt import Listener, Run

__all__ = ["Timeouts", "run_on_ray"]


def run_on_ray(
    run: Run,
    shards: Sequence[int],
    occurrences: Mapping[int, int],
    listener: Listener,
    stopping: Event,
    timeouts: Timeouts | None = None,
) -> dict[int, str]:
    """Process `shards` until each is committed or has no attempts left; returns the open ones with the reason.

    `occurrences` maps manifest row to occurrence, as `Manifest.repeated_rows` returns it. Once `stopping` is set,
    workers write checkpoints and end. Raises ClusterError if Ray cannot be reached or cannot place a worker, InputError
    if no attempt can succeed, StylemillError if no worker can start, and what `listener` raises.
    """
    if not shards:
        return {}
    timeouts = timeouts or Timeouts()
    address = run.job.cluster.address
    listener.phase("starting Ray" if address is None else f"connecting to Ray at {address}")
    with ray_session(run.job.cluster, timeouts.connect) as local:
        open_shards = Pool(run, shards, occurrences, listener, stopping, local, timeouts).run()
        listener.phase("leaving Ray")
        return open_shards
