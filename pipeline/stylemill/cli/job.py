"""Commands on a job file: plan, run."""

from __future__ import annotations

from typing import Annotated

import typer

from stylemill.cli.command import Command
from stylemill.cli.options import (
    Address,
    FailuresOk,
    Inline,
    JobFile,
    ManifestFile,
    ModelName,
    Output,
    Preset,
    Settings,
    Workers,
    exit_code,
    job_overrides,
)

app = typer.Typer()


@app.command("plan", cls=Command, epilog="example: stylemill plan jobs/quickstart.yaml --set sampling.steps=20")
def plan_job(
    job: JobFile,
    output: Output = None,
    manifest: ManifestFile = None,
    model: ModelName = None,
    preset: Preset = None,
    workers: Workers = None,
    address: Address = None,
    settings: Settings = None,
    bench: Annotated[
        str | None,
        typer.Option(
            "--bench", metavar="FILE", help="What bench --json wrote: also estimate the time on the device measured."
        ),
    ] = None,
) -> int:
    """Show what a job will do, without doing it."""
    from stylemill.planning.plan import plan

    overrides = job_overrides(
        settings, output=output, manifest=manifest, model=model, preset=preset, workers=workers, address=address
    )
    print(plan(job, overrides).describe(bench))
    return 0


@app.command("run", cls=Command, epilog="example: stylemill run jobs/quickstart.yaml --output runs/first --workers 2")
def run_job(
    job: JobFile,
    output: Output = None,
    manifest: ManifestFile = None,
    model: ModelName = None,
    preset: Preset = None,
    workers: Workers = None,
    address: Address = None,
    settings: Settings = None,
    inline: Inline = False,
    failures_ok: FailuresOk = False,
) -> int:
    """Run a job, or resume it. The same command does both."""
    from stylemill.execution.driver import run

    overrides = job_overrides(
        settings, output=output, manifest=manifest, model=model, preset=preset, workers=workers, address=address
    )
    result = run(job, overrides, inline=inline)
    print(result.describe())
    return exit_code(result.exit_code, failures_ok)
