"""One shard, from its rows to its record: read → encode → sample → measure → decode → write → commit.

The same stages run in a Ray actor and in the driver's process, and this module knows neither. At whatever point the
process is killed: what is committed is valid, and the next attempt goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from stylemill.execution.attempt import Attempt, Progress, Run
from stylemill.execution.checkpointing import ShardCheckpoints
from stylemill.execution.inputs import read_pairs
from stylemill.execution.output import write_tables
from stylemill.execution.rows import (
    OutputRow,
    loss_scales,
    poison_pairs,
    row_numbers,
    rows_of_attempt,
    with_encoded_image,
    with_poison_pairs_failed,
    with_results_of_engine,
)
from stylemill.execution.stages import ProgressReporter, StageTimer
from stylemill.execution.worker_engine import numerics
from stylemill.store.commit import commit
from stylemill.store.decoder_cache import RunDecoders
from stylemill.store.records import Record
from stylemill.testing.failpoints import failpoint

if TYPE_CHECKING:
    from stylemill.engine import Distances, Engine, Pair, Pixels, SampleState

_log = logging.getLogger(__name__)


def process_shard(
    run: Run,
    attempt: Attempt,
    engine: Engine,
    device: AbstractContextManager[Any],
    send: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> Record | None:
    """Bring one shard to its committed record; None when `stopping()` asked to leave. What was sampled is checkpointed.

    `device` is held while sampling, so that another thread may read ahead and a third encode. `send` gets the progress.
    Raises TransientError when the attempt failed and not a row, InputError when no attempt can succeed.
    """
    stages = _Stages(run, attempt, engine, device, send, stopping)
    return stages.commit() if stages.run() else None


def probe_shard(
    run: Run,
    attempt: Attempt,
    engine: Engine,
    device: AbstractContextManager[Any],
    send: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> bool:
    """Take the pairs of `attempt.probe` alone through the stages of their shard, to see whether the process survives.

    Nothing is written. False when `stopping()` asked to leave. Raises as `process_shard` does.
    """
    return _Stages(run, attempt, engine, device, send, stopping).run()


class _Stages:
    """The stages of a shard. A probe takes some of its pairs through some of its stages, and has no checkpoints."""

    def __init__(
        self,
        run: Run,
        attempt: Attempt,
        engine: Engine,
        device: AbstractContextManager[Any],
        send: Callable[[Progress], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._engine = engine
        self._device = device
        self._stopping = stopping
        probe, self._steps = attempt.probe, run.job.sampling.steps
        self._last_step = min(probe.until, self._steps) if probe else self._steps
        self._rows: list[OutputRow] = []
        self._pairs: list[Pair] = []
        self._checkpoints: ShardCheckpoints | None = None
        self._state: SampleState | None = None
        self._distances: list[Distances | None] = []
        self._images: list[Pixels | None] = []
        self._numerics: dict[str, str | int] = {}  # with which the images were made
        self._timer = StageTimer()
        pairs = len(probe.places) if probe else len(run.rows_of(attempt.shard))
        self._report = ProgressReporter(run.job, attempt, pairs, send)

    def run(self) -> bool:
        """Run the stages before the commit, or those of the probe; False when `stopping()` asked to leave."""
        probe = self._attempt.probe
        self._read()
        if probe and probe.stage == "read":
            return True
        self._report("wait", self._state)
        # The device is left at once, and the block only when the last checkpoint is written.
        with self._checkpoints or nullcontext(), self._device:
            if self._stopping():  # while it waited for the device: no step, no new checkpoint
                return False
            if not self._sample():
                return False
            if self._last_step < self._steps:
                return True
            self._measure()
            self._decode()
        self._make_image_files()
        return True

    def _read(self) -> None:
        """The rows, and either their pairs or the state of a checkpoint."""
        run, attempt = self._run, self._attempt
        self._report("read")
        failpoint("before-read", shard=attempt.shard)
        with self._timer.measure("read"):
            rows = rows_of_attempt(run, attempt)
            if attempt.probe:
                rows = [rows[place] for place in attempt.probe.places]
            else:
                self._checkpoints = ShardCheckpoints(run, attempt, rows, self._engine.numerics)
                rows = with_poison_pairs_failed(attempt, rows)
            if restored := self._checkpoints and self._checkpoints.restore():
                self._state, self._rows = restored
            else:
                self._pairs, self._rows = read_pairs(run, rows, self._engine.model.grid, attempt.last)
                _warn_of_long_prompts(self._engine, self._rows)
        self._report.pairs = sum(row.wanted and not row.failure for row in self._rows)
        failpoint("after-read", shard=attempt.shard)

    def _sample(self) -> bool:
        """Sample to the last step, with checkpoints on the way; False when `stopping()` asked to leave."""
        shard, every_steps = self._attempt.shard, self._run.job.checkpoint.every_steps
        with self._timer.measure("sample"):
            self._report("encode", self._state)
            states = self._engine.sample(
                self._pairs, self._run.job.sampling, self._state, excluded=poison_pairs(self._rows)
            )
            for state in states:
                if self._checkpoints:
                    self._checkpoints.wait()  # it was written while the device took this step
                self._state = state
                self._report("sample", state)
                failpoint("mid-sample", shard=shard, step=state.step, row=row_numbers(self._rows))
                stopping = self._stopping()
                if self._checkpoints and (stopping or state.step % every_steps == 0 or state.step == self._steps):
                    failpoint("before-checkpoint", shard=shard, step=state.step)
                    self._checkpoints.save(state, self._rows)
                if state.step >= self._last_step:
                    return True
                if stopping:
                    return False
        return True

    def _measure(self) -> None:
        assert self._state is not None  # it took a step now, or before the checkpoint that it was restored from
        self._report("measure", self._state)
        with self._timer.measure("measure"):
            self._distances = self._engine.distances(self._state, self._run.job.sampling)

    def _decode(self) -> None:
        assert self._state is not None
        self._report("decode", self._state)
        failpoint("before-decode", shard=self._attempt.shard)
        with self._timer.measure("decode"):
            self._images = self._engine.decode(self._state, RunDecoders(self._run.paths, self._attempt.id))
        self._numerics = numerics(self._engine)  # while the device is held: another shard may change them

    def _make_image_files(self) -> None:
        assert self._state is not None
        self._report("write", self._state)
        with self._timer.measure("write"):
            rows = with_results_of_engine(self._rows, self._state, self._distances)
            self._rows = [
                with_encoded_image(self._run, row, image) for row, image in zip(rows, self._images, strict=True)
            ]

    def commit(self) -> Record:
        """Write the files of the shard and commit them. Counts, names and digests are those of what gets published."""
        assert self._state is not None
        run, attempt = self._run, self._attempt
        with self._timer.measure("write"):
            data, failures = write_tables(run, attempt, self._rows)
        row_range = run.rows_of(attempt.shard)
        draft = Record(
            shard=attempt.shard,
            fingerprint=run.fingerprint,
            first_row=row_range.start,
            stop_row=row_range.stop,
            attempt=attempt.id,
            generation=attempt.generation,
            numerics=self._numerics,
            timings=self._timer.seconds,
            loss_scales=loss_scales(self._rows, self._state),
        )
        return commit(run.paths, draft, data, failures)


def _warn_of_long_prompts(engine: Engine, rows: list[OutputRow]) -> None:
    """Log once a row which end of its prompts the model does not read. The row is sampled all the same."""
    for row in rows:
        for name, text in (("prompt", row.source.prompt), ("negative_prompt", row.source.negative_prompt)):
            if text and (truncated := engine.model.truncated_text(text)):
                _log.warning(
                    "%s: %s is longer than the model reads; this end is cut off: %r",
                    row.source.pair_id,
                    name,
                    truncated,
                )
