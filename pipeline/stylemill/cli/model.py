"""Commands on models: demo-model."""

from __future__ import annotations

from typing import Annotated

import typer

from stylemill.cli.command import Command

app = typer.Typer()


@app.command("demo-model", cls=Command, epilog="example: stylemill demo-model runs/models/demo")
def write_model(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="New or empty folder.")],
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the random weights.")] = 0,
    sdxl: Annotated[bool, typer.Option("--sdxl", help="Use the architecture of SDXL instead.")] = False,
    controlnet: Annotated[
        bool, typer.Option("--controlnet", help="Write a ControlNet that fits the demo model instead.")
    ] = False,
) -> int:
    """Write a small untrained model, to try stylemill offline. It has the architecture of Stable Diffusion."""
    from stylemill.demo.untrained import write_demo_model
    from stylemill.demo.untrained_controlnet import write_demo_controlnet

    write = write_demo_controlnet if controlnet else write_demo_model
    print(write(folder, seed, "sdxl" if sdxl else "sd"))
    return 0
