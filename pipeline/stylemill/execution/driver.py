"""Run a job: claim the run folder, execute the shards that the ledger lists as open, sum up.

The same call starts and resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from stylemill.config.job import Job
from stylemill.errors import DamagedError, IncompleteError, OutputError, StorageError
from stylemill.execution.attempt import STOPPED, Executor, Run
from stylemill.execution.interruption import interruptible
from stylemill.execution.listener import RunListener
from stylemill.planning.fingerprint import fingerprint_differences
from stylemill.planning.plan import Plan, plan
from stylemill.plural import counted
from stylemill.report.contact_sheet import write_contact_sheet
from stylemill.report.summary import Summary, summarize
from stylemill.store.atomic import publish_bytes
from stylemill.store.commit import clean
from stylemill.store.compaction import compact
from stylemill.store.failed_rows import remove_failed_rows, write_failed_rows
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock
from stylemill.store.paths import RunPaths
from stylemill.store.recover import recover_records
from stylemill.store.retries import end_retry, pending_retry
from stylemill.store.run_file import RunFile, create_run_folder, installed_versions

LEFT_TO_RUN = "left to `run`"  # the reason of a shard that a retry does not sample
NAMED_SHARDS = 5  # open shards that the last lines on the terminal name

# Chooses the shards to execute, and the generation that each gets.
Selection = Callable[[RunPaths, Ledger], dict[int, int]]


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `open` maps each shard that is not committed to the reason."""

    summary: Summary
    open: dict[int, str]
    signal: int | None
    stopped_because: str | None

    @property
    def exit_code(self) -> int:
        """0: all rows succeeded. 3: finished with recorded failures. 128 + signal number: interrupted.

        1: incomplete, or so many rows failed that something other than the rows must be wrong.
        """
        if self.signal is not None and self.open:
            return 128 + self.signal
        if self.open or self.stopped_because:
            return 1
        return 3 if self.summary.rows_failed else 0

    def describe(self) -> str:
        """The last lines on the terminal."""
        lines = [self.summary.describe()]
        if self.stopped_because:
            lines.append(self.stopped_because)
            return "\n".join(lines)
        left = list(self.open.values()).count(LEFT_TO_RUN)
        if own := len(self.open) - left:
            lines.append(f"{counted(own, 'shard')} {'is' if own == 1 else 'are'} open; the same command resumes")
            failed = [(shard, why) for shard, why in self.open.items() if why not in (STOPPED, LEFT_TO_RUN)]
            lines += [f"  shard {shard}: {why}" for shard, why in failed[:NAMED_SHARDS]]
            if len(failed) > NAMED_SHARDS:
                lines.append(f"  … and {len(failed) - NAMED_SHARDS:,} more")
        if left:
            rows = f"{counted(self.summary.rows_open, 'row')} in {counted(left, 'shard')}"
            lines.append(f"not sampled yet: {rows}; `stylemill run` with the job file of this run goes on there")
        return "\n".join(lines)


def run(
    job: Job | str | Path, overrides: dict[str, Any] | None = None, *, inline: bool = False, quiet: bool = False
) -> RunResult:
    """Bring every row of the job's manifest to committed output, as an image or as a recorded failure.

    Starts, resumes or, when all is done, only sums up. `overrides` maps dotted keys of a job file to values. `inline`
    runs in this process without Ray. Raises InputError for what the user must change first, LockedError while another
    process runs in the same folder.
    """
    job = job if isinstance(job, Job) else Job.load(job, overrides)
    existing = RunFile.find(job.output)
    planned = plan(job)
    return execute(planned, existing, open_generations, inline, quiet)


def open_generations(paths: RunPaths, ledger: Ledger) -> dict[int, int]:
    """Every shard that is not committed, with the generation that it lacks."""
    ledger.refresh()
    return ledger.missing_generations()


def execute(planned: Plan, existing: RunFile | None, select: Selection, inline: bool, quiet: bool) -> RunResult:
    """Execute the shards that `select` chooses, in the run folder of the plan. `existing` is the run that is there."""
    paths = RunPaths(Path(planned.job.output), planned.shards)
    if existing:
        _refuse_other_job(paths, existing, planned)
    create_run_folder(paths)
    with RunLock(paths), interruptible() as interruption:
        run_file = existing or _claim(planned, paths)
        ledger = Ledger(paths)
        ledger.refresh()
        if ledger.damaged:  # a damaged segment: its thousands of shards lack nothing but their records
            recover_records(paths, run_file, ledger)
        compact(paths, ledger)
        wanted = select(paths, ledger)
        this = Run(
            job=planned.job,
            paths=paths,
            manifest=planned.manifest,
            fingerprint=run_file.fingerprint_sha256,
            pairs_per_shard=planned.pairs_per_shard,
            model=planned.model.label,
            base=str(run_file.manifest.parent),
            generations={shard: generation for shard, generation in wanted.items() if generation},
            newest=ledger.latest_generation,
        )
        listener = RunListener(this, ledger, interruption.stopping, quiet, retry=select is not open_generations)
        reasons: dict[int, str] = {}
        stopped_because = None
        if wanted:
            clean(paths, ledger)  # what killed attempts left behind
            remove_failed_rows(paths)
            try:
                with listener.bar:
                    run_shards = _executor(inline)
                    reasons = run_shards(this, list(wanted), planned.occurrences, listener, interruption.stopping)
            except IncompleteError as error:
                stopped_because = str(error)
        open_shards = ledger.open_shards(planned.shards)
        if not open_shards:
            if listener.committed_shards or not paths.contact_sheet.exists():
                write_contact_sheet(paths, planned.manifest, ledger.records(), inputs=planned.job.inputs)
            stopped_because = listener.too_many_failed()  # also when a finished run is started again
            if not pending_retry(paths, ledger):
                end_retry(paths)
        if interruption.signal is None:
            try:
                write_failed_rows(paths, ledger)
            except (DamagedError, StorageError) as error:
                listener.warn(f"{paths.failed_rows} was not written: {error}")
        lacking = {shard for shard, generation in wanted.items() if not ledger.has_record(shard, generation)}
        reasons = dict.fromkeys(open_shards, LEFT_TO_RUN) | dict.fromkeys(wanted, STOPPED) | reasons
        clean(paths, ledger)
        return RunResult(
            summary=summarize(paths, ledger, planned.rows),
            open={shard: reasons[shard] for shard in sorted({*open_shards, *lacking})},
            signal=interruption.signal,
            stopped_because=stopped_because,
        )


def _refuse_other_job(paths: RunPaths, existing: RunFile, planned: Plan) -> None:
    if differences := fingerprint_differences(existing.fingerprint, planned.fingerprint):
        raise OutputError(
            f"{paths.output}: holds a run of another job, whose images would mix with this one's:\n  "
            + "\n  ".join(differences)
            + "\nUndo the change, or choose another folder with --output"
        )


def _executor(inline: bool) -> Executor:
    # torch and ray are imported only when there are shards to execute.
    if inline:
        from stylemill.execution.local import run_inline

        return run_inline
    from stylemill.cluster import run_on_ray

    return run_on_ray


def _claim(planned: Plan, paths: RunPaths) -> RunFile:
    """Write job.json: from then on this folder belongs to this job."""
    run_file = RunFile(
        fingerprint=planned.fingerprint,
        fingerprint_sha256=planned.fingerprint_sha256,
        rows=planned.rows,
        shards=planned.shards,
        pairs_per_shard=planned.pairs_per_shard,
        job=planned.job.model_dump(mode="json") | {"manifest": str(planned.manifest.path)},
        versions=installed_versions(),
    )
    if not publish_bytes(paths, paths.job, run_file.to_bytes(), uuid4().hex[:12]):
        raise OutputError(f"{paths.job}: appeared while the run was starting; try again")
    return run_file
