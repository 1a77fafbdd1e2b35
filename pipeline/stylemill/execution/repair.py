"""Repair a run folder: whatever `verify` finds is made again. Damaged files are not deleted but moved to quarantine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylemill.execution.driver import RunResult
from stylemill.execution.retry import resume
from stylemill.plural import counted
from stylemill.store.atomic import quarantine
from stylemill.store.commit import clean
from stylemill.store.compaction import compact
from stylemill.store.failed_rows import remove_failed_rows, write_failed_rows
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock
from stylemill.store.paths import RunPaths
from stylemill.store.recover import files_without_record, list_output_files, recover_records, shard_of
from stylemill.store.retries import begin_retry, end_retry, pending_retry, read_retry
from stylemill.store.run_file import RunFile
from stylemill.store.verify import VerifyReport, verify, verify_run


@dataclass(frozen=True)
class RepairResult:
    """What `verify` found before and after, how many records were recovered from valid files, and the run between."""

    before: VerifyReport
    recovered: int
    run: RunResult | None  # None: nothing had to be made again
    after: VerifyReport

    @property
    def exit_code(self) -> int:
        """That of `run`; 1 where something is still wrong."""
        if self.run is not None and self.run.exit_code not in (0, 3):
            return self.run.exit_code
        return 1 if not self.after.ok else 3 if self.after.rows_failed else 0

    def describe(self) -> str:
        lines = []
        if not self.before.ok:
            moved = counted(len(self.before.damaged), "file")
            made_again = counted(self.recovered, "record")
            lines = [self.before.describe(), f"{moved} moved to quarantine, {made_again} made again"]
        return "\n".join([*lines, *([self.run.describe()] if self.run else []), self.after.describe()])


def repair(
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    deep: bool = False,
    inline: bool = False,
    quiet: bool = False,
) -> RepairResult:
    """Move what `verify` finds to quarantine, and make again what is then missing.

    A shard whose files are valid gets its record back without sampling. A retry that was begun is finished too. `deep`
    also decodes every image. Raises what `verify` and `run` raise, and LockedError if a run works in the folder.
    """
    run_file, paths = RunFile.open(output)
    recovered, result = 0, None
    # No run may commit between the report and what is done about it.
    with RunLock(paths):
        before = verify_run(run_file, paths, deep, is_alone=lambda: True)
        has_list = not before.rows_failed or paths.failed_rows.exists()
        # A repair that was killed may have left only these to do.
        if before.ok and has_list and not read_retry(paths):
            return RepairResult(before, recovered, result, after=before)
        ledger, recovered = _quarantine_damaged(paths, run_file, before)
        incomplete = ledger.missing_generations() or pending_retry(paths, ledger)
    if incomplete:
        result = resume(output, overrides, inline=inline, quiet=quiet)
    return RepairResult(before, recovered, result, after=verify(output, deep))


def _quarantine_damaged(paths: RunPaths, run_file: RunFile, found: VerifyReport) -> tuple[Ledger, int]:
    """Move damaged files away and recover records from valid ones. Generations that were lost become a retry.

    The retry is written down before any file moves: afterwards no file tells that those generations existed.
    """
    ledger_before = Ledger(paths, read_only=True)
    ledger_before.refresh()
    damaged = {path: reason for path, reason in found.damaged.items() if path.exists()}
    if paths.retry in damaged:
        quarantine(paths, paths.retry, damaged.pop(paths.retry))
    wanted = read_retry(paths)
    unrecorded = files_without_record(paths, ledger_before, list_output_files(paths))
    suspects = [*damaged, *ledger_before.damaged, *(path for path, _, _ in unrecorded)]
    for shard, generation in filter(None, (shard_of(paths, path) for path in suspects)):
        if generation:
            wanted[shard] = max(wanted.get(shard, 0), generation)
    begin_retry(paths, wanted)
    remove_failed_rows(paths)
    for path, reason in damaged.items():
        quarantine(paths, path, reason)
    ledger = Ledger(paths)
    ledger.refresh()
    recovered = recover_records(paths, run_file, ledger)
    compact(paths, ledger)
    if not pending_retry(paths, ledger) and not ledger.missing_generations():
        end_retry(paths)
        write_failed_rows(paths, ledger)
        clean(paths, ledger)
    return ledger, recovered
