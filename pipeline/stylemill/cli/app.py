"""The command-line program: its commands, its exit codes and the form of its error messages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from stylemill import __version__
from stylemill.cli import bench, job, manifest, model, runs
from stylemill.cli.terminal import write_any_character
from stylemill.errors import StylemillError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help, in ASCII: it stays readable in a pipe, in 60 columns and without UTF-8
    epilog="example: stylemill run jobs/quickstart.yaml",
)
app.add_typer(manifest.app, name="manifest")
app.add_typer(job.app)
app.add_typer(runs.app)
app.add_typer(model.app)
app.add_typer(bench.app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: finished. 1: incomplete, or `verify` found a problem. 2: the command line or an input must be corrected first.
    3: finished, but some rows failed. 128 + n: stopped by signal n.
    """
    write_any_character()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    command = typer.main.get_command(app)
    try:
        # Not app(argv): it prints errors in another form and turns KeyboardInterrupt into an exit code.
        with command.make_context("stylemill", list(sys.argv[1:] if argv is None else argv)) as context:
            return int(command.invoke(context))
    except typer.Exit as end:  # --help or --version
        return end.exit_code
    except typer.TyperException as error:  # the command line
        if failed := getattr(error, "ctx", None):
            print(f"{failed.get_usage()}\nTry '{failed.command_path} --help' for help.\n", file=sys.stderr)
        print(f"error: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    except StylemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `stylemill ... | head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"stylemill {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a Parquet manifest of content and style pairs into a dataset of stylized images."""
