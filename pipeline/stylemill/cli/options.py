"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer

from stylemill.errors import JobError

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="YAML job file.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or its s3:// URI.")]

# Each of these sets one key of the job. --set reaches every other key.
Output = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="Run folder or s3:// URI, instead of the job's (output).")
]
ManifestFile = Annotated[
    str | None, typer.Option("--manifest", metavar="FILE", help="Manifest, instead of the job's (manifest).")
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Model folder or hub id, instead of the job's (model.name)."),
]
Preset = Annotated[str | None, typer.Option("--preset", metavar="NAME", help="Preset, instead of the job's (preset).")]
Workers = Annotated[
    str | None, typer.Option("--workers", metavar="N", help="Number of workers, or auto (cluster.workers).")
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="Ray cluster to use, instead of this machine (cluster.address)."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the job, such as sampling.steps=20. Repeatable."),
]

Inline = Annotated[bool, typer.Option("--inline", help="Work in this process, without Ray.")]
FailuresOk = Annotated[bool, typer.Option("--failures-ok", help="Exit with 0 even if rows failed for good.")]
Deep = Annotated[bool, typer.Option("--deep", help="Also decode every image.")]


class Tile(NamedTuple):
    contents: int
    styles: int

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The tile of a text such as 16x16."""
        contents, _, styles = text.partition("x")
        if not (contents.isdecimal() and styles.isdecimal()):
            raise typer.BadParameter(f"{text!r}: write contents x styles, such as 16x16")
        return cls(int(contents), int(styles))


def job_overrides(
    settings: list[str] | None,
    *,
    output: str | None = None,
    manifest: str | None = None,
    model: str | None = None,
    preset: str | None = None,
    workers: str | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Dotted keys of the job and the values that the command line gives them.

    `settings` are the arguments of --set. Their values are YAML, so that `sampling.adain=true` is a Boolean. Raises
    JobError for an argument that is not key=value or not valid YAML, and for a key that is given twice.
    """
    from stylemill.config.yaml import load_yaml

    options = {
        "output": output,
        "manifest": manifest,
        "model.name": model,
        "preset": preset,
        "cluster.workers": int(workers) if workers and workers.isdecimal() else workers,
        "cluster.address": address,
    }
    overrides: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not (key and equals):
            raise JobError(f"--set {setting}: write it as key=value, such as sampling.steps=20")
        value = load_yaml(text, f"--set {setting}")
        key = "model.name" if key == "model" and isinstance(value, str) else key
        for other in overrides:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                twice = key if key == other else f"a part of {min(key, other, key=len)}"
                raise JobError(f"--set {setting}: {twice} is given twice, also as {overrides[other]!r}; give it once")
        overrides[key] = value
    return overrides


def exit_code(code: int, failures_ok: bool) -> int:
    """The exit code of a run; with --failures-ok, 0 instead of 3 (finished, but some rows failed)."""
    return 0 if code == 3 and failures_ok else code
