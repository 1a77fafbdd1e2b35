"""Check a run folder against itself: every digest, every manifest row exactly once, no stray file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stylemill.errors import DamagedError, OutputError
from stylemill.store.paths import RunPaths
from stylemill.store.publish import digest, storage_errors
from stylemill.store.records import FileEntry, Record, standing_record
from stylemill.store.run_file import RunFile
from stylemill.store.writer import check_file

_NAMED = 5  # rows or files named in one message


@dataclass
class VerifyReport:
    """What `verify` found. `shards`, `rows_ok` and `rows_failed` count what is committed."""

    output: Path
    problems: list[str] = field(default_factory=list)
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
    rows = _Rows(run.rows)
    expected: set[Path] = set()
    open_shards = []
    for shard in range(paths.shards):
        try:
            record = standing_record(paths, shard)
        except DamagedError as error:
            report.problems.append(f"{paths.relative(paths.record(shard))}: {error}; the next run redoes this shard")
            record = None
        else:
            if record is None:
                open_shards.append(shard)
        if record is None:
            # What a killed commit published before its record is no stray: the next commit adopts it.
            expected |= {paths.record(shard), paths.data(shard), paths.failures(shard)}
            continue
        expected |= {
            paths.record(shard),
            *(paths.output / entry.name for entry in (record.data, record.failures) if entry),
        }
        report.problems += _check_shard(paths, record, run, rows, deep)
        report.shards += 1
        report.rows_ok += record.rows_ok
        report.rows_failed += record.rows_failed
    if open_shards:
        report.problems.append(f"{_some('shard', open_shards)} not committed yet; the same run command goes on")
    report.problems += rows.repeated()
    report.problems += _stray(paths, expected, finished=report.shards == paths.shards)
    return report


def _check_shard(paths: RunPaths, record: Record, run: RunFile, rows: _Rows, deep: bool) -> Iterator[str]:
    name = paths.relative(paths.record(record.shard))
    first = record.shard * run.pairs_per_shard
    stop = min(first + run.pairs_per_shard, run.rows)
    if record.fingerprint != run.fingerprint_sha256:
        yield f"{name}: belongs to another job than job.json"
    if (record.first_row, record.stop_row) != (first, stop):
        yield f"{name}: is for rows [{record.first_row}, {record.stop_row}); job.json cuts [{first}, {stop})"
    count = np.zeros(stop - first, dtype=np.int64)
    for entry, claimed in ((record.data, record.rows_ok), (record.failures, record.rows_failed)):
        if (entry.rows if entry else 0) != claimed:
            yield f"{name}: its row counts contradict each other"
        if entry is None:
            continue
        path = paths.output / entry.name
        found = _check_file(path, entry, record)
        if isinstance(found, str):
            yield found
            continue
        for row, pair_id in found:
            if first <= row < stop:
                count[row - first] += 1
                rows.add(row, pair_id)
            else:
                yield f"{entry.name}: row {row} is not one of this shard"
        if deep and entry is record.data:
            yield from _decode(path, entry.name)
    for what, wrong in (("missing", count == 0), ("there more than once", count > 1)):
        if wrong.any():
            yield f"{name}: {_some('row', (np.flatnonzero(wrong) + first).tolist())} {what}"


def _check_file(path: Path, entry: FileEntry, record: Record) -> list[tuple[int, str]] | str:
    """The (row, pair_id) of a committed file, or what is wrong with it."""
    if digest(path) != entry.sha256:
        return (
            f"{entry.name}: has other bytes than were committed (SHA-256 differs); move its record away and run again"
        )
    try:
        ids = check_file(path, fingerprint=record.fingerprint)
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

    def __init__(self, rows: int) -> None:
        self._digests = np.zeros(rows, dtype=np.uint64)  # 0: not seen

    def add(self, row: int, pair_id: str) -> None:
        short = hashlib.blake2b(str(pair_id).encode(), digest_size=8).digest()
        self._digests[row] = int.from_bytes(short, "little") or 1

    def repeated(self) -> Iterator[str]:
        order = np.argsort(self._digests, kind="stable")
        ordered = self._digests[order]
        same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
        for position in same[:_NAMED]:
            yield f"rows {order[position]} and {order[position + 1]} have the same pair_id"


def _stray(paths: RunPaths, expected: set[Path], finished: bool) -> Iterator[str]:
    unfinished = (paths.tmp, paths.checkpoints_folder) if finished else ()
    for folder in (paths.data_folder, paths.failures_folder, paths.records_folder, *unfinished):
        with storage_errors(folder):
            found = set(folder.iterdir()) if folder.exists() else set()
        stray = sorted(path.name for path in found - expected)
        if stray:
            yield f"{paths.relative(folder)}/ has {len(stray)} files that are not the run's: {_list(stray)}"


def _some(what: str, numbers: list[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {_list(numbers)} {'are' if len(numbers) > 1 else 'is'}"


def _list(items: list[Any]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(str(item) for item in items[:_NAMED]) + more
