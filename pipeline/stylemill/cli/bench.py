"""The command that measures this machine: bench."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from stylemill.cli.command import Command
from stylemill.cli.options import Tile
from stylemill.errors import OutputError

app = typer.Typer()


@app.command("bench", cls=Command, epilog="example: stylemill bench --random sd15 --compare naive --json bench.json")
def measure(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model folder or hub id, or demo. Without it: --random sd15 on a GPU, else demo.",
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        Literal["sd15", "sdxl"] | None,
        typer.Option(help="Random weights in the dimensions of SD 1.5 or SDXL, without a download."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Side of the images. Without it: what the model is made for.")
    ] = None,
    micro_batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Pairs in a UNet call. Repeatable. Without it: powers of two on a GPU, until memory runs out; with"
            " --compile, the size that a job takes.",
        ),
    ] = None,
    tile: Annotated[
        Tile | None,
        typer.Option(
            parser=Tile.parse,
            metavar="CxS",
            help="Contents and styles that run in lockstep. Without it: 8x8 on a GPU, else 2x4.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="Preset of the run. Without it: guided-transfer.")
    ] = None,
    method: Annotated[
        Literal["guided", "gradient", "optimization", "kv_injection"] | None,
        typer.Option(help="Method, instead of the preset's."),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the run, instead of the preset's.")] = None,
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32", "float64"],
        typer.Option(help="Precision. auto: float16 on a GPU, else float32."),
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cuda, cuda:1, cpu or auto.")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the UNet, for minutes a micro-batch, as cluster.compile does.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="Gradients with the same bits every time, or the fastest, as cluster.deterministic in a job.",
        ),
    ] = True,
    compare: Annotated[
        Literal["naive"] | None,
        typer.Option(help="Also measure one pair at a time, without shared features, and show the ratio."),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write everything there, for plan --bench. -: to stdout, and the table to stderr.",
        ),
    ] = None,
) -> int:
    """Measure the speed and memory of a model on this machine."""
    from stylemill.bench.benchmark import BenchOptions, benchmark

    file = None if json_file in (None, "-") else Path(str(json_file))
    if file:
        _check_writable(file)
    options = BenchOptions(
        model=model,
        random=random,
        size=size,
        dtype=dtype,
        device=device,
        preset=preset,
        method=method,
        steps=steps,
        tile=tile,
        micro_batches=tuple(micro_batch or ()),
        compare_naive=compare == "naive",
        compiled=compiled,
        deterministic=deterministic,
    )
    table = sys.stderr if json_file == "-" else sys.stdout
    result = benchmark(options, lambda line: print(line, file=table, flush=True))
    text = json.dumps(result.model_dump(mode="json"), indent=1)
    if file:
        file.write_text(text + "\n")
    elif json_file == "-":
        print(text)
    return 0


def _check_writable(path: Path) -> None:
    """Raise OutputError, before minutes of measuring, if no file can be written at `path`."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"--json {path}: cannot be written; name a file in a folder that exists and is writable")
