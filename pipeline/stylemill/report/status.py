"""The status of a run, read from its folder during the run or after it. Needs neither Ray nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stylemill.plural import counted
from stylemill.report.summary import Summary, summarize
from stylemill.store.ledger import Ledger
from stylemill.store.lock import lock_holder
from stylemill.store.retries import pending_retry
from stylemill.store.run_file import RunFile


@dataclass(frozen=True)
class Status:
    """What a run has done, and what is still to do."""

    summary: Summary
    worked_on_by: str | None  # pid and host of the driver; None: the run is finished or stopped
    in_flight: list[str]  # numbers of the shards that have a checkpoint
    retrying: int  # number of shards that a retry of failed rows has not finished

    @property
    def finished(self) -> bool:
        return self.summary.open_shards == 0

    def describe(self) -> str:
        """The text that `stylemill status` prints."""
        if self.worked_on_by:
            state = f"running: {self.worked_on_by}"
        elif self.retrying:
            state = (
                f"stopped during a retry of failed rows in {counted(self.retrying, 'shard')}; `retry-failed` resumes it"
            )
        elif self.finished:
            state = "finished"
        else:
            state = "stopped; the command that started it resumes it"
        have = "has checkpoints" if len(self.in_flight) == 1 else "have checkpoints"
        in_flight = f"\nin flight {counted(len(self.in_flight), 'shard')} {have}" if self.in_flight else ""
        return f"{self.summary.paths.output}: {state}\n{self.summary.describe()}{in_flight}"


def status(output: str | Path) -> Status:
    """Read the status of a run folder. Changes nothing. Raises OutputError when `output` is not a run folder."""
    file, paths = RunFile.open(output)
    ledger, checkpoints = Ledger(paths, read_only=True), paths.checkpoints_folder
    return Status(
        summary=summarize(paths, ledger, file.rows),
        worked_on_by=lock_holder(paths),
        in_flight=sorted(entry.name for entry in checkpoints.iterdir() if entry.is_dir())
        if checkpoints.exists()
        else [],
        retrying=len(pending_retry(paths, ledger)),
    )
