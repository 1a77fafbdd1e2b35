"""Commit a shard: its files get their names, then its record, and nothing committed is ever replaced.

Every step either has no effect or is durable, so a kill between any two leaves a state from which the same commit, by
anyone, goes on: files that stand without a record prove nothing, are looked at, and are adopted or moved away.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stylemill.errors import DamagedError, StorageError
from stylemill.store import checkpoints
from stylemill.store.atomic import (
    digest,
    discard,
    persist,
    publish,
    publish_bytes,
    quarantine,
    remove_tree,
    storage_errors,
)
from stylemill.store.ledger import Ledger
from stylemill.store.lock import exclusive
from stylemill.store.object_store.uploads import remove_unnamed, upload
from stylemill.store.parquet import check_file, write_again
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record, valid_record
from stylemill.store.retries import failed_rows_before, pending_retry
from stylemill.testing.failpoints import failpoint


def commit(paths: RunPaths, record: Record, data_tmp: Path | None, failures_tmp: Path | None) -> Record:
    """Publish the files of a shard and then its record; returns the record that stands.

    `data_tmp` and `failures_tmp` come from `writer`, None where no row succeeded or failed. `record` needs neither
    files nor counts: they are taken from what is committed, which may be another attempt's work. Its own files leave
    tmp/ in any case but a kill. The shard's checkpoints are removed. Raises StorageError, and DamagedError, committing
    nothing, if the files do not hold every row of the shard once.

    On an object store, the files are uploaded, and the record that is returned counts once the driver called `confirm`.
    """
    try:
        if record.generation:
            before = failed_rows_before(paths, record.shard, record.generation)
            classes = Counter(failure.error for failure in before.values())
            record = replace(record, retried_by_class=dict(classes))
            _check_complete(record, before, data_tmp, failures_tmp)
        else:
            _check_complete(record, range(record.first_row, record.stop_row), data_tmp, failures_tmp)
        if paths.on_bucket:
            return upload(paths, complete_record(paths, record, data_tmp, failures_tmp), data_tmp, failures_tmp)
        # The lock keeps two attempts from judging each other's half-published work; create-if-absent would do without
        # it as long as both give the same rows.
        with exclusive(paths.commit_lock(record.shard)):
            standing = _standing(paths, record)
            if standing is None:
                failpoint("before-publish", shard=record.shard)
                data = _settle(paths, data_tmp, paths.data(record.shard, record.generation))
                failures = _settle(paths, failures_tmp, paths.failures(record.shard, record.generation))
                failpoint("after-publish", shard=record.shard)
                complete = complete_record(paths, record, data, failures)
                failpoint("before-record", shard=record.shard)
                standing = publish_record(paths, complete)
                failpoint("after-record", shard=record.shard)
    finally:
        discard(data_tmp)
        discard(failures_tmp)
    checkpoints.clear(paths, record.shard)
    return standing


def confirm(paths: RunPaths, record: Record) -> Record:
    """The driver's part of a commit, under the RunLock: publish what `commit` returned; returns what stands then."""
    if not paths.on_bucket:
        return record
    standing = _standing(paths, record)
    if standing is None:
        failpoint("before-record", shard=record.shard)
        standing = publish_record(paths, record)
        failpoint("after-record", shard=record.shard)
    checkpoints.clear(paths, record.shard)
    return standing


def clean(paths: RunPaths, ledger: Ledger | None = None) -> None:
    """Empty tmp/ and remove the checkpoints of committed shards; a finished run keeps neither folder, nor its cache.

    The caller holds the RunLock and has no worker at work. Raises StorageError.
    """
    ledger = ledger or Ledger(paths)
    wanted = {*ledger.open_shards(paths.shards), *pending_retry(paths, ledger)}
    kept = {paths.number(shard) for shard in wanted}
    with storage_errors(paths.checkpoints_folder):
        found = list(paths.checkpoints_folder.iterdir()) if paths.checkpoints_folder.exists() else []
    for path in found:
        if path.suffix == ".lock" and path.stem not in kept:
            discard(path)
        elif path.name not in kept:
            remove_tree(path)
            failpoint("mid-clean", folder=path.name)
    finished = not wanted
    if finished:
        remove_unnamed(paths, ledger)
    with storage_errors(paths.output):
        for folder in (paths.tmp, paths.commit_lock(0).parent, paths.cache) if finished else (paths.tmp,):
            if folder.exists():
                shutil.rmtree(folder)
                failpoint("mid-clean", folder=folder.name)
        if not finished:
            paths.tmp.mkdir()


def _check_complete(
    record: Record, expected: Collection[int], data_tmp: Path | None, failures_tmp: Path | None
) -> None:
    rows: list[int] = []
    for tmp in (data_tmp, failures_tmp):
        if tmp is not None:
            found = check_file(tmp, fingerprint=record.fingerprint).rows
            if list(found) != sorted(found):
                raise DamagedError(f"{tmp}: rows are not in the order of the manifest; nothing was committed")
            rows += found
    if sorted(rows) != sorted(expected):
        those = "that failed before " if record.generation else ""
        raise DamagedError(
            f"shard {record.shard}: the {len(rows)} rows of attempt {record.attempt} are not the rows {those}of "
            f"{record.first_row} to {record.stop_row - 1} once each; nothing was committed"
        )


def _standing(paths: RunPaths, record: Record) -> Record | None:
    try:
        standing = valid_record(paths, record.shard, record.generation)
        if standing is not None and standing.fingerprint != record.fingerprint:
            raise DamagedError("the record is that of another job")
    except DamagedError as error:
        quarantine(paths, paths.record(record.shard, record.generation), str(error))
        return None
    return standing


def _settle(paths: RunPaths, tmp: Path | None, final: Path) -> Path | None:
    """Let `final` be `tmp`, or a valid file with the same rows that stands there already."""
    if tmp is None:
        if final.exists():
            quarantine(paths, final, "no record names it, and the shard has no such rows")
        return None
    while not publish(tmp, final):
        why = unlike(final, tmp)
        if why is None:
            persist(final)
            break
        quarantine(paths, final, why)
    return final


def unlike(final: Path, tmp: Path) -> str | None:
    """Why the file at `final` cannot stand for `tmp`, or None: it is whole and has the same columns, job and rows."""
    if digest(final) == digest(tmp):
        return None
    with storage_errors(tmp):
        schema = pq.read_schema(tmp)
    again = tmp.with_name(f"{tmp.name}.again")
    try:
        if check_file(final, schema) != check_file(tmp):
            return "no record names it, and it has other rows than the attempt that was committed"
        # Pages have checksums, the footer has none: whole is what our writer would write for these rows.
        same = digest(write_again(final, again)) == digest(final)
    except DamagedError as error:
        return str(error)
    finally:
        discard(again)
    return None if same else "it is not as it was written"


def complete_record(paths: RunPaths, record: Record, data: Path | None, failures: Path | None) -> Record:
    """`record` with the counts, sizes and digests of its files, which are still below tmp/ or stand already."""
    shard, generation = record.shard, record.generation
    finals = {"data": paths.data(shard, generation), "failures": paths.failures(shard, generation)}
    files = {"data": data, "failures": failures}
    entries = {name: _entry(paths, path, finals[name]) for name, path in files.items() if path is not None}
    classes: Counter[str] = Counter()
    if failures is not None:
        with storage_errors(failures):
            errors: list[Any] = pq.ParquetFile(failures).read(["error"], use_threads=False).column("error").to_pylist()
        classes.update(errors)
    ok, failed = (entries[name].rows if name in entries else 0 for name in ("data", "failures"))
    return replace(
        record,
        rows_ok=ok,
        rows_failed=failed,
        data=entries.get("data"),
        failures=entries.get("failures"),
        failed_by_class=dict(classes),
    )


def _entry(paths: RunPaths, path: Path, final: Path) -> FileEntry:
    with storage_errors(path):
        rows = pq.read_metadata(path).num_rows
        size = path.stat().st_size
    sha256 = digest(path)
    return FileEntry(paths.relative(paths.committed(final, sha256)), rows, size, sha256)


def publish_record(paths: RunPaths, record: Record) -> Record:
    final = paths.record(record.shard, record.generation)
    if publish_bytes(paths, final, record.to_bytes(), record.attempt):
        return record
    standing = valid_record(paths, record.shard, record.generation)
    if standing is None:
        raise StorageError(f"{final}: changed while shard {record.shard} was committed; the same command resumes")
    persist(final)
    return standing
