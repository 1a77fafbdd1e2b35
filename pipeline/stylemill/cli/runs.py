"""Commands on a run folder: status, verify, retry-failed, repair."""

from __future__ import annotations

import typer

from stylemill.cli.command import Command
from stylemill.cli.options import (
    Address,
    Deep,
    FailuresOk,
    Inline,
    RunFolder,
    Settings,
    Workers,
    exit_code,
    job_overrides,
)

app = typer.Typer()


@app.command("status", cls=Command, epilog="example: stylemill status runs/quickstart")
def show_status(run: RunFolder) -> int:
    """Show how far a run is."""
    from stylemill.report.status import status

    print(status(run).describe())
    return 0


@app.command("verify", cls=Command, epilog="example: stylemill verify runs/quickstart --deep")
def verify_run(run: RunFolder, deep: Deep = False) -> int:
    """Check every digest, and that each row is committed once."""
    from stylemill.store.verify import verify

    report = verify(run, deep=deep)
    print(report.describe())
    return 0 if report.ok else 1


@app.command("retry-failed", cls=Command, epilog="example: stylemill retry-failed runs/first --workers 2")
def retry_failed_rows(
    run: RunFolder,
    workers: Workers = None,
    address: Address = None,
    settings: Settings = None,
    inline: Inline = False,
    failures_ok: FailuresOk = False,
) -> int:
    """Try the failed rows of a run again, and no others. The same command resumes an interrupted retry."""
    from stylemill.execution.retry import retry_failed

    overrides = job_overrides(settings, workers=workers, address=address)
    result = retry_failed(run, overrides, inline=inline)
    print(result.describe())
    return exit_code(result.exit_code, failures_ok)


@app.command("repair", cls=Command, epilog="example: stylemill repair runs/first --deep")
def repair_run(
    run: RunFolder,
    deep: Deep = False,
    workers: Workers = None,
    address: Address = None,
    settings: Settings = None,
    inline: Inline = False,
    failures_ok: FailuresOk = False,
) -> int:
    """Redo everything that verify finds damaged or missing. Damaged files are moved to quarantine."""
    from stylemill.execution.repair import repair

    overrides = job_overrides(settings, workers=workers, address=address)
    result = repair(run, overrides, deep=deep, inline=inline)
    print(result.describe())
    return exit_code(result.exit_code, failures_ok)
