"""Continue a run folder without its job file: try failed rows again, or bring the run to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stylemill.config.job import Job, set_dotted
from stylemill.execution.driver import RunResult, Selection, execute, open_generations
from stylemill.planning.plan import plan
from stylemill.store.ledger import Ledger
from stylemill.store.paths import RunPaths
from stylemill.store.retries import begin_retry, failed_rows_before, pending_retry
from stylemill.store.run_file import RunFile


def retry_failed(
    output: str | Path, overrides: dict[str, Any] | None = None, *, inline: bool = False, quiet: bool = False
) -> RunResult:
    """Try the recorded failures of a run again, and no other row. Rows that fail again stay recorded.

    What succeeds becomes a new generation of its shard, beside what is committed. The same call continues a retry that
    was killed. `overrides` are dotted keys of the job. Raises as `run` does, and DamagedError where `repair` is needed.
    """
    return _continue(output, overrides, _failed_generations, inline, quiet)


def resume(
    output: str | Path, overrides: dict[str, Any] | None = None, *, inline: bool = False, quiet: bool = False
) -> RunResult:
    """Bring a run folder to its end: first the open shards, then a retry that was begun. As `run`, from job.json."""
    result = _continue(output, overrides, open_generations, inline, quiet)
    _, paths = RunFile.open(output)
    while not result.open and (pending := pending_retry(paths, _read_ledger(paths))):
        result = _continue(output, overrides, _failed_generations, inline, quiet)
        if pending_retry(paths, _read_ledger(paths)) == pending:
            break
    return result


def _read_ledger(paths: RunPaths) -> Ledger:
    ledger = Ledger(paths, read_only=True)
    ledger.refresh()
    return ledger


def _failed_generations(paths: RunPaths, ledger: Ledger) -> dict[int, int]:
    """The generations of the retry that was begun, else of a new one."""
    if not (wanted := pending_retry(paths, ledger)):
        wanted = {shard: ledger.latest_generation_of(shard) + 1 for shard in ledger.failed_shards()}
        begin_retry(paths, wanted)
    for shard, generation in wanted.items():
        failed_rows_before(paths, shard, generation)  # raises now for a damaged file, and not in a worker
    return wanted


def _continue(
    output: str | Path, overrides: dict[str, Any] | None, select: Selection, inline: bool, quiet: bool
) -> RunResult:
    run_file, paths = RunFile.open(output)
    values = json.loads(json.dumps(run_file.job)) | {"output": str(paths.output.absolute())}
    for key, value in (overrides or {}).items():
        set_dotted(values, key, value)
    job = Job.parse(values, str(paths.job), frozenset(overrides or {}))
    planned = plan(job)
    return execute(planned, run_file, select, inline, quiet)
