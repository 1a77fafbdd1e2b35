"""Check a run folder against itself: every digest, every manifest row exactly once, no stray file."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stylemill.errors import DamagedError, OutputError
from stylemill.store.atomic import digest, storage_errors
from stylemill.store.ledger import Ledger
from stylemill.store.object_store.reads import local_copy
from stylemill.store.parquet import check_file
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record, valid_record
from stylemill.store.recover import files_without_record
from stylemill.store.retries import failures_of, pending_retry
from stylemill.store.run_file import RunFile
from stylemill.store.segments import find_record, segments

_NAMED = 5  # rows or files named in one message


@dataclass
class VerifyReport:
    """What `verify` found. `shards`, `rows_ok` and `rows_failed` count what is committed.

    `damaged` are the files that cannot stay where they are, with the reason: `repair` moves them to quarantine.
    """

    output: Path
    problems: list[str] = field(default_factory=list)
    damaged: dict[Path, str] = field(default_factory=dict)
    shards: int = 0
    rows_ok: int = 0
    rows_failed: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def describe(self) -> str:
        """What `stylemill verify` prints: one line if all is well, else a line a problem too."""
        found = f"{self.shards:,} shards, {self.rows_ok:,} images, {self.rows_failed:,} recorded failures"
        if self.ok:
            return f"{self.output}: every row is there once and every digest is right: {found}"
        return "\n".join([f"{self.output}: {len(self.problems)} problems; committed: {found}", *self.problems])

    def note(self, problem: str, *damaged: Path) -> None:
        self.problems.append(problem)
        for path in damaged:
            self.damaged.setdefault(path, problem)


def verify(output: str | Path, deep: bool = False) -> VerifyReport:
    """Read all of a run folder and report what is wrong in it; changes nothing.

    `deep` also decodes every image. Raises OutputError if `output` is no run folder, StorageError if it cannot be read.
    """
    run, paths = RunFile.open(output)
    if run.shards != -(-run.rows // run.pairs_per_shard):
        raise OutputError(
            f"{paths.job}: {run.rows} rows and {run.shards} shards do not belong together; it was changed"
        )
    report = VerifyReport(paths.output)
    ledger = Ledger(paths, read_only=True)
    ledger.refresh()
    for path, why in sorted(ledger.damaged.items()):
        gone = [path] if path.parent == paths.records_folder else []  # not a file that a segment may be wrong about
        report.note(f"{paths.relative(path)}: {why}; `stylemill repair` sets it right", *gone)
    rows = _Rows(run.rows, run.pairs_per_shard)
    expected = {path for path in segments(paths) if path not in ledger.damaged} | set(ledger.damaged)
    for shard, generations in groupby(ledger.records(), lambda record: record.shard):
        failed: set[int] | None = set(run.rows_of(shard))
        last = -1
        for record in generations:
            failed, last = failed if record.generation == last + 1 else None, record.generation
            entries = [entry for entry in (record.data, record.failures) if entry]
            expected |= {paths.record(shard, record.generation), *(paths.output / entry.name for entry in entries)}
            failed = _Shard(paths, report, run, rows, record).check(failed, deep)
    totals = ledger.totals()
    report.shards, report.rows_ok, report.rows_failed = totals.shards, totals.rows_ok, totals.rows_failed
    not_done = {shard: ledger.first_missing(shard) for shard in ledger.open_shards(paths.shards)}
    unexplained = [shard for shard, lacks in not_done.items() if paths.record(shard, lacks) not in ledger.damaged]
    if unexplained:
        report.note(f"{_some('shard', unexplained)} not committed yet; the same run command goes on")
    # What a killed commit published before its record is no stray: the next commit adopts it.
    begun = {*not_done.items(), *pending_retry(paths, ledger).items()}
    unrecorded = list(files_without_record(paths, ledger))
    expected |= {path for path, shard, generation in unrecorded if (shard, generation) in begun}
    expected |= {paths.record(shard, generation) for shard, generation in begun}
    for problem, places in rows.repeated():
        report.note(problem, *(_data_of(paths, place) for place in places), *(paths.record(place) for place in places))
    _check_notes(paths, report)
    adoptable = {path for path, _, _ in unrecorded}  # `repair` looks whether they are whole
    _find_strays(paths, report, expected, adoptable)
    return report


def _data_of(paths: RunPaths, shard: int) -> Path:
    try:
        record = valid_record(paths, shard)
    except DamagedError:
        record = None
    return paths.output / record.data.name if record and record.data else paths.data(shard)


@dataclass
class _Shard:
    """One record and the files it is about."""

    paths: RunPaths
    report: VerifyReport
    run: RunFile
    rows: _Rows
    record: Record

    def check(self, expected: set[int] | None, deep: bool) -> set[int] | None:
        """Report what is wrong; returns the rows that are left failed, None where that cannot be known.

        `expected` are the rows that this generation must be about, None: not known.
        """
        record, run = self.record, self.run
        own = self.paths.record(record.shard, record.generation)
        name, rows = self.paths.relative(own), run.rows_of(record.shard)
        if not own.exists() and (found_in := find_record(self.paths, record.shard, record.generation)):
            own = found_in[1]
        if record.fingerprint != run.fingerprint_sha256:
            self.report.note(f"{name}: belongs to another job than job.json", own)
        if (record.first_row, record.stop_row) != (rows.start, rows.stop):
            cut = f"job.json cuts [{rows.start}, {rows.stop})"
            self.report.note(f"{name}: is for rows [{record.first_row}, {record.stop_row}); {cut}", own)
        found: list[list[int] | None] = []
        for entry, claimed in ((record.data, record.rows_ok), (record.failures, record.rows_failed)):
            if (entry.rows if entry else 0) != claimed:
                self.report.note(f"{name}: its row counts contradict each other", own)
            found.append(self._rows_of(entry, own, deep) if entry else [])
        good, lost = found
        if good is None or lost is None:
            return set(lost) if lost is not None else None
        files = [self.paths.output / entry.name for entry in (record.data, record.failures) if entry]
        count = Counter([*good, *lost])
        if expected is not None:
            if missing := sorted(expected - count.keys()) if not record.generation else []:
                self.report.note(f"{name}: {_some('row', missing)} missing", own)
            if foreign := sorted(count.keys() - expected):
                if record.generation:
                    why = f"{_some('row', foreign)} there already, in an earlier generation"
                else:
                    why = f"{_some('row', foreign)} not of this shard"
                self.report.note(f"{name}: {why}", own, *files)
        if twice := sorted(row for row, times in count.items() if times > 1):
            self.report.note(f"{name}: {_some('row', twice)} there more than once", own, *files)
        try:
            classes = Counter(failure.error for failure in failures_of(self.paths, record).values())
        except DamagedError as error:
            self.report.note(str(error), own, *files)
        else:
            if classes != record.failed_by_class:
                self.report.note(f"{name}: its counts of error classes are not those of its failures", own)
        if not record.generation:
            return set(lost)
        return None if expected is None else expected - set(good)

    def _rows_of(self, entry: FileEntry, own: Path, deep: bool) -> list[int] | None:
        """The rows of a file, None where that is not known."""
        path = self.paths.output / entry.name
        with local_copy(self.paths, path) as copy:
            return self._rows_in(copy, path, entry, own, deep)

    def _rows_in(self, copy: Path, path: Path, entry: FileEntry, own: Path, deep: bool) -> list[int] | None:
        found = _check_file(copy, entry, self.run.fingerprint_sha256)
        if isinstance(found, str):
            wrong_count = "its record says" in found
            self.report.note(found, own if wrong_count else path)
            return None
        for row, pair_id in found:
            if row in self.run.rows_of(self.record.shard):
                self.rows.add(row, pair_id)
        if deep and entry is self.record.data:
            for problem in _decode(copy, entry.name):
                self.report.note(problem, path)
        return [row for row, _ in found]


def _check_file(path: Path, entry: FileEntry, fingerprint: str) -> list[tuple[int, str]] | str:
    """The (row, pair_id) of a committed file, or what is wrong with it."""
    if digest(path) != entry.sha256:
        return f"{entry.name}: has other bytes than were committed (SHA-256 differs)"
    try:
        ids = check_file(path, fingerprint=fingerprint)
    except DamagedError as error:
        return str(error)
    if len(ids) != entry.rows:
        return f"{entry.name}: has {len(ids)} rows, its record says {entry.rows}"
    return list(zip(ids.rows, ids.pair_ids, strict=True))


def _decode(path: Path, name: str) -> Iterator[str]:
    from PIL import Image

    file = pq.ParquetFile(path)
    for batch in file.iter_batches(batch_size=8, columns=["row", "image", "width", "height"]):
        for item in batch.to_pylist():
            try:
                with Image.open(io.BytesIO(item["image"]["bytes"])) as image:
                    image.load()
                    size = image.size
            except (OSError, ValueError, SyntaxError, TypeError) as error:
                yield f"{name}: row {item['row']}: the image cannot be decoded: {error}"
                continue
            if size != (item["width"], item["height"]):
                yield f"{name}: row {item['row']}: the image has {size} pixels, its columns say otherwise"


class _Rows:
    """The pair_ids seen in a run, as 64 bits a row: a manifest of ten million rows takes 80 MB."""

    def __init__(self, rows: int, pairs_per_shard: int) -> None:
        self._pairs_per_shard = pairs_per_shard
        self._digests = np.zeros(rows, dtype=np.uint64)  # 0: not seen

    def add(self, row: int, pair_id: str) -> None:
        short = hashlib.blake2b(str(pair_id).encode(), digest_size=8).digest()
        self._digests[row] = int.from_bytes(short, "little") or 1

    def repeated(self) -> Iterator[tuple[str, list[int]]]:
        """What to say of a repeated pair_id, and the shards it is in."""
        order = np.argsort(self._digests, kind="stable")
        ordered = self._digests[order]
        same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
        for position in same[:_NAMED]:
            both = [int(row) for row in order[position : position + 2]]
            yield f"rows {both[0]} and {both[1]} have the same pair_id", [row // self._pairs_per_shard for row in both]


def _check_notes(paths: RunPaths, report: VerifyReport) -> None:
    """The small JSON files beside job.json."""
    for path in (paths.numerics, paths.retry):
        with storage_errors(path):
            data = path.read_bytes() if path.exists() else b"{}"
        try:
            whole = isinstance(json.loads(data), dict)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            report.note(f"{path.name}: is truncated or damaged", path)


def _find_strays(paths: RunPaths, report: VerifyReport, expected: set[Path], adoptable: set[Path]) -> None:
    finished = report.shards == paths.shards and not paths.retry.exists()
    unfinished = [paths.checkpoints_folder, *([] if paths.on_bucket else [paths.tmp])] if finished else []
    for folder in (paths.data_folder, paths.failures_folder, paths.records_folder, *unfinished):
        with storage_errors(folder):
            found = set(folder.iterdir()) if folder.exists() else set()
        stray = sorted(found - expected)
        if stray:
            names = _list([path.name for path in stray])
            problem = f"{paths.relative(folder)}/ has {len(stray)} files that are not the run's: {names}"
            report.note(problem, *(path for path in stray if path not in adoptable and folder not in unfinished))


def _some(what: str, numbers: list[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {_list(numbers)} {'are' if len(numbers) > 1 else 'is'}"


def _list(items: list[Any]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(str(item) for item in items[:_NAMED]) + more
