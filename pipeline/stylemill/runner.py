"""Run a job: claim the run folder, work off what the ledger says is open, sum up. The same call starts and resumes."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from stylemill.errors import DamagedError, IncompleteError, OutputError
from stylemill.job import Job
from stylemill.lease import Progress, Run
from stylemill.planning import Plan, fingerprint_differences, plan
from stylemill.progress import ProgressBar
from stylemill.report.contact_sheet import write_contact_sheet
from stylemill.report.summary import Summary, summarize
from stylemill.store.commit import clean
from stylemill.store.lock import RunLock
from stylemill.store.paths import RunPaths
from stylemill.store.publish import publish_bytes
from stylemill.store.records import Ledger, Record
from stylemill.store.run_file import RunFile, installed_versions

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
        if self.signal is not None and self.summary.open_shards:
            return 128 + self.signal
        if self.summary.open_shards or self.stopped_because:
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
    paths = RunPaths(Path(planned.job.output), planned.shards)
    if existing and (differences := fingerprint_differences(existing.fingerprint, planned.fingerprint)):
        raise OutputError(
            f"{paths.output}: holds a run of another job, whose images would mix with this one's:\n  "
            + "\n  ".join(differences)
            + "\nUndo the change, or choose another folder with --output"
        )
    paths.create()
    with RunLock(paths), _interruptible() as interruption:
        file = existing or _claim(planned, paths)
        this = Run(
            planned.job, paths, planned.manifest, file.fingerprint_sha256, planned.pairs_per_shard, planned.model.label
        )
        ledger = Ledger(paths)
        ledger.refresh()
        listener = RunListener(this, ledger, quiet)
        reasons: dict[int, str] = {}
        stopped_because = None
        if still_open := ledger.open_shards(planned.shards):
            clean(paths)  # what killed attempts left behind
            try:
                with listener.bar:
                    work = _executor(inline)
                    reasons = work(this, still_open, planned.occurrences, listener, interruption.stopping)
            except IncompleteError as error:
                stopped_because = str(error)
        still_open = ledger.open_shards(planned.shards)
        if not still_open and (listener.committed_now or not paths.contact_sheet.exists()):
            write_contact_sheet(paths, planned.manifest, ledger.refresh().values(), inputs=planned.job.inputs)
        if not still_open:
            stopped_because = listener.too_many_failed()  # also when a finished run is started again
        clean(paths)
        summary = summarize(paths, ledger, planned.rows)
        return RunResult(
            summary=summary,
            open={shard: reasons.get(shard, NOT_REACHED) for shard in still_open},
            signal=interruption.signal,
            stopped_because=stopped_because,
        )


def _executor(inline: bool) -> Any:
    # torch and ray load only when there is work for them.
    if inline:
        from stylemill.inline import run_inline

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

    def __init__(self, run: Run, ledger: Ledger, quiet: bool) -> None:
        self.run = run
        self.ledger = ledger
        self.numerics_file = run.paths.output / "numerics.json"
        self.settled = _read_json(self.numerics_file)
        totals = ledger.totals()
        self.bar = ProgressBar(run.manifest.num_images, totals.rows_ok + totals.rows_failed, totals.rows_failed, quiet)
        self.committed_now = 0

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
        self.ledger.read(record.shard)
        self.committed_now += 1
        totals = self.ledger.totals()
        self.bar.committed(record.shard, totals.rows_ok + totals.rows_failed, totals.rows_failed)
        if words := self.too_many_failed():
            raise IncompleteError(words)

    def too_many_failed(self) -> str | None:
        """What to say when more than max_failed_fraction of the rows seen so far failed, else None."""
        totals, limit = self.ledger.totals(), self.run.job.max_failed_fraction
        seen = totals.rows_ok + totals.rows_failed
        if totals.rows_failed <= limit * seen:
            return None
        return (
            f"too many failures: {totals.rows_failed:,} of the {seen:,} rows seen so far, more than the "
            f"max_failed_fraction of {limit:g}; {self.run.paths.failures_folder} says why. What is recorded as failed "
            "stays so in this folder: mend the cause and choose another with --output, or accept the failures with "
            "--set max_failed_fraction=1"
        )

    def warn(self, message: str) -> None:
        self.bar.warn(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
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
