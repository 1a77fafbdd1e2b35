"""The commands of the `stylemill` program, read from the program itself, so that no test forgets one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from stylemill.cli.app import app


def _below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from _below(subcommand, (*words, name))


# The words of each command and command group: (), ("manifest",), ("manifest", "build"), ...
COMMANDS = [words for words, _ in _below(typer.main.get_command(app), ())]
# By these words, the options that have one value: no flags and no lists.
OPTIONS = {
    words: [option.opts[0] for option in command.params if not getattr(option, "is_flag", True) and not option.multiple]
    for words, command in _below(typer.main.get_command(app), ())
}


def words_of(command: tuple[str, ...]) -> str:
    return " ".join(command) or "stylemill"
