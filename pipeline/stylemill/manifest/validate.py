"""Check every row of a manifest: its values, its id, that its files exist, and on request that its images open."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from stylemill.config.paths import is_url
from stylemill.errors import StylemillError
from stylemill.manifest.duplicates import duplicate_hashes, duplicate_id_message, hash64
from stylemill.manifest.read import Manifest, open_manifest
from stylemill.manifest.row import parse_row
from stylemill.manifest.schema import ImageRef, Problem, schema_warnings
from stylemill.plural import counted

Decode = Callable[[str, ImageRef], None]


@dataclass(frozen=True)
class ValidationReport:
    path: Path
    rows: int
    problems: tuple[Problem, ...]  # the first ones, by row
    counts: dict[str, int]  # of all problems, by column
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
        summary = [
            counted(self.rows, "row"),
            counted(self.contents, "unique content"),
            counted(self.styles, "unique style"),
        ]
        if self.rows_without_content:
            summary.append(counted(self.rows_without_content, "row") + " without content")
        by_column = ", ".join(f"{name} {number}" for name, number in sorted(self.counts.items()))
        problems = f"{counted(total, 'problem')} ({by_column}); rows count from 0" if total else "no problems"
        lines.append(f"{self.path}: {', '.join(summary)}; {problems}")
        return "\n".join(lines)


def validate_manifest(
    path: str | Path,
    decode: Decode | None = None,
    *,
    check_files: bool = True,
    workers: int = 4,
    limit: int = 100,
) -> ValidationReport:
    """Check every row of a manifest in bounded memory: 8 bytes a row, and some more for each unique image.

    `decode` opens one image of a column, and raises a StylemillError where it cannot. It is called once for each unique
    image, in `workers` threads, with a progress bar. Without it, `check_files` only checks that local files exist. A
    problem of an image is reported at the first row that uses it. All problems are counted, and `limit` are returned.

    Raises ManifestError where the file is no manifest: absent, not Parquet, empty, or with wrong columns.
    """
    manifest = open_manifest(path)
    problems = _ProblemList(limit)
    id_hashes = array("Q")
    unique_images: defaultdict[str, set[int]] = defaultdict(set)
    rows_without_content = 0
    with (
        _image_checks(manifest, decode, check_files, workers, problems) as check_image,
        tqdm(total=manifest.num_rows, unit="row", disable=None if decode else True) as bar,
    ):
        for number, values in manifest.raw_rows():
            bar.update()
            row, row_problems = parse_row(number, values)
            for problem in row_problems:
                problems.add(problem)
            if isinstance(pair_id := values.get("pair_id"), str):
                id_hashes.append(hash64(pair_id))
            if row is None:
                continue
            rows_without_content += row.content is None
            for column, ref in row.images():
                unique_images[column].add(hash64(ref.key))
                check_image(number, column, ref)
    for problem in _duplicate_ids(manifest, duplicate_hashes(id_hashes)):
        problems.add(problem)
    return ValidationReport(
        path=manifest.path,
        rows=manifest.num_rows,
        problems=problems.first(),
        counts=dict(problems.counts),
        contents=len(unique_images["content"]),
        styles=len(unique_images["style"]),
        rows_without_content=rows_without_content,
        warnings=tuple(schema_warnings(manifest.schema)),
    )


@dataclass
class _ProblemList:
    """Counts all problems, and keeps the first `limit` by row. They may be added in any order."""

    limit: int
    counts: Counter[str] = field(default_factory=Counter)  # by column
    _problems: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        self.counts[problem.column] += 1
        self._problems.append(problem)
        if len(self._problems) > 2 * self.limit + 100:
            self._problems = [*self.first()]

    def first(self) -> tuple[Problem, ...]:
        return tuple(sorted(self._problems, key=lambda problem: problem.row)[: self.limit])


@contextmanager
def _image_checks(
    manifest: Manifest, decode: Decode | None, check_files: bool, workers: int, problems: _ProblemList
) -> Iterator[Callable[[int, str, ImageRef], None]]:
    """Gives a function that checks an image of a row and column; each unique image is checked once."""
    checked: set[int] = set()
    pending: deque[tuple[int, str, Future[None]]] = deque()

    def finish_oldest() -> None:
        row, column, future = pending.popleft()
        try:
            future.result()
        except StylemillError as error:
            problems.add(Problem(row, column, str(error)))

    def check(row: int, column: str, ref: ImageRef) -> None:
        image = hash64(ref.key)
        if image in checked:
            return
        checked.add(image)
        if decode is not None:
            pending.append((row, column, pool.submit(decode, column, ref)))
            if len(pending) > 4 * workers:  # the bytes of embedded images are in memory meanwhile
                finish_oldest()
        elif check_files and (message := _file_problem(manifest.base, ref)):
            problems.add(Problem(row, column, message))

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        yield check
        while pending:
            finish_oldest()


def _file_problem(base: Path, ref: ImageRef) -> str | None:
    if ref.data is not None or ref.path is None or is_url(ref.path):
        return None
    path = base / ref.path
    try:
        if path.is_file():
            return None
        return f"{path} is not a file" if path.exists() else f"{path} does not exist"
    except OSError as error:
        return f"{path} cannot be accessed: {error.strerror}"


def _duplicate_ids(manifest: Manifest, hashes: set[int]) -> Iterator[Problem]:
    """The rows whose pair_id an earlier row has, among those with these hashes."""
    first_rows: dict[str, int] = {}
    for number, values in manifest.raw_rows() if hashes else ():
        pair_id = values.get("pair_id")
        if not isinstance(pair_id, str) or hash64(pair_id) not in hashes:
            continue
        if (first_row := first_rows.setdefault(pair_id, number)) != number:
            yield Problem(number, "pair_id", duplicate_id_message(pair_id, first_row))
