"""What the driver does when a worker dies, hangs or raises an error, or when a machine cannot load the model."""

from __future__ import annotations

import time
from collections.abc import Callable

from stylemill.cluster.actors import Actors, Reply, WorkerHandle
from stylemill.cluster.assignment import Assignments
from stylemill.cluster.timeouts import backoff
from stylemill.errors import ClusterError, InputError, ModelError, StylemillError
from stylemill.execution.attempt import Attempt

MAX_DEATHS_AT_START = 3  # workers that may die in a row before any of them has loaded the model


class FailureHandler:
    """Removes failed workers, returns their shards to `assignments`, and raises when no worker can succeed.

    `warn` passes a message to the user, `warn_once` only if it is new. `stage_timeout` is the number of seconds on
    `clock` after which a worker hangs that loads the model or has not reported progress.
    """

    def __init__(
        self,
        actors: Actors,
        assignments: Assignments,
        warn: Callable[[str], None],
        warn_once: Callable[[str], None],
        clock: Callable[[], float],
        stage_timeout: float,
    ) -> None:
        self.create_after = 0.0  # time.monotonic() before which no worker may be created
        self._actors = actors
        self._assignments = assignments
        self._warn, self._warn_once = warn, warn_once
        self._clock = clock
        self._stage_timeout = stage_timeout
        self._deaths = 0  # since a shard was committed
        self._deaths_at_start = 0  # of workers without a model, since one was loaded
        self._load_errors: dict[str, BaseException] = {}  # by host on which the model cannot be loaded

    def shard_committed(self) -> None:
        self._deaths = 0

    def model_loaded(self) -> None:
        self._deaths_at_start = 0

    def attempt_failed(self, attempt: Attempt, reason: str, charged: bool = True, fatal: bool = False) -> None:
        """Record and report a failed attempt; `charged` and `fatal` as in `Assignments.failed`."""
        retried = self._assignments.failed(attempt, reason, charged, fatal)
        next_step = "it is tried again" if retried else "no attempts are left; run the same command to try it again"
        self._warn(f"shard {attempt.shard}: {reason}; {next_step}")

    def worker_raised(self, reply: Reply, error: BaseException) -> None:
        """Handle an exception of a worker's method. Re-raises an InputError, which no other attempt can avoid.

        A worker continues after a StylemillError. After any other error its process cannot be trusted: it is drained.
        """
        worker, attempt, expected = reply.call.worker, reply.call.attempt, isinstance(error, StylemillError)
        if isinstance(error, InputError) and not (worker.loading and isinstance(error, ModelError)):
            if attempt:
                self._assignments.failed(attempt, str(error))
            raise error
        if not worker.ready and isinstance(error, ImportError):
            raise _import_error(str(error))
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        if worker.loading:
            cause = error if expected else StylemillError(f"the model cannot be loaded: {reason}")
            self._load_failed(worker, cause, reason)
            return
        if not expected:
            self._warn_once(reply.traceback)
        if attempt is None:
            self.worker_died(worker, reason)
            return
        # The other attempt of a draining worker may fail for the same reason, so it is not charged: after a CUDA error,
        # every call fails until the process ends.
        self.attempt_failed(attempt, reason, charged=not worker.draining, fatal=not expected)
        worker.draining |= not expected

    def worker_died(self, worker: WorkerHandle, reason: str, hangs: bool = False) -> None:
        """Remove a worker that died or `hangs`. Its shards are attempted again, and another worker is created later.

        Raises ClusterError if the worker cannot import stylemill, StylemillError after MAX_DEATHS_AT_START.
        """
        if not worker.location and "ModuleNotFoundError" in reason:  # Ray could not create the actor
            raise _import_error(reason)
        attempts = self._assignments.attempts_of(worker.number)
        shards, probing = [str(attempt.shard) for attempt in attempts], any(attempt.probe for attempt in attempts)
        self._assignments.worker_died(worker.number, f"{worker} died: {reason}")
        (self._actors.kill if hangs else self._actors.remove)(worker)
        self._deaths += not probing
        self.create_after = time.monotonic() + backoff(self._deaths)
        self._deaths_at_start += not worker.ready
        others_ready = any(other.ready for other in self._actors.workers.values())
        if self._deaths_at_start >= MAX_DEATHS_AT_START and not others_ready:
            raise StylemillError(
                f"{self._deaths_at_start} workers in a row died before they were ready, the last one: {reason}"
            )
        if shards:
            state = f"while processing shard {' and '.join(shards)}"
        else:
            state = "while idle" if worker.ready else "while starting"
        self._warn(f"{worker} died {state}: {reason}; a new worker replaces it")

    def replace_hanging_workers(self) -> None:
        """Kill the workers that made no progress for longer than their limit."""
        workers, limit = self._actors.workers, self._stage_timeout
        loading = {
            worker.number: f"no progress for {limit:.0f} s while loading the model"
            for worker in workers.values()
            if worker.loading and self._clock() - worker.loading_since > limit
        }
        for number, reason in {**dict(self._assignments.overdue(limit)), **loading}.items():
            advice = "cluster.stage_timeout and cluster.step_timeout set the limit"
            self.worker_died(workers[number], f"{reason}; {advice}", hangs=True)

    def may_load(self, worker: WorkerHandle) -> bool:
        """Whether the worker is placed on a machine on which loading the model has not failed, and is not ready."""
        return worker.location is not None and not worker.ready and worker.location.host not in self._load_errors

    def check_hosts(self, include_unplaced: bool = True) -> None:
        """Raise the last error of loading the model if no worker is left that has loaded it or may load it.

        A worker that Ray has not placed yet may load it, unless `include_unplaced` is false.
        """
        workers = self._actors.workers.values()
        usable = (
            worker.ready or self.may_load(worker) or (include_unplaced and not worker.location) for worker in workers
        )
        if self._load_errors and not any(usable):
            raise list(self._load_errors.values())[-1]

    def _load_failed(self, worker: WorkerHandle, error: BaseException, reason: str) -> None:
        """Stop using the worker's machine. Raises the error if the model cannot be loaded on any other."""
        assert worker.location  # a worker is placed before it loads
        worker.loading = False  # the worker keeps its resources, so that Ray places no other one there
        self._load_errors[worker.location.host] = error
        self.check_hosts()
        self._warn_once(
            f"the model cannot be loaded on {worker.location.host}: {reason}; the run continues on other machines"
        )


def _import_error(reason: str) -> ClusterError:
    return ClusterError(
        f"a worker cannot import stylemill ({reason}); install the same stylemill on every machine of the cluster"
    )
