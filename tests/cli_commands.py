"""The commands of the `stylemill` program, read from the program itself, so that no test forgets one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from stylemill.cli.app import app


def _below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from _below(subcommand, (*words, name))


# The words of each command and command group: (), ("manifest",), ("manifest", "build"), ...
COMMANDS = list(_below(typer.main.get_command(app), ()))


def words_of(command: tuple[str, ...]) -> str:
    return " ".join(command) or "stylemill"
