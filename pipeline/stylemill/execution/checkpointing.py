"""Checkpoints of the shard that an attempt works on: the state of the engine, and what reading learned of each row."""

from __future__ import annotations

from hashlib import sha256

from stylemill.engine.state import SampleState
from stylemill.errors import DownloadError
from stylemill.execution.attempt import Attempt, Run
from stylemill.execution.rows import OutputRow, from_json, to_json, with_poison_pairs_failed
from stylemill.store.checkpoints import clear, load, save_inputs, save_progress


class ShardCheckpoints:
    """Saves and restores the checkpoints of one attempt's shard. `rows` are the rows before reading."""

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
        """Save the state; the first time, the inputs too. Raises StorageError."""
        paths, shard, attempt_id = self._run.paths, self._attempt.shard, self._attempt.id
        if not self._inputs_name:
            arrays, facts = state.export_inputs()
            meta = self._identity | {"engine": facts, "items": to_json(rows)}
            self._inputs_name = save_inputs(paths, shard, attempt_id, arrays, meta)
        arrays, facts = state.export_progress()
        meta = self._identity | {"engine": facts, "numerics": self._numerics}
        save_progress(paths, shard, state.step, attempt_id, arrays, meta, self._inputs_name)


def _lacks_download(row: OutputRow, before_reading: OutputRow) -> bool:
    failure = row.failure if before_reading.failure is None else None
    return failure is not None and failure.error == DownloadError.__name__
