"""Faults that a test wants to happen: at a named point of the protocol, this process dies, fails, hangs or is late.

    STYLEMILL_FAILPOINTS='after-record:kill:shard=1'              at the first hit, and never again
    STYLEMILL_FAILPOINTS='mid-sample:raise:error=ENOSPC:hit=2; mid-write:delay:seconds=0.2:times=5'
    STYLEMILL_FAILPOINTS='mid-sample:segfault:row=7:times=always'  a pair that kills whoever samples it
    STYLEMILL_FAILPOINTS_STATE=/tmp/some-folder                   where hits are counted, over all processes

A rule is `point:action` and conditions. `hit`, `times`, `seconds` and `error` are the rule's own; any other is compared
with what the point says of itself (shard, step, row, folder, …). Without the variable, which no one sets but
tests, a point is a look into the environment and nothing else.
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

# In the order in which a run comes by them.
POINTS = (
    "load",  # a worker is about to load the model
    "before-read",
    "read-image",  # name: the image's, about to be decoded
    "after-read",
    "mid-sample",  # a step was taken: step, and row: those still being made
    "before-checkpoint",
    "after-checkpoint",
    "before-decode",
    "mid-write",  # a file below tmp/ has content and is not complete; folder: where it will go
    "before-publish",  # of the shard's files
    "mid-publish",  # a file has its final name, and nobody made that durable; folder
    "after-publish",  # files stand, the record does not
    "before-record",
    "after-record",
    "mid-clean",  # in clean-up, tmp/ and what is done being removed
)
ACTIONS = ("kill", "exit", "segfault", "stop", "raise", "hang", "delay")
_OWN = ("hit", "times", "seconds", "error")


@dataclass(frozen=True)
class Rule:
    """What shall happen where, from which hit on, and how often."""

    number: int
    point: str
    action: str
    conditions: dict[str, str]
    hit: int
    times: float
    seconds: float
    error: str

    def applies(self, point: str, facts: dict[str, Any]) -> bool:
        return point == self.point and all(_holds(facts.get(name), wanted) for name, wanted in self.conditions.items())


def failpoint(point: str, **facts: Any) -> None:
    """A point of the protocol, with what a rule may ask of it; a collection holds if any of its members does."""
    if not (text := os.environ.get("STYLEMILL_FAILPOINTS")):
        return
    for rule in parse(text):
        if rule.applies(point, facts):
            hit = _count(rule)
            if rule.hit <= hit < rule.hit + rule.times:
                _act(rule)


@lru_cache
def parse(text: str) -> tuple[Rule, ...]:
    """The rules of STYLEMILL_FAILPOINTS. Raises ValueError for a point or action that there is not."""
    rules = []
    for number, words in enumerate(word for word in text.split(";") if word.strip()):
        point, action, *options = (part.strip() for part in words.split(":"))
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(f"STYLEMILL_FAILPOINTS: {words.strip()!r}: points {POINTS}, actions {ACTIONS}")
        given = dict(option.split("=", 1) for option in options)
        own = {name: given.pop(name) for name in _OWN if name in given}
        times = own.get("times", "1")
        rules.append(
            Rule(
                number=number,
                point=point,
                action=action,
                conditions=given,
                hit=int(own.get("hit", "1")),
                times=float("inf") if times == "always" else int(times),
                seconds=float(own.get("seconds", "0.1")),
                error=own.get("error", "RuntimeError"),
            )
        )
    return tuple(rules)


def _holds(fact: Any, wanted: str) -> bool:
    if isinstance(fact, Collection) and not isinstance(fact, str):
        return any(str(one) == wanted for one in fact)
    return str(fact) == wanted


def _count(rule: Rule) -> int:
    """Which hit of the rule this is, from 1, over all processes: each makes the next file that is not there."""
    folder = Path(os.environ["STYLEMILL_FAILPOINTS_STATE"])
    for hit in count(1):
        try:
            os.close(os.open(folder / f"{rule.number}-{rule.point}-{hit}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return hit
    raise AssertionError


def _act(rule: Rule) -> None:
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
    kind = getattr(errors, rule.error, None) or getattr(builtins, rule.error)
    raised: BaseException = kind(f"injected at {rule.point}")
    return raised
