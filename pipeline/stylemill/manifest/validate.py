"""Check every row of a manifest: values, names, files, and on demand that its images open."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from stylemill.config.paths import is_url
from stylemill.errors import StylemillError
from stylemill.manifest.read import Manifest, hash64, open_manifest, repeated, repeats
from stylemill.manifest.row import parse_row
from stylemill.manifest.schema import ImageRef, Problem, schema_warnings


@dataclass(frozen=True)
class ValidationReport:
    path: Path
    rows: int
    problems: tuple[Problem, ...]  # the first ones, by row
    counts: dict[str, int]  # how many problems each column has, all of them
    contents: int  # unique images
    styles: int
    rows_without_content: int
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.counts

    def __str__(self) -> str:
        lines = [*map(str, self.problems)]
        total = sum(self.counts.values())
        if total > len(self.problems):
            lines.append(f"… and {total - len(self.problems)} more")
        lines += [f"warning: {warning}" for warning in self.warnings]
        summary = f"{self.path}: {self.rows} rows, {self.contents} unique contents, {self.styles} unique styles"
        if self.rows_without_content:
            summary += f", {self.rows_without_content} rows without content"
        by_column = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        lines.append(
            f"{summary}; " + (f"{total} problems ({by_column}); rows count from 0" if total else "no problems")
        )
        return "\n".join(lines)


@dataclass
class _Findings:
    limit: int
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, problem: Problem) -> None:
        self.counts[problem.column] += 1
        self.problems.append(problem)
        if len(self.problems) > 2 * self.limit + 100:  # duplicates and decoding report late: keep the first by row
            self.keep_first()

    def keep_first(self) -> None:
        self.problems = sorted(self.problems, key=lambda problem: problem.row)[: self.limit]


def validate_manifest(
    path: str | Path,
    decode: Callable[[str, ImageRef], None] | None = None,
    *,
    check_files: bool = True,
    workers: int = 4,
    limit: int = 100,
) -> ValidationReport:
    """Check every row, streaming: memory grows by 8 bytes a row and some more for each unique image.

    `decode` opens one image of a column and raises a StylemillError when it cannot; it is called in `workers` threads,
    once for each unique image, behind a bar. Without it, local files only have to be there (`check_files`). A problem
    of an image is reported at the first row that uses it. At most `limit` problems are kept, all are counted.

    Raises ManifestError when the file is no manifest at all: absent, not Parquet, empty, wrong columns.
    """
    manifest = open_manifest(path)
    findings = _Findings(limit)
    ids = array("Q")
    seen: defaultdict[str, set[int]] = defaultdict(set)
    checked: set[int] = set()
    without_content = 0
    pending: deque[tuple[int, str, Future[None]]] = deque()

    def settle() -> None:
        row, column, future = pending.popleft()
        try:
            future.result()
        except StylemillError as error:
            findings.add(Problem(row, column, str(error)))

    with (
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
        tqdm(total=manifest.num_rows, unit="row", disable=None if decode else True) as bar,
    ):
        for number, values in manifest.records():
            bar.update()
            row, problems = parse_row(number, values)
            for problem in problems:
                findings.add(problem)
            if isinstance(name := values.get("pair_id"), str):
                ids.append(hash64(name))
            if row is None:
                continue
            without_content += row.content is None
            for column, ref in row.images():
                image = hash64(ref.key)
                seen[column].add(image)
                if image in checked:
                    continue
                checked.add(image)
                if decode is not None:
                    pending.append((number, column, pool.submit(decode, column, ref)))
                    if len(pending) > 4 * workers:  # a bounded window: embedded images wait in memory
                        settle()
                elif check_files and (missing := _missing(manifest.base, ref)):
                    findings.add(Problem(number, column, missing))
        while pending:
            settle()
    for problem in _repeated_ids(manifest, repeated(ids)):
        findings.add(problem)
    findings.keep_first()
    return ValidationReport(
        path=manifest.path,
        rows=manifest.num_rows,
        problems=tuple(findings.problems),
        counts=dict(findings.counts),
        contents=len(seen["content"]),
        styles=len(seen["style"]),
        rows_without_content=without_content,
        warnings=tuple(schema_warnings(manifest.schema)),
    )


def _missing(base: Path, ref: ImageRef) -> str | None:
    if ref.data is not None or ref.path is None or is_url(ref.path):
        return None
    path = base / ref.path
    try:
        if path.is_file():
            return None
        return f"{path} is not a file" if path.exists() else f"{path} is not there"
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror}"


def _repeated_ids(manifest: Manifest, suspects: set[int]) -> list[Problem]:
    """The second look at ids whose hashes stand more than once."""
    first: dict[str, int] = {}
    problems = []
    for number, values in manifest.records() if suspects else ():
        name = values.get("pair_id")
        if isinstance(name, str) and hash64(name) in suspects and first.setdefault(name, number) != number:
            problems.append(Problem(number, "pair_id", repeats(name, first[name])))
    return problems
