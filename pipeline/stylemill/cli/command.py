"""The class of all commands: it refuses what typer would silently decide."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption


class Command(TyperCommand):
    """A command whose options are given once, except for those that are lists. typer would take the last one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(given).items():
            if times > 1 and isinstance(option, TyperOption) and not (option.is_flag or option.multiple):
                raise typer.BadParameter(f"given {times} times; give it once", ctx=ctx, param=option)
        return super().parse_args(ctx, args)
