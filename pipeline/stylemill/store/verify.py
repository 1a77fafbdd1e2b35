"""Check a run folder against its records: every digest, every output row exactly once, no stray files."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stylemill.errors import DamagedError, OutputError
from stylemill.plural import counted
from stylemill.store.atomic import digest, storage_errors
from stylemill.store.failed_rows import read_failed_rows
from stylemill.store.ledger import Ledger
from stylemill.store.lock import lock_holder
from stylemill.store.object_store.reads import list_names, local_copy
from stylemill.store.parquet import check_file
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record, valid_record
from stylemill.store.recover import files_without_record, list_output_files
from stylemill.store.retries import left_to_retry, read_failures, read_retry
from stylemill.store.run_file import RunFile, missing_numerics
from stylemill.store.segments import find_in_segments, list_segments

_MAX_LISTED = 5  # rows or files in one message


@dataclass
class VerifyReport:
    """What `verify` found. `shards`, `rows_ok` and `rows_failed` count what is committed.

    `damaged` holds the files that `repair` moves to quarantine, with the reason.
    """

    output: Path
    problems: list[str] = field(default_factory=list)
    damaged: dict[Path, str] = field(default_factory=dict)
    repairable: bool = False  # whether `repair` mends any of the problems
    shards: int = 0
    rows_ok: int = 0
    rows_failed: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def describe(self) -> str:
        """What `stylemill verify` prints: one line; if something is wrong, a line per problem, and what mends it."""
        committed = ", ".join(
            [
                counted(self.shards, "shard"),
                counted(self.rows_ok, "image"),
                counted(self.rows_failed, "recorded failure"),
            ]
        )
        if self.ok:
            return f"{self.output}: every row is there once and every digest is right: {committed}"
        lines = [f"{self.output}: {counted(len(self.problems), 'problem')}; committed: {committed}", *self.problems]
        if self.repairable:
            lines.append(f"`stylemill repair {self.output}` moves damaged files to quarantine and makes them again")
        return "\n".join(lines)

    def add(self, problem: str, *damaged: Path) -> None:
        """Add a problem that `repair` mends."""
        self.repairable = True
        self.problems.append(problem)
        for path in damaged:
            self.damaged.setdefault(path, problem)


def verify(output: str | Path, deep: bool = False) -> VerifyReport:
    """Read a whole run folder and report what is wrong in it. Changes nothing. A run may work in the folder meanwhile.

    `deep` also decodes every image. Raises OutputError if `output` is not a run folder, StorageError if it cannot be
    read.
    """
    run, paths = RunFile.open(output)
    return verify_run(run, paths, deep, is_alone=lambda: lock_holder(paths) is None)


def verify_run(run: RunFile, paths: RunPaths, deep: bool, is_alone: Callable[[], bool]) -> VerifyReport:
    """`verify` an opened run. `is_alone()` says whether no other process works in the folder."""
    if run.shards != -(-run.rows // run.pairs_per_shard):
        counts = f"{counted(run.rows, 'row')} and {counted(run.shards, 'shard')}"
        raise OutputError(f"{paths.job}: {counts} do not belong together; the file was changed")
    report = VerifyReport(paths.output)
    # First the files, then the records, once: a file that a run publishes meanwhile is not listed, or has its record
    # by then. The retry is read between them, because it is removed after its last record is published.
    listed = list_output_files(paths)
    record_files = [paths.records_folder / name for name in list_names(paths.records_folder)]
    unfinished = [paths.checkpoints_folder, *([] if paths.on_bucket else [paths.tmp])]
    left = [folder / name for folder in unfinished for name in list_names(folder)]
    retry = read_retry(paths)
    in_file = _failed_rows_in_file(paths)
    ledger = Ledger(paths, read_only=True)
    ledger.refresh()
    for path, reason in sorted(ledger.damaged.items()):
        # A data or failures file stays: it may be valid, and the segment wrong about its size.
        damaged = [path] if path.parent == paths.records_folder else []
        report.add(f"{paths.relative(path)}: {reason}", *damaged)
    pair_ids = _PairIds(run.rows, run.pairs_per_shard)
    expected = {path for path in list_segments(paths) if path not in ledger.damaged} | set(ledger.damaged)
    failed_now: list[int] = []
    for shard, generations in groupby(ledger.records(), lambda record: record.shard):
        failed: set[int] | None = set(run.rows_of(shard))
        last = -1
        for record in generations:
            failed, last = failed if record.generation == last + 1 else None, record.generation
            expected |= {paths.record(shard, record.generation), *(paths.output / entry.name for entry in record.files)}
            failed = _RecordCheck(paths, report, run, pair_ids, record).check(failed, deep)
        failed_now += sorted(failed or ())
    totals = ledger.totals()
    report.shards, report.rows_ok, report.rows_failed = totals.shards, totals.rows_ok, totals.rows_failed
    missing = ledger.missing_generations()
    not_started = [shard for shard, number in missing.items() if paths.record(shard, number) not in ledger.damaged]
    if not_started:
        report.problems.append(f"{_listed('shard', not_started)} not committed yet; the same run command resumes")
    # Files of a killed commit are expected, though they have no record: the next commit uses them.
    in_progress = {*missing.items(), *left_to_retry(retry, ledger).items()}
    unrecorded = list(files_without_record(paths, ledger, listed))
    expected |= {path for path, shard, generation in unrecorded if (shard, generation) in in_progress}
    expected |= {paths.record(shard, generation) for shard, generation in in_progress}
    for problem, shards in pair_ids.repeated():
        report.add(problem, *(_data_file(paths, shard) for shard in shards), *(paths.record(shard) for shard in shards))
    _check_json_files(paths, report)
    strays = {*listed, *record_files} - expected
    _report_strays(paths, report, strays, strays - {path for path, _, _ in unrecorded})  # `repair` checks these
    if report.shards == paths.shards and not paths.retry.exists() and is_alone():
        # The process that made a file in these folders has ended, so the file stays if it still exists.
        _report_strays(paths, report, {path for path in left if path.exists()}, set())
    if not report.problems or isinstance(in_file, str):
        _check_failed_rows(paths, report, in_file, failed_now)
    return report


def _data_file(paths: RunPaths, shard: int) -> Path:
    try:
        record = valid_record(paths, shard)
    except DamagedError:
        record = None
    return paths.output / record.data.name if record and record.data else paths.data(shard)


@dataclass
class _RecordCheck:
    """Checks one record and the files that it names."""

    paths: RunPaths
    report: VerifyReport
    run: RunFile
    pair_ids: _PairIds
    record: Record

    @cached_property
    def _holder(self) -> Path:
        """The file that holds the record. Only a problem needs it: it costs a search of the segments."""
        path = self.paths.record(self.record.shard, self.record.generation)
        found = None if path.exists() else find_in_segments(self.paths, self.record.shard, self.record.generation)
        return found[1] if found else path

    def check(self, expected: set[int] | None, deep: bool) -> set[int] | None:
        """Report what is wrong; returns the rows that are still failed, None if they are not known.

        `expected` are the rows that this generation has to hold, None if they are not known.
        """
        record, run = self.record, self.run
        name = self.paths.relative(self.paths.record(record.shard, record.generation))
        rows = run.rows_of(record.shard)
        if record.fingerprint != run.fingerprint_sha256:
            self.report.add(f"{name}: belongs to another job than job.json", self._holder)
        if (record.first_row, record.stop_row) != (rows.start, rows.stop):
            actual = f"[{record.first_row}, {record.stop_row})"
            self.report.add(f"{name}: is for rows {actual}; job.json says [{rows.start}, {rows.stop})", self._holder)
        file_rows: list[list[int] | None] = []
        for entry, recorded in ((record.data, record.rows_ok), (record.failures, record.rows_failed)):
            if (entry.rows if entry else 0) != recorded:
                self.report.add(f"{name}: its row counts contradict each other", self._holder)
            file_rows.append(self._check_file(entry, deep) if entry else [])
        ok, failed = file_rows
        if ok is None or failed is None:
            return set(failed) if failed is not None else None
        files = [self.paths.output / entry.name for entry in record.files]
        count = Counter([*ok, *failed])
        if expected is not None:
            if missing := sorted(expected - count.keys()) if not record.generation else []:
                self.report.add(f"{name}: {_listed('row', missing)} missing", self._holder)
            if foreign := sorted(count.keys() - expected):
                problem = "there already, in an earlier generation" if record.generation else "not of this shard"
                self.report.add(f"{name}: {_listed('row', foreign)} {problem}", self._holder, *files)
        if repeated := sorted(row for row, times in count.items() if times > 1):
            self.report.add(f"{name}: {_listed('row', repeated)} there more than once", self._holder, *files)
        try:
            classes = Counter(failure.error for failure in read_failures(self.paths, record).values())
        except DamagedError as error:
            self.report.add(str(error), self._holder, *files)
        else:
            if classes != record.failed_by_class:
                self.report.add(f"{name}: its counts of error classes are not those of its failures", self._holder)
        if not record.generation:
            return set(failed)
        return None if expected is None else expected - set(ok)

    def _check_file(self, entry: FileEntry, deep: bool) -> list[int] | None:
        """Report what is wrong with a committed file; returns its rows, None if they cannot be read."""
        path = self.paths.output / entry.name
        with local_copy(self.paths, path) as copy:
            if digest(copy) != entry.sha256:
                self.report.add(f"{entry.name}: has other bytes than were committed (SHA-256 differs)", path)
                return None
            try:
                ids = check_file(copy, fingerprint=self.run.fingerprint_sha256)
            except DamagedError as error:
                self.report.add(str(error), path)
                return None
            if len(ids) != entry.rows:
                self.report.add(
                    f"{entry.name}: has {counted(len(ids), 'row')}, its record says {entry.rows}", self._holder
                )
                return None
            for row, pair_id in zip(ids.rows, ids.pair_ids, strict=True):
                if row in self.run.rows_of(self.record.shard):
                    self.pair_ids.add(row, pair_id)
            if deep and entry is self.record.data:
                for problem in _decode_images(copy, entry.name):
                    self.report.add(problem, path)
            return list(ids.rows)


def _decode_images(path: Path, name: str) -> Iterator[str]:
    """Decode every image of a data file; yields the problems."""
    from PIL import Image

    file = pq.ParquetFile(path)
    for batch in file.iter_batches(batch_size=8, columns=["row", "image", "width", "height"]):
        for row in batch.to_pylist():
            try:
                with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                    image.load()
                    size = image.size
            except (OSError, ValueError, SyntaxError, TypeError) as error:
                yield f"{name}: row {row['row']}: the image cannot be decoded: {error}"
                continue
            if size != (row["width"], row["height"]):
                recorded = (row["width"], row["height"])
                yield f"{name}: row {row['row']}: the image has {size} pixels, its columns say {recorded}"


class _PairIds:
    """The pair_ids of a run, as a 64-bit hash per output row: 80 MB for ten million rows."""

    def __init__(self, rows: int, pairs_per_shard: int) -> None:
        self._pairs_per_shard = pairs_per_shard
        self._digests = np.zeros(rows, dtype=np.uint64)  # 0 for a row that was not added

    def add(self, row: int, pair_id: str) -> None:
        short = hashlib.blake2b(str(pair_id).encode(), digest_size=8).digest()
        self._digests[row] = int.from_bytes(short, "little") or 1

    def repeated(self) -> Iterator[tuple[str, list[int]]]:
        """For pair_ids that occur twice: the problem, and the two shards."""
        order = np.argsort(self._digests, kind="stable")
        ordered = self._digests[order]
        same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
        for position in same[:_MAX_LISTED]:
            both = [int(row) for row in order[position : position + 2]]
            yield f"rows {both[0]} and {both[1]} have the same pair_id", [row // self._pairs_per_shard for row in both]


def _check_json_files(paths: RunPaths, report: VerifyReport) -> None:
    """Check numerics.json and retry.json."""
    for path in (paths.numerics, paths.retry):
        with storage_errors(path):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
        try:
            values = json.loads(data)
            valid = isinstance(values, dict) and not (path == paths.numerics and missing_numerics(values))
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            report.add(f"{path.name}: is truncated or damaged", path)


def _failed_rows_in_file(paths: RunPaths) -> tuple[int, ...] | str | None:
    """The rows in failures.parquet, or how it is damaged; None if it does not exist."""
    try:
        return read_failed_rows(paths)
    except DamagedError as error:
        return str(error)


def _check_failed_rows(
    paths: RunPaths, report: VerifyReport, in_file: tuple[int, ...] | str | None, failed: list[int]
) -> None:
    """Report failures.parquet, which had the content `in_file`, unless it has exactly the rows in `failed`."""
    if in_file is None or in_file == tuple(failed) or in_file != _failed_rows_in_file(paths):
        return  # in the last case, a run changed it meanwhile
    wrong_rows = f"{paths.failed_rows.name}: its rows are not those that have no image now"
    report.add(in_file if isinstance(in_file, str) else wrong_rows, paths.failed_rows)


def _report_strays(paths: RunPaths, report: VerifyReport, strays: set[Path], damaged: set[Path]) -> None:
    """Report files that do not belong to the run. Those in `damaged` go to quarantine."""
    for folder, files in groupby(sorted(strays), lambda path: path.parent):
        found = list(files)
        names = _join([path.name for path in found])
        which = f"{counted(len(found), 'file')} that {'is' if len(found) == 1 else 'are'} not the run's"
        problem = f"{paths.relative(folder)}/ has {which}: {names}"
        report.add(problem, *(path for path in found if path in damaged))


def _listed(noun: str, numbers: list[int]) -> str:
    """Such as "row 3 is" or "rows 3, 4 are"."""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {_join(numbers)} {'are' if len(numbers) > 1 else 'is'}"


def _join(items: list[Any]) -> str:
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(str(item) for item in items[:_MAX_LISTED]) + more
