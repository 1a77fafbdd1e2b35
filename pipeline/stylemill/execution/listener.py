"""The driver's listener: it handles worker events, counts commits, and stops a run in which too many rows fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from stylemill.errors import DamagedError, IncompleteError, StorageError
from stylemill.execution.attempt import Attempt, Progress, Run
from stylemill.execution.progress import ProgressBar
from stylemill.store.atomic import publish_bytes, sync_published
from stylemill.store.commit import confirm
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.records import Record
from stylemill.store.segments import RECORDS_PER_SEGMENT

LONGEST_PAUSE = 30.0  # seconds before another try to write numerics.json


class RunListener:
    """A `Listener` that shows progress and keeps the ledger up to date.

    `stops_when_too_many_fail` is off for a retry: it begins with failed rows and can only make them fewer.
    """

    def __init__(self, run: Run, ledger: Ledger, quiet: bool, stops_when_too_many_fail: bool = True) -> None:
        self.run = run
        self.ledger = ledger
        self.committed_shards = 0
        self._stops_when_too_many_fail = stops_when_too_many_fail
        self._numerics = _read_json(run.paths.numerics)  # of the first worker of the run; empty: not known yet
        self._warned: set[str] = set()
        self._compact_at = RECORDS_PER_SEGMENT  # record files
        totals = ledger.totals()
        self.bar = ProgressBar(
            run.manifest.num_output_rows, totals.rows_ok + totals.rows_failed, totals.rows_failed, quiet
        )

    @property
    def micro_batch(self) -> int | None:
        """The micro-batch of the run where it is automatic and known: it is chosen once a run."""
        automatic = self.run.job.cluster.micro_batch == "auto"
        return int(self._numerics["micro_batch"]) if automatic and self._numerics else None

    def record_numerics(self, numerics: dict[str, Any]) -> None:
        if not self._numerics:
            self._publish_numerics(numerics)
            self._numerics = numerics
        changed = [key for key in numerics if numerics[key] != self._numerics.get(key)]
        if changed:
            listed = ", ".join(f"{key} {self._numerics.get(key)} -> {numerics[key]}" for key in changed)
            self.warn(f"this run began with other numerics ({listed}); images from here on may differ in low bits")

    def _publish_numerics(self, numerics: dict[str, Any]) -> None:
        """Write numerics.json, with as many tries as a shard has: no shard may be committed without its micro-batch."""
        data, path = json.dumps(numerics, indent=1).encode(), self.run.paths.numerics

        def publish() -> None:
            if not publish_bytes(self.run.paths, path, data, uuid4().hex[:12]):
                sync_published(path)  # an earlier try published it

        Retrying(
            retry=retry_if_exception_type(StorageError),
            stop=stop_after_attempt(1 + self.run.job.retries),
            wait=wait_exponential(max=LONGEST_PAUSE),
            after=lambda state: self.warn(f"{state.outcome and state.outcome.exception()}"),
            reraise=True,
        )(publish)

    def progress(self, progress: Progress) -> None:
        self.bar.moved(progress)

    def committed_record(self, attempt: Attempt) -> Record | None:
        return self.ledger.read(attempt.shard, attempt.generation)

    def committed(self, record: Record) -> None:
        record = confirm(self.run.paths, record)
        if self.ledger.read(record.shard, record.generation) is None:
            raise StorageError(f"shard {record.shard}: its record was damaged or removed as soon as it was published")
        self._compact()
        self._warn_of_smaller_micro_batch(record)
        self.committed_shards += 1
        totals = self.ledger.totals()
        self.bar.committed(record.shard, totals.rows_ok + totals.rows_failed, totals.rows_failed)
        if self._stops_when_too_many_fail and (reason := self.too_many_failed()):
            raise IncompleteError(reason)

    def _compact(self) -> None:
        """Compact the records. The shards are committed all the same if that fails, so it is only tried again later."""
        try:
            if compact(self.run.paths, self.ledger, self._compact_at):
                self._compact_at = RECORDS_PER_SEGMENT
        except (StorageError, DamagedError) as error:
            self.warn(f"the records were not compacted, which is tried again later: {error}")
            # Not after each commit: a try reads all record files, and may have written another segment.
            self._compact_at = len(self.ledger.record_files) + RECORDS_PER_SEGMENT // 16

    def too_many_failed(self) -> str | None:
        """A message when more than max_failed_fraction of the rows seen so far failed, else None."""
        totals, limit = self.ledger.totals(), self.run.job.max_failed_fraction
        seen = totals.rows_ok + totals.rows_failed
        if totals.rows_failed <= limit * seen:
            return None
        return (
            f"too many failures: {totals.rows_failed:,} of the {seen:,} rows seen so far, more than the "
            f"max_failed_fraction of {limit:g}; {self.run.paths.failures_folder} has the reasons. Fix the cause and "
            f"try again with `stylemill retry-failed {self.run.paths.output}`, or accept the failures with --set "
            "max_failed_fraction=1"
        )

    def warn(self, message: str) -> None:
        self.bar.warn(message)

    def _warn_of_smaller_micro_batch(self, record: Record) -> None:
        size = record.numerics.get("micro_batch")
        message = (
            f"out of memory: a worker halved its micro-batch to {size}; its images may differ in low bits, and the "
            "records say which"
        )
        if size and size < (self._numerics.get("micro_batch") or size) and message not in self._warned:
            self._warned.add(message)
            self.warn(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be read ({error}); remove it to go on without its numerics") from error
    return dict(values)
