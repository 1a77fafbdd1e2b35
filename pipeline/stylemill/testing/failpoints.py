"""Failpoints: named points of the code where a test makes the process die, fail, hang or wait.

    STYLEMILL_FAILPOINTS='after-record:kill:shard=1'               at the first hit, and never again
    STYLEMILL_FAILPOINTS='mid-sample:raise:error=ENOSPC:hit=2; mid-write:delay:seconds=0.2:times=5'
    STYLEMILL_FAILPOINTS='mid-sample:segfault:row=7:times=always'  a pair that kills every worker that samples it
    STYLEMILL_FAILPOINTS_STATE=/tmp/some-folder                    where hits are counted, over all processes

A rule is `point:action`, followed by options. `hit`, `times`, `seconds` and `error` belong to the rule. Any other
option is a condition: it is compared with an argument of the failpoint (shard, step, row, folder, …). Only tests set
the variable. Without it, a failpoint does nothing.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from stylemill import errors

# In the order in which a run passes them.
POINTS = (
    "load",  # before a worker loads the model
    "before-read",
    "read-image",  # before an image is decoded; name: that of the image
    "after-read",
    "mid-sample",  # after a step; step, and row: all rows that are still sampled
    "before-checkpoint",
    "after-checkpoint",
    "before-decode",
    "mid-write",  # a file in tmp/ is written in part; folder: where it will be published
    "before-publish",  # of the files of a shard
    "mid-publish",  # a file has its final name, but is not durable yet; folder
    "after-publish",  # the files of a shard are published, its record is not
    "before-record",
    "after-record",
    "mid-clean",  # while tmp/ and checkpoints of committed shards are removed
)
ACTIONS = ("kill", "exit", "segfault", "stop", "raise", "hang", "delay")
_RULE_OPTIONS = ("hit", "times", "seconds", "error")


@dataclass(frozen=True)
class Rule:
    """An action at a point, from the `hit`th hit on, `times` times."""

    number: int
    point: str
    action: str
    conditions: dict[str, str]
    hit: int
    times: float
    seconds: float
    error: str

    def matches(self, point: str, arguments: dict[str, Any]) -> bool:
        return point == self.point and all(
            _matches_value(arguments.get(name), expected) for name, expected in self.conditions.items()
        )


def failpoint(point: str, **arguments: Any) -> None:
    """Act as the rules for this point say. A condition compares an argument, or any member of a collection."""
    if not (text := os.environ.get("STYLEMILL_FAILPOINTS")):
        return
    for rule in parse_rules(text):
        if rule.matches(point, arguments):
            hit = _count(rule)
            if rule.hit <= hit < rule.hit + rule.times:
                _perform(rule)


@lru_cache
def parse_rules(text: str) -> tuple[Rule, ...]:
    """The rules in STYLEMILL_FAILPOINTS. Raises ValueError for an unknown point or action."""
    rules = []
    for number, part in enumerate(part for part in text.split(";") if part.strip()):
        point, action, *options = (field.strip() for field in part.split(":"))
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(f"STYLEMILL_FAILPOINTS: {part.strip()!r}: points are {POINTS}, actions are {ACTIONS}")
        conditions = dict(option.split("=", 1) for option in options)
        given = {name: conditions.pop(name) for name in _RULE_OPTIONS if name in conditions}
        times = given.get("times", "1")
        rules.append(
            Rule(
                number=number,
                point=point,
                action=action,
                conditions=conditions,
                hit=int(given.get("hit", "1")),
                times=float("inf") if times == "always" else int(times),
                seconds=float(given.get("seconds", "0.1")),
                error=given.get("error", "RuntimeError"),
            )
        )
    return tuple(rules)


def _matches_value(argument: Any, expected: str) -> bool:
    if isinstance(argument, Collection) and not isinstance(argument, str):
        return any(str(member) == expected for member in argument)
    return str(argument) == expected


def _count(rule: Rule) -> int:
    """The number of this hit of the rule, from 1, over all processes: each hit creates the next missing file."""
    folder = Path(os.environ["STYLEMILL_FAILPOINTS_STATE"])
    for hit in count(1):
        try:
            os.close(os.open(folder / f"{rule.number}-{rule.point}-{hit}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return hit
    raise AssertionError


def _perform(rule: Rule) -> None:
    if rule.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif rule.action == "exit":
        os._exit(1)
    elif rule.action == "segfault":
        ctypes.string_at(0)
    elif rule.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rule.action == "hang":
        threading.Event().wait()
    elif rule.action == "delay":
        time.sleep(rule.seconds)
    else:
        raise _error(rule)


def _error(rule: Rule) -> BaseException:
    if (number := getattr(errno, rule.error, None)) is not None:
        return OSError(number, os.strerror(number))
    error_class = getattr(errors, rule.error, None) or getattr(builtins, rule.error)
    error: BaseException = error_class(f"injected at {rule.point}")
    return error
