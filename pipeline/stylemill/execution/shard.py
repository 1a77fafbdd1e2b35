"""One shard, start to end: skip → read → sample → write → commit.

The same function runs inside a Ray actor and inline; it knows neither. Whatever kills it, wherever: what is committed
is valid, and the next attempt goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import PIL
import pyarrow as pa

from stylemill.config.job import Job
from stylemill.engine import Engine, Pair, SampleState
from stylemill.errors import PoisonPairError
from stylemill.execution.attempt import Attempt, Progress, Run
from stylemill.execution.rows import FailureReason, OutputRow, assigned, encoded, note_sampled, read_pairs, write_tables
from stylemill.store.checkpoints import Checkpoint, load, save_inputs, save_progress
from stylemill.store.commit import commit
from stylemill.store.decoder_cache import RunDecoders
from stylemill.store.ledger import Ledger
from stylemill.store.records import Record
from stylemill.store.retries import generation_rows
from stylemill.testing.failpoints import failpoint

_log = logging.getLogger(__name__)
STEP_PATIENCE = 20  # times the slowest step so far, until a worker counts as hanging


def load_engine(run: Run, micro_batch: int | None) -> Engine:
    """A worker's resident engine. With no settled micro-batch, "auto" is calibrated to the job's image size here."""
    model, cluster = run.job.model, run.job.cluster
    failpoint("load")
    engine = Engine.load(
        model.name,
        revision=model.revision,
        config=model.config,
        dtype=model.dtype,
        layers=model.layers,
        loras=model.loras,
        controlnets=model.controlnet,
        threads=cluster.threads,
        micro_batch=micro_batch or cluster.micro_batch,
        feature_budget_mb=cluster.feature_budget_mb,
    )
    if micro_batch is None and cluster.micro_batch == "auto":
        engine.calibrate(run.job.slot_size(engine.model.pixels_per_latent))
    return engine


def process_shard(
    run: Run,
    attempt: Attempt,
    engine: Engine,
    device: AbstractContextManager[Any],
    watch: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> Record | None:
    """Bring one shard to its committed record; None when `stopping()` asked to leave. What was sampled is checkpointed.

    `device` is held while sampling, so that another thread may read ahead and a third encode. Raises TransientError
    when the attempt, not a row, failed; InputError when no attempt can succeed.
    """
    # On an object store, the driver alone publishes records, and looked before this attempt.
    if not run.paths.on_bucket and (record := Ledger(run.paths).read(attempt.shard, attempt.generation)):
        return record  # an earlier attempt died after its commit
    steps, clock = run.job.sampling.steps, StageTimer()
    rows = run.rows_of(attempt.shard)
    report = ProgressReporter(run.job, attempt, len(rows), watch)
    report("read")
    failpoint("before-read", shard=attempt.shard)
    with clock.measure("read"):
        items = read_rows(run, attempt)
        checkpoints = ShardCheckpoints(run, attempt, items, engine.numerics)
        items = without_poison_pairs(attempt, items)
        pairs: list[Pair] = []
        resumed: SampleState | None = None
        if checkpoint := checkpoints.load():
            resumed, items = checkpoints.restore(checkpoint, items)
        else:
            pairs, items = read_pairs(run, items, engine.model.grid)
            warn_of_long_prompts(engine, items)
    failpoint("after-read", shard=attempt.shard)

    report("wait", resumed)
    with device:
        if stopping():  # while it waited for the device: no step, no new checkpoint
            return None
        state = resumed
        with clock.measure("sample"):
            report("encode", resumed)
            for state in engine.sample(pairs, run.job.sampling, resumed, left_out=left_out(items)):
                report("sample", state)
                failpoint("mid-sample", shard=attempt.shard, step=state.step, row=sampled(items))
                due = state.step % run.job.checkpoint.every_steps == 0 or state.step == steps
                if due or stopping():
                    failpoint("before-checkpoint", shard=attempt.shard, step=state.step)
                    checkpoints.save(state, items)
                    failpoint("after-checkpoint", shard=attempt.shard, step=state.step)
                if stopping() and state.step < steps:
                    return None
        assert state is not None  # it took a step now, or before the checkpoint that it was restored from
        report("decode", state)
        failpoint("before-decode", shard=attempt.shard)
        with clock.measure("decode"):
            images = engine.decode(state, RunDecoders(run.paths, attempt.id))

    report("write", state)
    with clock.measure("write"):
        items = [encoded(run, item, image) for item, image in zip(note_sampled(items, state), images, strict=True)]
        data, failures = write_tables(run, attempt, items)
        draft = Record(
            shard=attempt.shard,
            fingerprint=run.fingerprint,
            first_row=rows.start,
            stop_row=rows.stop,
            attempt=attempt.id,
            generation=attempt.generation,
            numerics=numerics(engine),
            timings=clock.seconds,
        )
    return commit(run.paths, draft, data, failures)  # counts, names and digests are those of what gets published


def survives(
    run: Run,
    attempt: Attempt,
    engine: Engine,
    device: AbstractContextManager[Any],
    watch: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> bool:
    """Whether this process lives to say so after it took the pairs of `attempt.probe` through a shard's stages alone.

    Nothing is written. False when `stopping()` asked to leave. Raises as `process_shard` does.
    """
    probe, rows = attempt.probe, read_rows(run, attempt)
    assert probe is not None
    report = ProgressReporter(run.job, attempt, len(probe.places), watch)
    report("read")
    pairs, items = read_pairs(run, [rows[place] for place in probe.places], engine.model.grid)
    if probe.stage == "read":
        return True
    report("wait")
    with device:
        report("encode")
        for state in engine.sample(pairs, run.job.sampling):
            report("sample", state)
            failpoint("mid-sample", shard=attempt.shard, step=state.step, row=sampled(items))
            if stopping():
                return False
            if probe.until <= state.step < run.job.sampling.steps:
                return True
        report("decode", state)
        images = engine.decode(state, RunDecoders(run.paths, attempt.id))
    report("write", state)
    for item, image in zip(note_sampled(items, state), images, strict=True):
        encoded(run, item, image)
    return True


def read_rows(run: Run, attempt: Attempt) -> list[OutputRow]:
    rows = run.rows_of(attempt.shard)
    items = [OutputRow(row) for row in run.manifest.output_rows(rows.start, rows.stop, attempt.occurrences)]
    return assigned(items, generation_rows(run.paths, rows, attempt.shard, attempt.generation, run.newest))


def without_poison_pairs(attempt: Attempt, items: list[OutputRow]) -> list[OutputRow]:
    """The items, with those that the attempt leaves out failed for good."""
    words = "worker after worker died over this pair, alone too; look at its images, and try it in a run of its own"
    killed = {
        place: FailureReason(stage, PoisonPairError.__name__, words) for place, stage in attempt.poison_pairs.items()
    }
    return [replace(item, failure=item.failure or killed.get(place)) for place, item in enumerate(items)]


def left_out(items: list[OutputRow]) -> dict[int, str]:
    """What the engine must not touch: items that kill. The others that failed, it knows."""
    poison_pairs = {place: item.failure for place, item in enumerate(items) if item.failure}
    return {place: reason.message for place, reason in poison_pairs.items() if reason.error == PoisonPairError.__name__}


def sampled(items: list[OutputRow]) -> list[int]:
    """The rows that are still being made, as far as reading can report."""
    return [item.row.output_row for item in items if not item.failure]


def warn_of_long_prompts(engine: Engine, items: list[OutputRow]) -> None:
    """Say once a row which end of its prompts the model will not see; the row is made all the same."""
    for item in items:
        for name, text in (("prompt", item.row.prompt), ("negative_prompt", item.row.negative_prompt)):
            if text and (lost := engine.model.cut_off(text)):
                _log.warning(
                    "%s: %s is longer than the model reads; this end is cut off: %r", item.row.pair_id, name, lost
                )


def numerics(engine: Engine) -> dict[str, str | int]:
    """What the bytes of a data file depend on besides the job."""
    return engine.numerics | {"pillow": PIL.__version__, "pyarrow": pa.__version__}


class ShardCheckpoints:
    """Saves a shard in flight and brings it back: the engine's state, and what reading taught about each row."""

    def __init__(self, run: Run, attempt: Attempt, items: list[OutputRow], numerics: dict[str, str | int]) -> None:
        self.run = run
        self.attempt = attempt
        self.numerics = numerics
        ids = "\n".join(item.row.pair_id for item in items)
        idle = [place for place, item in enumerate(items) if item.failure or not item.wanted]
        if attempt.generation or idle:  # of the same shard, but of other rows
            ids += f"\n{attempt.generation} without {idle}"
        self.identity = {
            "fingerprint": run.fingerprint,
            "shard": attempt.shard,
            "order": sha256(ids.encode()).hexdigest(),
        }
        self.inputs_name = ""

    def load(self) -> Checkpoint | None:
        return load(self.run.paths, self.attempt.shard, self.identity)

    def restore(self, checkpoint: Checkpoint, items: list[OutputRow]) -> tuple[SampleState, list[OutputRow]]:
        self.inputs_name = checkpoint.inputs_name
        facts = checkpoint.inputs_meta["items"]
        state = SampleState.restore(
            checkpoint.inputs, checkpoint.inputs_meta["engine"], checkpoint.arrays, checkpoint.meta["engine"]
        )
        restored = [
            replace(
                item,
                content_sha256=fact["content_sha256"],
                style_sha256=tuple(fact["style_sha256"]),
                failure=FailureReason(**fact["failure"]) if fact["failure"] else None,
            )
            for item, fact in zip(items, facts, strict=True)
        ]
        items = without_poison_pairs(self.attempt, restored)
        if items != restored:  # the next start shall know from the checkpoint alone who is left out
            self.inputs_name = ""
        return state, items

    def save(self, state: SampleState, items: list[OutputRow]) -> None:
        if not self.inputs_name:
            arrays, facts = state.export_inputs()
            learned = [
                {
                    "content_sha256": item.content_sha256,
                    "style_sha256": item.style_sha256,
                    "failure": asdict(item.failure) if item.failure else None,
                }
                for item in items
            ]
            meta = self.identity | {"engine": facts, "items": learned}
            self.inputs_name = save_inputs(self.run.paths, self.attempt.shard, self.attempt.id, arrays, meta)
        arrays, facts = state.export_progress()
        meta = self.identity | {"engine": facts, "numerics": self.numerics}
        save_progress(self.run.paths, self.attempt.shard, state.step, self.attempt.id, arrays, meta, self.inputs_name)


class ProgressReporter:
    """Tells where a shard stands, and by when there must be news of it, or else its worker hangs.

    A step has many times what the slowest one of its kind took; with nothing to compare, what any other stage has.
    """

    def __init__(self, job: Job, attempt: Attempt, pairs: int, watch: Callable[[Progress], None]) -> None:
        self.job = job
        self.attempt = attempt
        self.pairs = pairs
        self.watch = watch
        self.slowest: dict[bool, float] = {}  # seconds of a step, by whether it is a guided one
        self.last = ("", 0, 0.0)  # what was told last, and when

    def __call__(self, stage: str, state: SampleState | None = None) -> None:
        step, now = state.step if state else self.job.sampling.first_step, time.monotonic()
        if stage == "sample" and self.last[:2] == ("sample", step - 1):
            kind = self.job.sampling.guides(step - 1)
            self.slowest[kind] = max(self.slowest.get(kind, 0.0), now - self.last[2])
        self.last = (stage, step, now)
        steps, limit = self.job.sampling.steps, self._limit(stage, step)
        self.watch(Progress(self.attempt.shard, self.attempt.id, stage, step, steps, self.pairs, limit))

    def _limit(self, stage: str, step: int) -> float | None:
        cluster = self.job.cluster
        if stage == "wait":
            return None
        if stage == "sample" and (known := self.slowest.get(self.job.sampling.guides(step))):
            return max(cluster.step_timeout, STEP_PATIENCE * known)
        return cluster.stage_timeout


class StageTimer:
    """Seconds spent in each stage of a shard, for its record."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, stage: str) -> _Stage:
        return _Stage(self, stage)


class _Stage:
    def __init__(self, clock: StageTimer, stage: str) -> None:
        self.clock, self.stage = clock, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.seconds[self.stage] = round(time.perf_counter() - self.start, 3)
