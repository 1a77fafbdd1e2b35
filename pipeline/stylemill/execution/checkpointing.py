"""Checkpoints of the shard that an attempt works on: the state of the engine, and what reading learned of each row.

A thread writes them while the device takes the next step, because the device would wait for the disk or object store.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from types import TracebackType
from typing import Any

from stylemill.engine.state import SampleState
from stylemill.errors import DownloadError
from stylemill.execution.attempt import Attempt, Run
from stylemill.execution.rows import OutputRow, from_json, to_json, with_poison_pairs_failed
from stylemill.store.checkpoints import Arrays, clear, load, save_inputs, save_progress
from stylemill.testing.failpoints import failpoint


class ShardCheckpoints:
    """Saves and restores the checkpoints of one attempt's shard. `rows` are the rows before reading.

    As a context manager, it waits at the end of the block until the last checkpoint is written.
    """

    def __init__(self, run: Run, attempt: Attempt, rows: list[OutputRow], numerics: dict[str, str | int]) -> None:
        self._run = run
        self._attempt = attempt
        self._numerics = numerics
        self._rows = rows
        ids = "\n".join(row.source.pair_id for row in rows)
        idle = [place for place, row in enumerate(rows) if row.failure or not row.wanted]
        if attempt.generation or idle:  # a checkpoint of the same shard, but of other rows, does not fit
            ids += f"\n{attempt.generation} without {idle}"
        self._identity = {
            "fingerprint": run.fingerprint,
            "shard": attempt.shard,
            "order": sha256(ids.encode()).hexdigest(),
        }
        self._inputs_name = ""
        self._writer = ThreadPoolExecutor(1, f"checkpoints of shard {attempt.shard}")
        self._write: Future[None] | None = None  # of the checkpoint that was saved last

    def __enter__(self) -> ShardCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last checkpoint. Raises StorageError if it failed, unless the block raised an error itself."""
        self._writer.shutdown()
        if error is None:
            self.wait()

    def restore(self) -> tuple[SampleState, list[OutputRow]] | None:
        """The state and the rows of the newest valid checkpoint; None where there is none.

        A checkpoint in which a download failed is removed: it is of the last attempt of an earlier start, and this
        start asks the server again.
        """
        paths, shard = self._run.paths, self._attempt.shard
        checkpoint = load(paths, shard, self._identity)
        if checkpoint is None:
            return None
        restored = from_json(self._rows, checkpoint.inputs_meta["items"])
        if any(map(_lacks_download, restored, self._rows)):
            clear(paths, shard)
            return None
        state = SampleState.restore(
            checkpoint.inputs, checkpoint.inputs_meta["engine"], checkpoint.arrays, checkpoint.meta["engine"]
        )
        rows = with_poison_pairs_failed(self._attempt, restored)
        if rows == restored:  # else the inputs are saved again, with the poison pairs of this attempt
            self._inputs_name = checkpoint.inputs_name
        return state, rows

    def save(self, state: SampleState, rows: list[OutputRow]) -> None:
        """Copy the state to the host and let a thread save it; the first time, the inputs too.

        Call `wait` before the next one. The arrays may share memory with a state on the CPU: a step replaces its
        tensors, and does not write to them.
        """
        inputs, items = None if self._inputs_name else state.export_inputs(), to_json(rows)
        self._write = self._writer.submit(self._save, state.step, inputs, items, *state.export_progress())

    def wait(self) -> None:
        """Wait until the last checkpoint is published. Raises StorageError if it failed."""
        if self._write:
            self._write.result()

    def _save(
        self,
        step: int,
        inputs: tuple[Arrays, dict[str, Any]] | None,
        items: list[dict[str, Any]],
        arrays: Arrays,
        facts: dict[str, Any],
    ) -> None:
        paths, shard, attempt_id = self._run.paths, self._attempt.shard, self._attempt.id
        if inputs:
            input_arrays, input_facts = inputs
            meta = self._identity | {"engine": input_facts, "items": items}
            self._inputs_name = save_inputs(paths, shard, attempt_id, input_arrays, meta)
        meta = self._identity | {"engine": facts, "numerics": self._numerics}
        save_progress(paths, shard, step, attempt_id, arrays, meta, self._inputs_name)
        failpoint("after-checkpoint", shard=shard, step=step)


def _lacks_download(row: OutputRow, before_reading: OutputRow) -> bool:
    failure = row.failure if before_reading.failure is None else None
    return failure is not None and failure.error == DownloadError.__name__
