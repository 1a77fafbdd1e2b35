"""Checks of the run folder that a chaos run leaves. Each check yields what is wrong."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stylemill.store.verify import verify

_RAISED = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): .*", re.MULTILINE)  # the last line of a traceback
_INJECTED = re.compile(r"injected at|\[Errno (?:5|28)\]")  # EIO, ENOSPC
_VARYING = ("attempt", "timings", "sha256")  # keys of a record that differ between equal runs


def check(run: Path, undisturbed: Path, rows: int) -> list[str]:
    """The differences between a finished run folder and that of an undisturbed run, and the problems of `verify`."""
    report = verify(run, deep=True)
    return [
        *rows_once(run, rows),
        *same_files(run, undisturbed),
        *(f"verify --deep: {problem}" for problem in report.problems),
    ]


def rows_once(run: Path, rows: int) -> Iterator[str]:
    """Each row is there once, in data or failures. Counted from the files alone, without the records."""
    files = [*run.glob("data/*.parquet"), *run.glob("failures/*.parquet")]
    count = Counter(row for file in files for row in pq.read_table(file, columns=["row"])["row"].to_pylist())
    if lost := sorted(set(range(rows)) - count.keys()):
        yield f"{len(lost)} rows are lost: {lost[:5]}"
    if foreign := sorted(count.keys() - set(range(rows))):
        yield f"{len(foreign)} rows are not of this job: {foreign[:5]}"
    if twice := sorted(row for row, times in count.items() if times > 1):
        yield f"{len(twice)} rows are there more than once: {twice[:5]}"


def same_files(run: Path, undisturbed: Path) -> Iterator[str]:
    """Both have the same files with the same bytes, except job.json and some keys of the records."""
    actual, expected = files(run), files(undisturbed)
    if stray := sorted(actual - expected):
        yield f"{len(stray)} stray files: {', '.join(stray[:5])}"
    if missing := sorted(expected - actual):
        yield f"{len(missing)} files are missing: {', '.join(missing[:5])}"
    for name in sorted((actual & expected) - {"job.json"}):
        read = without_varying if name.startswith("records/") else Path.read_bytes
        if read(run / name) != read(undisturbed / name):
            yield f"{name}: has other content than in an undisturbed run"


def files(folder: Path) -> set[str]:
    """The relative paths of all files in a folder, and of empty folders."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() or not any(path.iterdir())
    }


def without_varying(record: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(record.read_bytes()).items() if name not in _VARYING}


def steps_repeated(taken: int, needed: int, limit: int) -> Iterator[str]:
    """Compare the steps taken with those that an undisturbed run needs, and with the allowed number of repetitions."""
    if taken < needed:
        yield f"{needed - taken} steps were left out"
    if taken - needed > limit:
        yield f"{taken - needed} steps were repeated, {limit} at most may be"


def tracebacks(log: str) -> Iterator[str]:
    """The errors in the log of a driver and its workers that were neither injected nor caught."""
    for line in dict.fromkeys(_RAISED.findall(log)):
        if not _INJECTED.search(line):
            yield f"not injected: {line}"
