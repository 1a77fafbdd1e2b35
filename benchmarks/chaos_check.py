"""What must hold of a run folder whatever happened while it came to be. Each check answers with what is wrong."""

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
_PASSING = ("attempt", "timings", "sha256")  # what a record says of who committed it and when


def check(run: Path, undisturbed: Path, rows: int) -> list[str]:
    """What tells a finished run folder from that of an undisturbed run, and from what `verify` wants of one."""
    report = verify(run, deep=True)
    return [
        *rows_once(run, rows),
        *same_files(run, undisturbed),
        *(f"verify --deep: {problem}" for problem in report.problems),
    ]


def rows_once(run: Path, rows: int) -> Iterator[str]:
    """Each row stands once, in data or failures; counted from the files alone, whatever records say."""
    files = [*run.glob("data/*.parquet"), *run.glob("failures/*.parquet")]
    count = Counter(row for file in files for row in pq.read_table(file, columns=["row"])["row"].to_pylist())
    if lost := sorted(set(range(rows)) - count.keys()):
        yield f"{len(lost)} rows are lost: {lost[:5]}"
    if foreign := sorted(count.keys() - set(range(rows))):
        yield f"{len(foreign)} rows are not of this job: {foreign[:5]}"
    if twice := sorted(row for row, times in count.items() if times > 1):
        yield f"{len(twice)} rows are there more than once: {twice[:5]}"


def same_files(run: Path, undisturbed: Path) -> Iterator[str]:
    """The same files with the same bytes. Records may differ in who wrote them and when; job.json names its folder."""
    found, expected = files(run), files(undisturbed)
    if stray := sorted(found - expected):
        yield f"{len(stray)} stray files: {', '.join(stray[:5])}"
    if missing := sorted(expected - found):
        yield f"{len(missing)} files are missing: {', '.join(missing[:5])}"
    for name in sorted((found & expected) - {"job.json"}):
        read = lasting if name.startswith("records/") else Path.read_bytes
        if read(run / name) != read(undisturbed / name):
            yield f"{name}: has other content than in an undisturbed run"


def files(folder: Path) -> set[str]:
    """All that is in a folder, by path; an empty folder counts as a file would."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() or not any(path.iterdir())
    }


def lasting(record: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(record.read_bytes()).items() if name not in _PASSING}


def steps_repeated(taken: int, needed: int, limit: int) -> Iterator[str]:
    """`needed` steps are those of an undisturbed run."""
    if taken < needed:
        yield f"{needed - taken} steps were left out"
    if taken - needed > limit:
        yield f"{taken - needed} steps were repeated, {limit} at most may be"


def tracebacks(log: str) -> Iterator[str]:
    """Errors that nobody injected and nobody caught, in what a driver said for itself and its workers."""
    for line in dict.fromkeys(_RAISED.findall(log)):
        if not _INJECTED.search(line):
            yield f"not injected: {line}"
