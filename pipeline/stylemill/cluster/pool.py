"""The worker pool: sets its size, loads models, assigns shards to workers, and handles their replies."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from threading import Event
from typing import Any

import stylemill
from stylemill.cluster.actors import Actors, Call, WorkerHandle, machine_resources
from stylemill.cluster.assignment import Assignments
from stylemill.cluster.capacity import worker_capacity, worker_resources
from stylemill.cluster.failures import FailureHandler
from stylemill.cluster.timeouts import DriverClock, Timeouts
from stylemill.cluster.worker import LoadedModel, WorkerLocation
from stylemill.errors import ClusterError, TransientError
from stylemill.execution.attempt import Attempt, Listener, Run
from stylemill.execution.worker_engine import loading_phase
from stylemill.plural import counted
from stylemill.store.checkpoints import newest_step
from stylemill.store.records import Record

REPLY_TIMEOUT = 0.25  # seconds; `stopping` is checked that often


class Pool:
    """Ray actors that process `shards`. The listener says which are committed, `Assignments` who processes which.

    `local` says that Ray runs on this machine only for this run, so its resources cannot grow.
    """

    def __init__(
        self,
        run: Run,
        shards: Sequence[int],
        occurrences: Mapping[int, int],
        listener: Listener,
        stopping: Event,
        local: bool,
        timeouts: Timeouts,
    ) -> None:
        self._run = run
        self._settings = run.job.cluster
        self._occurrences = occurrences
        self._listener = listener
        self._warn_once = cache(listener.warn)  # each message is passed on once
        self._stopping = stopping
        self._phase_of_placement = "starting a worker" if local else "waiting for a machine"
        self._timeouts = timeouts
        self._clock = DriverClock()
        self._assignments = Assignments(
            shards,
            1 + run.job.retries,
            clock=self._clock,
            pairs_in=lambda shard: len(run.rows_of(shard)),
            checkpoint_step=self._checkpoint_step,
            checkpoint_every=run.job.checkpoint.every_steps,
        )
        self._machines, self._machines_read_at = machine_resources(), time.monotonic()
        self._resources = worker_resources(self._settings, self._machines)
        self._actors = Actors(run, self._resources)
        self._failures = FailureHandler(
            self._actors, self._assignments, listener.warn, self._warn_once, self._clock, self._settings.stage_timeout
        )
        self._first_model: LoadedModel | None = None  # of the first worker that was ready
        self._auto = listener.auto_settings
        if local and not any(self._resources.number_on(machine) for machine in self._machines):
            raise self._placement_error()

    def run(self) -> dict[int, str]:
        """Process the shards; see `run_on_ray`."""
        try:
            while self._assignments.num_open and not self._stopping.is_set():
                self._resize()
                self._load_models()
                self._report_phase()
                self._assign_shards()
                self._poll_progress()
                self._handle_replies()
                self._failures.replace_hanging_workers()
            self._shut_down()
        except Exception:
            self._shut_down(ignore_errors=True)
            raise
        finally:
            for worker in list(self._actors.workers.values()):
                self._actors.remove(worker)
        return self._assignments.open_shards()

    def _checkpoint_step(self, shard: int) -> int:
        return newest_step(self._run.paths, shard) or self._run.job.sampling.first_step

    # --- size of the pool ---------------------------------------------------------------------------------------------

    def _resize(self) -> None:
        """Create or remove workers: as many as the cluster can hold, and no more than there are open shards."""
        now, workers = time.monotonic(), self._actors.workers
        if now - self._machines_read_at > self._timeouts.cluster_poll_interval:
            self._machines, self._machines_read_at = machine_resources(), now
        resident_bytes = self._first_model.resident_bytes if self._first_model else 0
        capacity = worker_capacity(self._settings, self._resources, self._machines, resident_bytes)
        wanted = min(capacity, self._assignments.num_open)
        idle = [worker for worker in workers.values() if not self._assignments.attempts_of(worker.number)]
        idle.sort(key=lambda worker: (worker.ready, worker.loading, worker.location is not None))
        for worker in idle[: max(len(workers) - wanted, 0)]:
            self._actors.remove(worker)
        if now >= self._failures.create_after:
            for _ in range(wanted - len(workers)):
                self._actors.create()
        self._check_placement(now)

    def _check_placement(self, now: float) -> None:
        """Warn if Ray has not placed a worker for a while. Raises ClusterError if it has placed none at all."""
        workers = self._actors.workers.values()
        unplaced = [worker for worker in workers if not worker.location]
        longest = now - min((worker.created_at for worker in unplaced), default=now)
        if longest > self._timeouts.placement and len(unplaced) == len(workers):
            raise self._placement_error()
        if longest > self._timeouts.placement_notice:
            self._failures.check_hosts(include_unplaced=False)
            self._warn_once(f"waiting for Ray to place more workers; a worker needs {self._resources}")

    def _placement_error(self) -> ClusterError:
        totals = [f"{sum(machine.get(name, 0) for machine in self._machines):g} {name}s" for name in ("GPU", "CPU")]
        return ClusterError(
            f"Ray cannot place a worker: a worker needs {self._resources}, and the cluster has {' and '.join(totals)} "
            f"in total, free or in use, on {counted(len(self._machines), 'machine')}; change "
            "cluster.gpus_per_worker or cluster.threads, or free resources"
        )

    # --- work for the workers -----------------------------------------------------------------------------------------

    def _load_models(self) -> None:
        """Let the placed workers load the model.

        The first worker loads it alone if it has to choose dtype or micro-batch, or to show how much memory a worker
        needs.
        """
        workers = self._actors.workers.values()
        chooses_dtype = self._run.job.model.dtype == "auto" and self._auto.dtype is None
        chooses_micro_batch = self._settings.micro_batch == "auto"  # its device may be none of an earlier start
        shows_memory = self._settings.workers == "auto" and not self._resources.gpus
        alone = self._first_model is None and (chooses_dtype or chooses_micro_batch or shows_memory)
        for worker in workers:
            if alone and any(other.loading for other in workers):
                return
            if self._failures.may_load(worker) and not worker.loading:
                worker.loading, worker.loading_since = True, self._clock()
                self._actors.call(worker, "load", self._auto)

    def _report_phase(self) -> None:
        workers = self._actors.workers.values()
        if any(worker.ready for worker in workers):
            self._listener.phase("sampling")
        elif any(worker.loading for worker in workers):
            self._listener.phase(loading_phase(self._run, self._auto))
        else:
            self._listener.phase(self._phase_of_placement)

    def _assign_shards(self) -> None:
        workers = self._actors.workers
        available = [worker.number for worker in workers.values() if worker.ready and not worker.draining]
        num_loading = sum(self._failures.may_load(worker) for worker in workers.values())
        while choice := self._assignments.choose(available, num_loading):
            number, shard = choice
            attempt = self._assignments.with_history(self._run.new_attempt(shard, self._occurrences))
            self._assignments.assign(number, attempt)
            try:
                record = self._listener.committed_record(attempt)
            except TransientError as error:
                self._failures.attempt_failed(attempt, str(error))
                continue
            if record is None:
                self._actors.call(workers[number], "run_probe" if attempt.probe else "run_attempt", attempt)
            else:  # an earlier worker committed the shard and died before it replied
                self._attempt_committed(attempt, record)

    def _poll_progress(self) -> None:
        now = time.monotonic()
        for worker in self._actors.workers.values():
            answered = worker.polled_at <= worker.answered_at
            if worker.ready and answered and now - worker.polled_at > self._timeouts.poll_interval:
                worker.polled_at = now
                self._actors.call(worker, "progress")

    def _shut_down(self, ignore_errors: bool = False) -> None:
        """Let the workers write checkpoints of the shards they process; remove those that process none.

        With `ignore_errors`, an error is being raised already: further ones must not replace it, and must not keep the
        driver from handling the other replies.
        """
        for worker in list(self._actors.workers.values()):
            if self._assignments.attempts_of(worker.number):
                self._actors.call(worker, "stop")
            else:
                self._actors.remove(worker)
        deadline = time.monotonic() + self._timeouts.shutdown
        while self._assignments.num_assigned and time.monotonic() < deadline:
            try:
                self._handle_replies()
            except Exception:
                if not ignore_errors:
                    raise

    # --- replies ------------------------------------------------------------------------------------------------------

    def _handle_replies(self) -> None:
        self._clock.advance()
        for reply in self._actors.replies(REPLY_TIMEOUT):
            worker = reply.call.worker
            if reply.death is not None:
                self._failures.worker_died(worker, reply.death)
            elif reply.exception is not None:
                self._failures.worker_raised(reply, reply.exception)
            else:
                self._handle_value(reply.call, reply.value)
            removed = worker.number not in self._actors.workers
            if worker.draining and not removed and not self._assignments.attempts_of(worker.number):
                self._actors.remove(worker)

    def _handle_value(self, call: Call, value: Any) -> None:
        worker = call.worker
        if call.attempt and call.attempt.probe:
            self._assignments.probe_survived(call.attempt) if value else self._assignments.stopped(call.attempt)
        elif call.attempt:
            self._attempt_finished(call.attempt, value)
        elif call.method == "location":
            self._worker_placed(worker, value)
        elif call.method == "load":
            self._model_loaded(worker, value)
        elif call.method == "progress":
            worker.answered_at = time.monotonic()
            for progress in value:
                if self._assignments.record_progress(progress):
                    self._listener.progress(progress)

    def _attempt_finished(self, attempt: Attempt, record: Record | None) -> None:
        if record is None:
            self._assignments.stopped(attempt)
            return
        self._failures.shard_committed()
        self._attempt_committed(attempt, record)

    def _attempt_committed(self, attempt: Attempt, record: Record) -> None:
        try:
            self._listener.committed(record)
        except TransientError as error:
            self._failures.attempt_failed(attempt, str(error))
            return
        except Exception:
            self._assignments.committed(attempt)  # the shut-down does not wait for it
            raise
        self._assignments.committed(attempt)

    def _worker_placed(self, worker: WorkerHandle, location: WorkerLocation) -> None:
        if location.version != stylemill.__version__:
            raise ClusterError(
                f"{location.host} has stylemill {location.version}, this machine {stylemill.__version__}; install the "
                "same version on both"
            )
        worker.location = location
        self._failures.check_hosts()

    def _model_loaded(self, worker: WorkerHandle, model: LoadedModel) -> None:
        worker.loading, worker.ready, worker.answered_at = False, True, time.monotonic()
        self._failures.model_loaded()
        self._auto = self._auto.with_choices_of(model.numerics)
        if self._first_model is None:
            self._first_model = model
            self._listener.record_numerics(model.numerics)
            return
        first = self._first_model.numerics
        if differences := [
            f"{key} {value}, not {first[key]}" for key, value in model.numerics.items() if value != first[key]
        ]:
            self._warn_once(
                f"a worker differs from the first one ({'; '.join(differences)}): its images may differ in low bits"
            )
