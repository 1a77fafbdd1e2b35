"""Whatever `verify` finds is redone from the manifest. Nothing is deleted: damaged files go to quarantine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylemill.execution.driver import RunResult, resume
from stylemill.store.atomic import quarantine
from stylemill.store.commit import clean
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock
from stylemill.store.paths import RunPaths
from stylemill.store.recover import files_without_record, recover_records, shard_of
from stylemill.store.retries import begin_retry, end_retry, pending_retry, read_retry
from stylemill.store.run_file import RunFile
from stylemill.store.verify import VerifyReport, verify


@dataclass(frozen=True)
class RepairResult:
    """What was found, how many records were made again from whole files, the run after it, what `verify` says now."""

    found: VerifyReport
    adopted: int
    result: RunResult | None  # None: there was nothing to redo
    left: VerifyReport

    @property
    def exit_code(self) -> int:
        """That of `run`; 1 where something is still wrong."""
        if self.result is not None and self.result.exit_code not in (0, 3):
            return self.result.exit_code
        return 1 if not self.left.ok else 3 if self.left.rows_failed else 0

    def describe(self) -> str:
        lines = []
        if not self.found.ok:
            moved = f"{len(self.found.damaged)} files moved to quarantine, {self.adopted} records made again"
            lines = [self.found.describe(), moved]
        return "\n".join([*lines, *([self.result.describe()] if self.result else []), self.left.describe()])


def repair(
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    deep: bool = False,
    inline: bool = False,
    quiet: bool = False,
) -> RepairResult:
    """Set a run folder right: what `verify` finds goes to quarantine, and what is then missing is made again.

    A shard whose files are whole only gets its record again. A retry that was begun is ended too. `deep` also decodes
    every image. Raises what `verify` and `run` raise; LockedError while a run works there.
    """
    run, paths = RunFile.open(output)
    found = verify(output, deep)
    adopted, result, left = 0, None, found
    if not found.ok or read_retry(paths):  # a retry may be what a killed repair left to do
        with RunLock(paths):
            ledger, adopted = _set_aside(paths, run, found)
        if ledger.open_shards(paths.shards) or pending_retry(paths, ledger):
            result = resume(output, overrides, inline=inline, quiet=quiet)
        left = verify(output, deep)
    return RepairResult(found, adopted, result, left)


def _set_aside(paths: RunPaths, run: RunFile, found: VerifyReport) -> tuple[Ledger, int]:
    """Move what is damaged away, keep what is whole; generations that were lost become a retry.

    That is noted before anything moves: afterwards nothing else would tell that they were ever there.
    """
    before = Ledger(paths, read_only=True)
    before.refresh()
    damaged = {path: why for path, why in found.damaged.items() if path.exists()}
    if paths.retry in damaged:
        quarantine(paths, paths.retry, damaged.pop(paths.retry))
    wanted = read_retry(paths)
    unsure = [*damaged, *before.damaged, *(path for path, _, _ in files_without_record(paths, before))]
    for shard, generation in filter(None, (shard_of(paths, path) for path in unsure)):
        if generation:
            wanted[shard] = max(wanted.get(shard, 0), generation)
    begin_retry(paths, wanted)
    for path, why in damaged.items():
        quarantine(paths, path, why)
    ledger = Ledger(paths)
    ledger.refresh()
    adopted = recover_records(paths, run, ledger)
    compact(paths, ledger)
    if not pending_retry(paths, ledger) and not ledger.open_shards(paths.shards):
        end_retry(paths)
        clean(paths, ledger)
    return ledger, adopted
