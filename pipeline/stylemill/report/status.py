"""`stylemill status`: how far a run is, read from its folder while it runs or after. Needs neither Ray nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stylemill.report.summary import Summary, summarize
from stylemill.store.ledger import Ledger
from stylemill.store.lock import lock_holder
from stylemill.store.retries import pending_retry
from stylemill.store.run_file import RunFile


@dataclass(frozen=True)
class Status:
    """A run's totals, who works on it now (None: nobody), and the shards that have a checkpoint."""

    summary: Summary
    worked_on_by: str | None
    in_flight: list[str]
    retrying: int  # shards of a retry that are not done

    @property
    def finished(self) -> bool:
        return self.summary.open_shards == 0

    def describe(self) -> str:
        if self.worked_on_by:
            state = f"running: {self.worked_on_by}"
        elif self.retrying:
            state = f"stopped while failed rows of {self.retrying:,} shards were tried again; `retry-failed` goes on"
        elif self.finished:
            state = "finished"
        else:
            state = "stopped; the command that started it resumes it"
        flight = f"\nin flight {len(self.in_flight)} shards have checkpoints" if self.in_flight else ""
        return f"{self.summary.paths.output}: {state}\n{self.summary.describe()}{flight}"


def status(output: str | Path) -> Status:
    """Look at a run folder. Changes nothing. Raises OutputError where `output` is no run folder."""
    file, paths = RunFile.open(output)
    folder, ledger = paths.checkpoints_folder, Ledger(paths, read_only=True)
    return Status(
        summary=summarize(paths, ledger, file.rows),
        worked_on_by=lock_holder(paths),
        in_flight=sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.exists() else [],
        retrying=len(pending_retry(paths, ledger)),
    )
