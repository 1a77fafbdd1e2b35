"""The driver's side: sizes the pool, attempts shards to workers, listens, and replaces workers that die."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import stylemill
from stylemill.cluster.actors import Actors, Call, Reply, WorkerHandle, machines
from stylemill.cluster.assignment import Assignments
from stylemill.cluster.capacity import worker_capacity, worker_resources
from stylemill.cluster.timeouts import Timeouts, backoff
from stylemill.cluster.worker import Loaded, WorkerLocation
from stylemill.errors import ClusterError, InputError, ModelError, StylemillError, TransientError
from stylemill.execution.attempt import Attempt, Listener, Run
from stylemill.store.checkpoints import newest_step
from stylemill.store.ledger import Ledger

TICK = 0.25  # seconds between two looks at `stopping`
LONGEST_TICK = 10  # seconds that count for one: a driver that was itself stopped blames no worker for that
STARTS = 3  # workers that may die one after another before any of them has loaded the model


class Pool:
    """Supervised workers. What is done is read from the ledger; who does what is the attempt book's decision."""

    def __init__(
        self,
        run: Run,
        shards: Sequence[int],
        occurrences: Mapping[int, int],
        listener: Listener,
        stopping: Event,
        embedded: bool,
        patience: Timeouts,
    ) -> None:
        self._run = run
        self._job = run.job.cluster
        self._occurrences = occurrences
        self._listener = listener
        self._stopping = stopping
        self._patience = patience
        self._awake, self._ticked = 0.0, time.monotonic()  # seconds that workers were listened to
        self._book = Assignments(
            shards,
            1 + run.job.retries,
            clock=lambda: self._awake,
            pairs=lambda shard: len(run.rows_of(shard)),
            saved=self._saved,
            every=run.job.checkpoint.every_steps,
        )
        self._ledger = Ledger(run.paths)
        self._machines, self._surveyed = machines(), time.monotonic()
        self._ask = worker_resources(self._job, self._machines)
        self._actors = Actors(run, self._ask)
        self._first: Loaded | None = None  # by the first worker that was ready
        given = self._job.micro_batch
        self._micro_batch = listener.micro_batch or (given if isinstance(given, int) else None)
        self._deaths = 0  # since a shard was committed
        self._stillborn = 0  # deaths before the model was loaded, since a worker loaded it
        self._create_after = 0.0
        self._told: set[str] = set()
        self._unfit: dict[str, BaseException] = {}  # machines that the model cannot be loaded on, and why
        if embedded and not any(self._ask.fits(machine) for machine in self._machines):
            raise self._no_room()  # nor will there ever be

    def work(self) -> dict[int, str]:
        """See `run_on_ray`."""
        try:
            while self._book.open and not self._stopping.is_set():
                self._resize()
                self._load()
                self._lease()
                self._ask_for_beats()
                self._listen()
                self._replace_hanging()
            self._leave()
        except Exception:
            self._leave(quiet=True)
            raise
        finally:
            for worker in list(self._actors.workers.values()):
                self._actors.remove(worker)
        return self._book.unfinished()

    def _saved(self, shard: int) -> int:
        return newest_step(self._run.paths, shard) or self._run.job.sampling.first_step

    # --- the size of the pool -----------------------------------------------------------------------------------------

    def _resize(self) -> None:
        """As many workers as there is room for, and never more than open shards."""
        now, workers = time.monotonic(), self._actors.workers
        if now - self._surveyed > self._patience.survey:
            self._machines, self._surveyed = machines(), now
        resident = self._first.resident if self._first else 0
        wanted = min(worker_capacity(self._job, self._ask, self._machines, resident), self._book.open)
        idle = [worker for worker in workers.values() if not self._book.held_by(worker.number)]
        idle.sort(key=lambda worker: (worker.ready, worker.loading, worker.location is not None))
        for worker in idle[: max(len(workers) - wanted, 0)]:
            self._actors.remove(worker)
        if now >= self._create_after:
            for _ in range(wanted - len(workers)):
                self._actors.create()
        self._check_placing(now)

    def _check_placing(self, now: float) -> None:
        """A pool goes on with the workers it has; with none at all it waits only so long."""
        workers = self._actors.workers.values()
        waiting = [worker for worker in workers if not worker.location]
        longest = now - min((worker.since for worker in waiting), default=now)
        if longest > self._patience.place and len(waiting) == len(workers):
            raise self._no_room()
        if longest > self._patience.remark:
            self._check_machines(to_come=False)
            self._tell(f"waiting for Ray to place more workers; each asks for {self._ask}")

    def _no_room(self) -> ClusterError:
        has = [f"{sum(machine.get(name, 0) for machine in self._machines):g} {name}s" for name in ("GPU", "CPU")]
        return ClusterError(
            f"Ray has no room for a worker: each asks for {self._ask}, and the cluster has {' and '.join(has)} in all, "
            f"free or not, on {len(self._machines)} machines; change cluster.gpus_per_worker or cluster.threads, or "
            "free some"
        )

    # --- workers at work ----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Placed workers load the model; the first one alone where it settles the micro-batch, or shows how much
        memory the others need."""
        workers = self._actors.workers.values()
        alone = self._first is None and (
            self._micro_batch is None or (self._job.workers == "auto" and not self._ask.gpus)
        )
        for worker in workers:
            if alone and any(other.loading for other in workers):
                return
            if self._may_load(worker) and not worker.loading:
                worker.loading, worker.loading_since = True, self._awake
                self._actors.call(worker, "load", self._micro_batch)

    def _lease(self) -> None:
        workers = self._actors.workers
        able = [worker.number for worker in workers.values() if worker.ready and not worker.retiring]
        coming = sum(self._may_load(worker) for worker in workers.values())
        while choice := self._book.choose(able, coming):
            number, shard = choice
            attempt = self._book.fit_out(self._run.new_attempt(shard, self._occurrences))
            self._book.grant(number, attempt)
            try:
                record = self._ledger.read(shard, attempt.generation)
            except TransientError as error:
                self._failed(attempt, str(error))
                continue
            if record is None:
                self._actors.call(workers[number], "probe" if attempt.probe else "work", attempt)
            else:  # by an attempt whose worker died just afterwards
                self._book.done(attempt)
                self._listener.committed(record)

    def _ask_for_beats(self) -> None:
        now = time.monotonic()
        for worker in self._actors.workers.values():
            if worker.ready and worker.asked <= worker.heard and now - worker.asked > self._patience.beat:
                worker.asked = now
                self._actors.call(worker, "beat")

    def _leave(self, quiet: bool = False) -> None:
        """Workers in the middle of a shard write its checkpoint; the others have nothing to lose.

        `quiet`: an error is on its way already, and further ones neither hide it nor keep the rest from being heard.
        """
        for worker in list(self._actors.workers.values()):
            if self._book.held_by(worker.number):
                self._actors.call(worker, "stop")
            else:
                self._actors.remove(worker)
        deadline = time.monotonic() + self._patience.leave
        while self._book.held and time.monotonic() < deadline:
            try:
                self._listen()
            except Exception:
                if not quiet:
                    raise

    # --- answers ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        now = time.monotonic()
        self._awake, self._ticked = self._awake + min(now - self._ticked, LONGEST_TICK), now
        for reply in self._actors.replies(TICK):
            worker = reply.call.worker
            if reply.died is not None:
                self._lost(worker, reply.died)
            elif reply.raised is not None:
                self._raised(reply, reply.raised)
            else:
                self._answered(reply.call, reply.answer)
            there = worker.number in self._actors.workers  # it may just have been lost
            if there and worker.retiring and not self._book.held_by(worker.number):
                self._actors.remove(worker)

    def _answered(self, call: Call, answer: Any) -> None:
        worker = call.worker
        if call.attempt and call.attempt.probe:
            self._book.survived(call.attempt) if answer else self._book.returned(call.attempt)
        elif call.attempt:
            self._finished(call.attempt, answer)
        elif call.method == "hello":
            self._greet(worker, answer)
        elif call.method == "load":
            self._ready(worker, answer)
        elif call.method == "beat":
            worker.heard = time.monotonic()
            for progress in answer:
                self._book.note(progress)
                self._listener.progress(progress)

    def _finished(self, attempt: Attempt, record: Any) -> None:
        if record is None:
            self._book.returned(attempt)
            return
        self._book.done(attempt)
        self._deaths = 0
        self._listener.committed(record)

    def _greet(self, worker: WorkerHandle, location: WorkerLocation) -> None:
        if location.version != stylemill.__version__:
            raise ClusterError(
                f"{location.host} has stylemill {location.version}, this machine {stylemill.__version__}; install the "
                "same version on both"
            )
        worker.location = location
        self._check_machines()

    def _ready(self, worker: WorkerHandle, loaded: Loaded) -> None:
        worker.loading, worker.ready, worker.heard = False, True, time.monotonic()
        self._stillborn = 0
        if self._first is None:
            self._first = loaded
            self._micro_batch = int(loaded.numerics["micro_batch"])
            self._listener.record_numerics(loaded.numerics)
            return
        first = self._first.numerics
        if differing := [
            f"{key} {value}, not {first[key]}" for key, value in loaded.numerics.items() if value != first[key]
        ]:
            self._tell(f"a worker differs from the first ({'; '.join(differing)}): its images may differ in low bits")

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def _raised(self, reply: Reply, error: BaseException) -> None:
        """A method raised and its worker lives. Only our own errors leave a worker that can be trusted."""
        worker, attempt, ours = reply.call.worker, reply.call.attempt, isinstance(error, StylemillError)
        if isinstance(error, InputError) and not (worker.loading and isinstance(error, ModelError)):
            if attempt:
                self._book.failed(attempt, str(error))
            raise error
        if not worker.ready and isinstance(error, ImportError):
            raise _not_installed(str(error))
        why = str(error) if ours else f"{type(error).__name__}: {error}"
        if worker.loading:
            self._give_up_machine(worker, error, why)
            return
        if not ours:
            self._tell(reply.trace)
        if attempt is None:
            self._lost(worker, why)
            return
        # What else that worker was doing may fail for the same reason: a CUDA error stays until its process ends.
        self._failed(attempt, why, charged=not worker.retiring, fatal=not ours)
        worker.retiring |= not ours

    def _give_up_machine(self, worker: WorkerHandle, error: BaseException, why: str) -> None:
        """The model cannot be loaded there: the others go on, if there are any."""
        assert worker.location  # it was greeted before it was to load
        worker.loading = False  # it stays, and keeps the place, so that no other worker comes to it
        ours = isinstance(error, StylemillError)
        self._unfit[worker.location.host] = error if ours else StylemillError(f"the model cannot be loaded: {why}")
        self._check_machines()
        self._tell(f"the model cannot be loaded on {worker.location.host}, which is given up; others go on: {why}")

    def _check_machines(self, to_come: bool = True) -> None:
        """Raises why the model could not be loaded when no machine is left to try it on, nor, if so, one `to_come`."""
        workers = self._actors.workers.values()
        left = (worker.ready or self._may_load(worker) or (to_come and not worker.location) for worker in workers)
        if self._unfit and not any(left):
            raise list(self._unfit.values())[-1]

    def _may_load(self, worker: WorkerHandle) -> bool:
        return worker.location is not None and not worker.ready and worker.location.host not in self._unfit

    def _replace_hanging(self) -> None:
        """Kill the workers that made no progress for longer than they may."""
        workers, longest = self._actors.workers, self._job.stage_timeout
        hanging = {
            worker.number: f"no progress for {longest:.0f} s while loading the model"
            for worker in workers.values()
            if worker.loading and self._awake - worker.loading_since > longest
        }
        for number, why in {**dict(self._book.overdue(longest)), **hanging}.items():
            setting = "cluster.stage_timeout and cluster.step_timeout say how long that may be"
            self._lost(workers[number], f"{why}; {setting}", hangs=True)

    def _failed(self, attempt: Attempt, why: str, charged: bool = True, fatal: bool = False) -> None:
        again = self._book.failed(attempt, why, charged, fatal)
        then = "it is tried again" if again else "its attempts are used up; the next start tries again"
        self._listener.warn(f"shard {attempt.shard}: {why}; {then}")

    def _lost(self, worker: WorkerHandle, why: str, hangs: bool = False) -> None:
        """A worker is gone, or `hangs`: its shards go back, and another takes its place after a while."""
        if not worker.location and "ModuleNotFoundError" in why:  # Ray could not even make a Worker there
            raise _not_installed(why)
        attempts = self._book.held_by(worker.number)
        held, expected = [str(attempt.shard) for attempt in attempts], any(attempt.probe for attempt in attempts)
        self._book.lost(worker.number, f"{worker} died: {why}")
        (self._actors.kill if hangs else self._actors.remove)(worker)
        self._deaths += not expected
        self._create_after = time.monotonic() + backoff(self._deaths)
        self._stillborn += not worker.ready
        if self._stillborn >= STARTS and not any(other.ready for other in self._actors.workers.values()):
            raise StylemillError(f"{self._stillborn} workers in a row died before they were ready, the last one: {why}")
        doing = f"with shard {' and '.join(held)} in work" if held else "idle" if worker.ready else "while starting"
        self._listener.warn(f"{worker} died {doing}: {why}; another takes its place")

    def _tell(self, message: str) -> None:
        """Warn once."""
        if message not in self._told:
            self._told.add(message)
            self._listener.warn(message)


def _not_installed(why: str) -> ClusterError:
    return ClusterError(
        f"a worker cannot import stylemill ({why}); install the same stylemill on every machine of the cluster"
    )
