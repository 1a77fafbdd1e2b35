"""Run a job: claim the run folder, work off what the ledger says is open, sum up. The same call starts and resumes."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from stylemill.config.job import Job, set_dotted
from stylemill.errors import DamagedError, IncompleteError, OutputError
from stylemill.execution.attempt import Progress, Run
from stylemill.execution.progress import ProgressBar
from stylemill.planning.plan import Plan, fingerprint_differences, plan
from stylemill.report.contact_sheet import write_contact_sheet
from stylemill.report.summary import Summary, summarize
from stylemill.store.atomic import publish_bytes
from stylemill.store.commit import clean, confirm
from stylemill.store.compaction import compact
from stylemill.store.ledger import Ledger
from stylemill.store.lock import RunLock
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.recover import recover_records
from stylemill.store.retries import begin_retry, end_retry, failed_rows_before, pending_retry
from stylemill.store.run_file import RunFile, create_run_folder, installed_versions

NOT_REACHED = "not reached"


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `open` holds each shard that is not committed, with the reason."""

    summary: Summary
    open: dict[int, str]
    signal: int | None
    stopped_because: str | None

    @property
    def exit_code(self) -> int:
        """0 all rows ok, 3 finished with recorded failures, 128 + signal number when interrupted.

        1: incomplete, or so many rows failed that something other than the rows must be wrong.
        """
        if self.signal is not None and self.open:
            return 128 + self.signal
        if self.open or self.stopped_because:
            return 1
        return 3 if self.summary.rows_failed else 0

    def describe(self) -> str:
        """The closing words on the terminal."""
        lines = [self.summary.describe()]
        if self.stopped_because:
            lines.append(self.stopped_because)
        elif self.open:
            known = [f"  shard {shard}: {why}" for shard, why in self.open.items() if why != NOT_REACHED]
            count = f"{len(self.open):,} shards are" if len(self.open) > 1 else "1 shard is"
            lines += [f"{count} open; the same command resumes", *known[:5]]
        return "\n".join(lines)


def run(
    job: Job | str | Path, overrides: dict[str, Any] | None = None, *, inline: bool = False, quiet: bool = False
) -> RunResult:
    """Bring every row of the job's manifest to committed output, as an image or as a recorded failure.

    Starts, resumes or, when all is done, only sums up. `inline` works in this process without Ray. Raises InputError
    for what the user must change first, LockedError while another process works on the same folder.
    """
    job = job if isinstance(job, Job) else Job.load(job, overrides)
    existing = RunFile.find(job.output)
    planned = plan(job, pairs_per_shard=existing.pairs_per_shard if existing else None)
    return _work(planned, existing, _open_generations, inline, quiet)


def retry_failed(
    output: str | Path, overrides: dict[str, Any] | None = None, *, inline: bool = False, quiet: bool = False
) -> RunResult:
    """Try the recorded failures of a run again, and no other row; those that fail again stay recorded.

    What succeeds becomes a new generation of its shard beside what is committed. A retry that was killed goes on with
    the same call. `overrides` are dotted keys of the job. Raises as `run` does, and DamagedError for `repair`.
    """
    return _resume(output, overrides, _failed_generations, inline, quiet)


def resume(
    output: str | Path, overrides: dict[str, Any] | None = None, *, inline: bool = False, quiet: bool = False
) -> RunResult:
    """Bring a run folder to its end: what is open first, then a retry that was begun. As `run`, from job.json alone."""
    result = _resume(output, overrides, _open_generations, inline, quiet)
    _, paths = RunFile.open(output)
    while not result.open and (left := pending_retry(paths, _read_ledger(paths))):
        result = _resume(output, overrides, _failed_generations, inline, quiet)
        if pending_retry(paths, _read_ledger(paths)) == left:
            break
    return result


Choice = Callable[[RunPaths, Ledger], dict[int, int]]  # the shards to work on, and the generation that each gets


def _read_ledger(paths: RunPaths) -> Ledger:
    ledger = Ledger(paths, read_only=True)
    ledger.refresh()
    return ledger


def _open_generations(paths: RunPaths, ledger: Ledger) -> dict[int, int]:
    return {shard: ledger.first_missing(shard) for shard in ledger.open_shards(paths.shards)}


def _failed_generations(paths: RunPaths, ledger: Ledger) -> dict[int, int]:
    """Those of the retry that was begun, else of a new one."""
    if not (wanted := pending_retry(paths, ledger)):
        wanted = {shard: ledger.latest_generation_of(shard) + 1 for shard in ledger.failed_shards()}
        begin_retry(paths, wanted)
    for shard, generation in wanted.items():
        failed_rows_before(paths, shard, generation)  # a damaged file is found now, not by a worker
    return wanted


def _resume(
    output: str | Path, overrides: dict[str, Any] | None, choose: Choice, inline: bool, quiet: bool
) -> RunResult:
    file, paths = RunFile.open(output)
    values = json.loads(json.dumps(file.job)) | {"output": str(paths.output.absolute())}
    for key, value in (overrides or {}).items():
        set_dotted(values, key, value)
    planned = plan(Job.parse(values, str(paths.job), frozenset(overrides or {})), pairs_per_shard=file.pairs_per_shard)
    return _work(planned, file, choose, inline, quiet)


def _work(planned: Plan, existing: RunFile | None, choose: Choice, inline: bool, quiet: bool) -> RunResult:
    paths = RunPaths(Path(planned.job.output), planned.shards)
    if existing and (differences := fingerprint_differences(existing.fingerprint, planned.fingerprint)):
        raise OutputError(
            f"{paths.output}: holds a run of another job, whose images would mix with this one's:\n  "
            + "\n  ".join(differences)
            + "\nUndo the change, or choose another folder with --output"
        )
    create_run_folder(paths)
    with RunLock(paths), _interruptible() as interruption:
        file = existing or _claim(planned, paths)
        ledger = Ledger(paths)
        ledger.refresh()
        if ledger.damaged:  # a segment: its thousands of shards lack no more than their records
            recover_records(paths, file, ledger)
        compact(paths, ledger)
        wanted = choose(paths, ledger)
        this = Run(
            job=planned.job,
            paths=paths,
            manifest=planned.manifest,
            fingerprint=file.fingerprint_sha256,
            pairs_per_shard=planned.pairs_per_shard,
            model=planned.model.label,
            generations={shard: generation for shard, generation in wanted.items() if generation},
            newest=ledger.latest_generation,
        )
        listener = RunListener(this, ledger, quiet, limited=choose is _open_generations)
        reasons: dict[int, str] = {}
        stopped_because = None
        if wanted:
            clean(paths, ledger)  # what killed attempts left behind
            try:
                with listener.bar:
                    work = _executor(inline)
                    reasons = work(this, list(wanted), planned.occurrences, listener, interruption.stopping)
            except IncompleteError as error:
                stopped_because = str(error)
        still_open = ledger.open_shards(planned.shards)
        if not still_open and (listener.committed_now or not paths.contact_sheet.exists()):
            write_contact_sheet(paths, planned.manifest, ledger.records(), inputs=planned.job.inputs)
        if not still_open:
            stopped_because = listener.too_many_failed()  # also when a finished run is started again
        left = [shard for shard, generation in wanted.items() if not ledger.has_record(shard, generation)]
        if not still_open and not pending_retry(paths, ledger):
            end_retry(paths)
        clean(paths, ledger)
        summary = summarize(paths, ledger, planned.rows)
        return RunResult(
            summary=summary,
            open={shard: reasons.get(shard, NOT_REACHED) for shard in sorted({*still_open, *left})},
            signal=interruption.signal,
            stopped_because=stopped_because,
        )


def _executor(inline: bool) -> Any:
    # torch and ray load only when there is work for them.
    if inline:
        from stylemill.execution.local import run_inline

        return run_inline
    from stylemill.cluster import run_on_ray

    return run_on_ray


def _claim(planned: Plan, paths: RunPaths) -> RunFile:
    """Write job.json: from now on this folder is this job's."""
    file = RunFile(
        fingerprint=planned.fingerprint,
        fingerprint_sha256=planned.fingerprint_sha256,
        rows=planned.rows,
        shards=planned.shards,
        pairs_per_shard=planned.pairs_per_shard,
        job=planned.job.model_dump(mode="json"),
        versions=installed_versions(),
    )
    if not publish_bytes(paths, paths.job, file.to_bytes(), uuid4().hex[:12]):
        raise OutputError(f"{paths.job}: appeared while the run was starting; try again")
    return file


class RunListener:
    """The driver's ears: counts what is committed, shows progress, and stops a run that only fails."""

    def __init__(self, run: Run, ledger: Ledger, quiet: bool, limited: bool = True) -> None:
        self.run = run
        self.ledger = ledger
        self.limited = limited  # by max_failed_fraction; a retry begins with failed rows and can only make them fewer
        self.numerics_file = run.paths.numerics
        self.settled = _read_json(self.numerics_file)
        totals = ledger.totals()
        self.bar = ProgressBar(
            run.manifest.num_output_rows, totals.rows_ok + totals.rows_failed, totals.rows_failed, quiet
        )
        self.committed_now = 0
        self.told: set[str] = set()

    @property
    def micro_batch(self) -> int | None:
        """The automatic micro-batch is chosen once a run; a number in the job is the user's to change."""
        automatic = self.run.job.cluster.micro_batch == "auto"
        return int(self.settled["micro_batch"]) if automatic and self.settled else None

    def settle(self, numerics: dict[str, Any]) -> None:
        if not self.settled:
            publish_bytes(self.run.paths, self.numerics_file, json.dumps(numerics, indent=1).encode(), uuid4().hex[:12])
            self.settled = numerics
        changed = [key for key in numerics if numerics[key] != self.settled.get(key)]
        if changed:
            listed = ", ".join(f"{key} {self.settled.get(key)} -> {numerics[key]}" for key in changed)
            self.warn(f"this run began with other numerics ({listed}); images from here on may differ in low bits")

    def progress(self, progress: Progress) -> None:
        self.bar.moved(progress)

    def committed(self, record: Record) -> None:
        record = confirm(self.run.paths, record)
        self.ledger.read(record.shard, record.generation)
        compact(self.run.paths, self.ledger)
        if (size := record.numerics.get("micro_batch")) and size < (self.settled.get("micro_batch") or size):
            self.warn_once(
                f"out of memory: a worker halved its micro-batch to {size}; its images may differ in low bits, and the "
                "records say which"
            )
        self.committed_now += 1
        totals = self.ledger.totals()
        self.bar.committed(record.shard, totals.rows_ok + totals.rows_failed, totals.rows_failed)
        if self.limited and (words := self.too_many_failed()):
            raise IncompleteError(words)

    def too_many_failed(self) -> str | None:
        """What to say when more than max_failed_fraction of the rows seen so far failed, else None."""
        totals, limit = self.ledger.totals(), self.run.job.max_failed_fraction
        seen = totals.rows_ok + totals.rows_failed
        if totals.rows_failed <= limit * seen:
            return None
        return (
            f"too many failures: {totals.rows_failed:,} of the {seen:,} rows seen so far, more than the "
            f"max_failed_fraction of {limit:g}; {self.run.paths.failures_folder} says why. Mend the cause and try them "
            f"again with `stylemill retry-failed {self.run.paths.output}`, or accept the failures with --set "
            "max_failed_fraction=1"
        )

    def warn(self, message: str) -> None:
        self.bar.warn(message)

    def warn_once(self, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            self.warn(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be read ({error}); remove it to go on without its numerics") from error
    return dict(values)


class _Interruption:
    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.signal: int | None = None
        self.since = 0.0

    def __call__(self, number: int, frame: object) -> None:
        if self.stopping.is_set() and time.monotonic() - self.since > 1:  # one Ctrl-C may arrive twice
            raise KeyboardInterrupt
        self.signal, self.since = number, time.monotonic()
        self.stopping.set()


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """SIGINT and SIGTERM ask the workers to write checkpoints and leave; a second one leaves at once."""
    interruption = _Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals belong to the main thread: its owner decides
        return
    previous = {number: signal.signal(number, interruption) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
