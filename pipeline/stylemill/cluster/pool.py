"""The driver's side: sizes the pool, leases shards to workers, listens, and replaces workers that die."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import stylemill
from stylemill.cluster.actors import Call, Crew, Member, Reply, machines
from stylemill.cluster.assignment import LeaseBook
from stylemill.cluster.capacity import ask, room
from stylemill.cluster.timeouts import Timeouts, backoff
from stylemill.cluster.worker import Home, Loaded
from stylemill.errors import ClusterError, InputError, ModelError, StylemillError, TransientError
from stylemill.execution.attempt import Lease, Listener, Run
from stylemill.store.checkpoints import newest_step
from stylemill.store.ledger import Ledger

TICK = 0.25  # seconds between two looks at `stopping`
LONGEST_TICK = 10  # seconds that count for one: a driver that was itself stopped blames no worker for that
STARTS = 3  # workers that may die one after another before any of them has loaded the model


class Pool:
    """Supervised workers. What is done is read from the ledger; who does what is the lease book's decision."""

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
        self._book = LeaseBook(
            shards,
            1 + run.job.retries,
            clock=lambda: self._awake,
            pairs=lambda shard: len(run.rows_of(shard)),
            saved=self._saved,
            every=run.job.checkpoint.every_steps,
        )
        self._ledger = Ledger(run.paths)
        self._machines, self._surveyed = machines(), time.monotonic()
        self._ask = ask(self._job, self._machines)
        self._crew = Crew(run, self._ask)
        self._first: Loaded | None = None  # by the first worker that was ready
        given = self._job.micro_batch
        self._micro_batch = listener.micro_batch or (given if isinstance(given, int) else None)
        self._deaths = 0  # since a shard was committed
        self._stillborn = 0  # deaths before the model was loaded, since a worker loaded it
        self._hire_after = 0.0
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
            for member in list(self._crew.members.values()):
                self._crew.dismiss(member)
        return self._book.unfinished()

    def _saved(self, shard: int) -> int:
        return newest_step(self._run.paths, shard) or self._run.job.sampling.first_step

    # --- the size of the pool -----------------------------------------------------------------------------------------

    def _resize(self) -> None:
        """As many workers as there is room for, and never more than open shards."""
        now, members = time.monotonic(), self._crew.members
        if now - self._surveyed > self._patience.survey:
            self._machines, self._surveyed = machines(), now
        resident = self._first.resident if self._first else 0
        wanted = min(room(self._job, self._ask, self._machines, resident), self._book.open)
        idle = [member for member in members.values() if not self._book.held_by(member.number)]
        idle.sort(key=lambda member: (member.ready, member.loading, member.home is not None))
        for member in idle[: max(len(members) - wanted, 0)]:
            self._crew.dismiss(member)
        if now >= self._hire_after:
            for _ in range(wanted - len(members)):
                self._crew.hire()
        self._check_placing(now)

    def _check_placing(self, now: float) -> None:
        """A pool goes on with the workers it has; with none at all it waits only so long."""
        members = self._crew.members.values()
        waiting = [member for member in members if not member.home]
        longest = now - min((member.since for member in waiting), default=now)
        if longest > self._patience.place and len(waiting) == len(members):
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
        members = self._crew.members.values()
        alone = self._first is None and (
            self._micro_batch is None or (self._job.workers == "auto" and not self._ask.gpus)
        )
        for member in members:
            if alone and any(other.loading for other in members):
                return
            if self._may_load(member) and not member.loading:
                member.loading, member.loading_since = True, self._awake
                self._crew.call(member, "load", self._micro_batch)

    def _lease(self) -> None:
        members = self._crew.members
        able = [member.number for member in members.values() if member.ready and not member.retiring]
        coming = sum(self._may_load(member) for member in members.values())
        while choice := self._book.choose(able, coming):
            number, shard = choice
            lease = self._book.fit_out(self._run.lease(shard, self._occurrences))
            self._book.grant(number, lease)
            try:
                record = self._ledger.read(shard, lease.generation)
            except TransientError as error:
                self._failed(lease, str(error))
                continue
            if record is None:
                self._crew.call(members[number], "probe" if lease.probe else "work", lease)
            else:  # by an attempt whose worker died just afterwards
                self._book.done(lease)
                self._listener.committed(record)

    def _ask_for_beats(self) -> None:
        now = time.monotonic()
        for member in self._crew.members.values():
            if member.ready and member.asked <= member.heard and now - member.asked > self._patience.beat:
                member.asked = now
                self._crew.call(member, "beat")

    def _leave(self, quiet: bool = False) -> None:
        """Workers in the middle of a shard write its checkpoint; the others have nothing to lose.

        `quiet`: an error is on its way already, and further ones neither hide it nor keep the rest from being heard.
        """
        for member in list(self._crew.members.values()):
            if self._book.held_by(member.number):
                self._crew.call(member, "stop")
            else:
                self._crew.dismiss(member)
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
        for reply in self._crew.replies(TICK):
            member = reply.call.member
            if reply.died is not None:
                self._lost(member, reply.died)
            elif reply.raised is not None:
                self._raised(reply, reply.raised)
            else:
                self._answered(reply.call, reply.answer)
            there = member.number in self._crew.members  # it may just have been lost
            if there and member.retiring and not self._book.held_by(member.number):
                self._crew.dismiss(member)

    def _answered(self, call: Call, answer: Any) -> None:
        member = call.member
        if call.lease and call.lease.probe:
            self._book.survived(call.lease) if answer else self._book.returned(call.lease)
        elif call.lease:
            self._finished(call.lease, answer)
        elif call.method == "hello":
            self._greet(member, answer)
        elif call.method == "load":
            self._ready(member, answer)
        elif call.method == "beat":
            member.heard = time.monotonic()
            for progress in answer:
                self._book.note(progress)
                self._listener.progress(progress)

    def _finished(self, lease: Lease, record: Any) -> None:
        if record is None:
            self._book.returned(lease)
            return
        self._book.done(lease)
        self._deaths = 0
        self._listener.committed(record)

    def _greet(self, member: Member, home: Home) -> None:
        if home.version != stylemill.__version__:
            raise ClusterError(
                f"{home.host} has stylemill {home.version}, this machine {stylemill.__version__}; install the same "
                "version on both"
            )
        member.home = home
        self._check_machines()

    def _ready(self, member: Member, loaded: Loaded) -> None:
        member.loading, member.ready, member.heard = False, True, time.monotonic()
        self._stillborn = 0
        if self._first is None:
            self._first = loaded
            self._micro_batch = int(loaded.numerics["micro_batch"])
            self._listener.settle(loaded.numerics)
            return
        first = self._first.numerics
        if differing := [
            f"{key} {value}, not {first[key]}" for key, value in loaded.numerics.items() if value != first[key]
        ]:
            self._tell(f"a worker differs from the first ({'; '.join(differing)}): its images may differ in low bits")

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def _raised(self, reply: Reply, error: BaseException) -> None:
        """A method raised and its worker lives. Only our own errors leave a worker that can be trusted."""
        member, lease, ours = reply.call.member, reply.call.lease, isinstance(error, StylemillError)
        if isinstance(error, InputError) and not (member.loading and isinstance(error, ModelError)):
            if lease:
                self._book.failed(lease, str(error))
            raise error
        if not member.ready and isinstance(error, ImportError):
            raise _not_installed(str(error))
        why = str(error) if ours else f"{type(error).__name__}: {error}"
        if member.loading:
            self._give_up_machine(member, error, why)
            return
        if not ours:
            self._tell(reply.trace)
        if lease is None:
            self._lost(member, why)
            return
        # What else that worker was doing may fail for the same reason: a CUDA error stays until its process ends.
        self._failed(lease, why, charged=not member.retiring, fatal=not ours)
        member.retiring |= not ours

    def _give_up_machine(self, member: Member, error: BaseException, why: str) -> None:
        """The model cannot be loaded there: the others go on, if there are any."""
        assert member.home  # it was greeted before it was to load
        member.loading = False  # it stays, and keeps the place, so that no other worker comes to it
        ours = isinstance(error, StylemillError)
        self._unfit[member.home.host] = error if ours else StylemillError(f"the model cannot be loaded: {why}")
        self._check_machines()
        self._tell(f"the model cannot be loaded on {member.home.host}, which is given up; others go on: {why}")

    def _check_machines(self, to_come: bool = True) -> None:
        """Raises why the model could not be loaded when no machine is left to try it on, nor, if so, one `to_come`."""
        members = self._crew.members.values()
        left = (member.ready or self._may_load(member) or (to_come and not member.home) for member in members)
        if self._unfit and not any(left):
            raise list(self._unfit.values())[-1]

    def _may_load(self, member: Member) -> bool:
        return member.home is not None and not member.ready and member.home.host not in self._unfit

    def _replace_hanging(self) -> None:
        """Kill the workers that made no progress for longer than they may."""
        members, longest = self._crew.members, self._job.stage_timeout
        hanging = {
            member.number: f"no progress for {longest:.0f} s while loading the model"
            for member in members.values()
            if member.loading and self._awake - member.loading_since > longest
        }
        for number, why in {**dict(self._book.overdue(longest)), **hanging}.items():
            setting = "cluster.stage_timeout and cluster.step_timeout say how long that may be"
            self._lost(members[number], f"{why}; {setting}", hangs=True)

    def _failed(self, lease: Lease, why: str, charged: bool = True, fatal: bool = False) -> None:
        again = self._book.failed(lease, why, charged, fatal)
        then = "it is tried again" if again else "its attempts are used up; the next start tries again"
        self._listener.warn(f"shard {lease.shard}: {why}; {then}")

    def _lost(self, member: Member, why: str, hangs: bool = False) -> None:
        """A worker is gone, or `hangs`: its shards go back, and another takes its place after a while."""
        if not member.home and "ModuleNotFoundError" in why:  # Ray could not even make a Worker there
            raise _not_installed(why)
        leases = self._book.held_by(member.number)
        held, expected = [str(lease.shard) for lease in leases], any(lease.probe for lease in leases)
        self._book.lost(member.number, f"{member} died: {why}")
        (self._crew.kill if hangs else self._crew.dismiss)(member)
        self._deaths += not expected
        self._hire_after = time.monotonic() + backoff(self._deaths)
        self._stillborn += not member.ready
        if self._stillborn >= STARTS and not any(other.ready for other in self._crew.members.values()):
            raise StylemillError(f"{self._stillborn} workers in a row died before they were ready, the last one: {why}")
        doing = f"with shard {' and '.join(held)} in work" if held else "idle" if member.ready else "while starting"
        self._listener.warn(f"{member} died {doing}: {why}; another takes its place")

    def _tell(self, message: str) -> None:
        """Warn once."""
        if message not in self._told:
            self._told.add(message)
            self._listener.warn(message)


def _not_installed(why: str) -> ClusterError:
    return ClusterError(
        f"a worker cannot import stylemill ({why}); install the same stylemill on every machine of the cluster"
    )
