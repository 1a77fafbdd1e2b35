"""The driver's listener: it handles worker events, counts commits, and stops a run in which too many rows fail."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from stylemill.errors import DamagedError, IncompleteError, StorageError
from stylemill.execution.attempt import Attempt, AutoSettings, Progress, Run
from stylemill.execution.pace import Pace
from stylemill.execution.progress import ProgressBar
from stylemill.plural import counted
from stylemill.store.atomic import publish_bytes, sync_published
from stylemill.store.commit import confirm
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.records import Record
from stylemill.store.run_file import missing_numerics
from stylemill.store.segments import RECORDS_PER_SEGMENT

LONGEST_PAUSE = 30.0  # seconds before another try to write numerics.json
MIN_ROWS_JUDGED = 100  # before a run ends: fewer rows do not show what share of all rows will fail


class RunListener:
    """A `Listener` that shows progress and keeps the ledger up to date.

    A `retry` counts only the rows that it tries again. It does not stop when too many fail: it begins with failed rows
    and can only make them fewer.
    """

    def __init__(self, run: Run, ledger: Ledger, stopping: threading.Event, quiet: bool, retry: bool) -> None:
        self.run = run
        self.ledger = ledger
        self.committed_shards = 0
        self._retry = retry
        self._numerics = _read_json(run.paths.numerics)  # of the first worker of the run; empty: not known yet
        self._warned: set[str] = set()
        self._compact_at = RECORDS_PER_SEGMENT  # record files
        self._done, self._failed = (0, 0) if retry else self._rows_committed()
        total = ledger.rows_failed_in(run.generations) if retry else run.manifest.num_output_rows
        self.bar = ProgressBar(Pace(total, self._done, run.job.sampling.first_step), self._failed, stopping, quiet)

    @property
    def auto_settings(self) -> AutoSettings:
        """What the first worker of the run chose, as numerics.json says; without it, the dtype of any record."""
        if self._numerics:
            return AutoSettings().with_choices_of(self._numerics)
        dtypes = (record.numerics.get("dtype") for record in self.ledger.records())
        return AutoSettings(next((dtype for dtype in dtypes if dtype), None))

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

    def phase(self, text: str) -> None:
        self.bar.phase(text)

    def progress(self, progress: Progress) -> None:
        self.bar.moved(progress)

    def committed_record(self, attempt: Attempt) -> Record | None:
        return self.ledger.read(attempt.shard, attempt.generation)

    def committed(self, record: Record) -> None:
        record = confirm(self.run.paths, record)
        if self.ledger.read(record.shard, record.generation) is None:
            raise StorageError(f"shard {record.shard}: its record was damaged or removed as soon as it was published")
        self._compact()
        self._warn_of_little_memory(record)
        self.committed_shards += 1
        if self._retry:
            self._done += record.rows_ok + record.rows_failed
            self._failed += record.rows_failed
        else:
            self._done, self._failed = self._rows_committed()
        self.bar.committed(record.shard, self._done, self._failed)
        if not self._retry and (reason := self.too_many_failed()):
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
        """A message when more than max_failed_fraction of the rows failed, else None.

        Until MIN_ROWS_JUDGED rows are committed, the run has too many failures only if it has them whatever becomes of
        the other rows. So it does not depend on which shard is committed first.
        """
        (seen, failed), limit = self._rows_committed(), self.run.job.max_failed_fraction
        rows = self.run.manifest.num_output_rows
        if failed <= limit * (seen if seen >= MIN_ROWS_JUDGED else rows):
            return None
        steps = [f"`stylemill retry-failed {self.run.paths.output}`"]
        if seen < rows:
            steps.append(f"start this command again for the other {counted(rows - seen, 'row')}")
        return (
            f"too many failures: {failed:,} of {counted(seen, 'row')} seen so far, more than the max_failed_fraction "
            f"of {limit:g} allows; {self.run.paths.failed_rows} has the reasons. Fix the cause, then "
            f"{', then '.join(steps)}; or accept the failures with --set max_failed_fraction=1"
        )

    def _rows_committed(self) -> tuple[int, int]:
        """The number of all committed rows, and of the failed ones among them."""
        totals = self.ledger.totals()
        return totals.rows_ok + totals.rows_failed, totals.rows_failed

    def warn(self, message: str) -> None:
        self.bar.warn(message)

    def _warn_of_little_memory(self, record: Record) -> None:
        given, size = self.run.job.cluster.micro_batch, record.numerics.get("micro_batch")
        if given == "auto" and record.numerics.get("device") == self._numerics.get("device"):
            given = self._numerics["micro_batch"]
        reasons = []
        if size and given != "auto" and size < given:
            reasons.append(f"halved its micro-batch to {size}")
        if record.numerics.get("decoding") == "tiles":
            reasons.append("decodes images in tiles")
        if reasons and (message := " and ".join(reasons)) not in self._warned:
            self._warned.add(message)
            self.warn(
                f"out of memory: a worker {message}; its images may differ in low bits, and the records say which"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be read ({error}); remove it to go on without its numerics") from error
    if not isinstance(values, dict) or missing_numerics(values):
        raise DamagedError(f"{path}: lacks numerics that a run has; remove it to go on without them")
    return values
