"""Commit a shard: publish its files, then its record. Nothing committed is ever replaced.

Each step either has no effect or is durable. After a kill between two steps, the next attempt continues the commit:
files without a record are checked, and used if they are valid or moved to quarantine if not.
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
from stylemill.plural import counted
from stylemill.store import checkpoints
from stylemill.store.atomic import (
    digest,
    discard,
    publish,
    publish_bytes,
    quarantine,
    remove_tree,
    storage_errors,
    sync_published,
)
from stylemill.store.ledger import Ledger
from stylemill.store.lock import file_lock
from stylemill.store.object_store.uploads import remove_unreferenced, upload_files
from stylemill.store.parquet import check_file, rewrite
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record, check_record, read_record_file, valid_record
from stylemill.store.retries import failed_rows_before, pending_retry
from stylemill.store.segments import find_in_segments
from stylemill.testing.failpoints import failpoint


def commit(paths: RunPaths, record: Record, data_tmp: Path | None, failures_tmp: Path | None) -> Record:
    """Publish the files of a shard and then its record; returns the record that is now committed.

    `data_tmp` and `failures_tmp` are the unfinished files from `store.parquet`, None if no row succeeded or failed. The
    files and counts of `record` are filled in from what is committed, which can be the work of another attempt. The
    unfinished files and the checkpoints of the shard are removed. Raises StorageError, and DamagedError if the files do
    not hold every row of the shard exactly once; then nothing is committed.

    On an object store, this only uploads the files. The shard is committed when the driver passes the returned record
    to `confirm`.
    """
    try:
        if record.generation:
            before = failed_rows_before(paths, record.shard, record.generation)
            classes = Counter(failure.error for failure in before.values())
            record = replace(record, retried_by_class=dict(classes))
            _check_rows(record, before, data_tmp, failures_tmp)
        else:
            _check_rows(record, range(record.first_row, record.stop_row), data_tmp, failures_tmp)
        if paths.on_bucket:
            return upload_files(paths, complete_record(paths, record, data_tmp, failures_tmp), data_tmp, failures_tmp)
        # The lock keeps an attempt from quarantining files that another attempt is just publishing.
        with file_lock(paths.commit_lock(record.shard)):
            committed = _committed_record(paths, record)
            if committed is None:
                failpoint("before-publish", shard=record.shard)
                data = _publish_file(paths, data_tmp, paths.data(record.shard, record.generation))
                failures = _publish_file(paths, failures_tmp, paths.failures(record.shard, record.generation))
                failpoint("after-publish", shard=record.shard)
                complete = complete_record(paths, record, data, failures)
                failpoint("before-record", shard=record.shard)
                committed = publish_record(paths, complete)
                failpoint("after-record", shard=record.shard)
    finally:
        discard(data_tmp)
        discard(failures_tmp)
    checkpoints.clear(paths, record.shard)
    return committed


def confirm(paths: RunPaths, record: Record) -> Record:
    """The driver's part of a commit: publish the record that `commit` returned; returns the record that is committed.

    The caller holds the RunLock. On a disk, `commit` has published the record already.
    """
    if not paths.on_bucket:
        return record
    committed = _committed_record(paths, record)
    if committed is None:
        failpoint("before-record", shard=record.shard)
        committed = publish_record(paths, record)
        failpoint("after-record", shard=record.shard)
    checkpoints.clear(paths, record.shard)
    return committed


def clean(paths: RunPaths, ledger: Ledger | None = None) -> None:
    """Empty tmp/ and remove the checkpoints of committed shards. In a finished run, remove both folders and the cache.

    The caller holds the RunLock, and no worker is running. Raises StorageError.
    """
    ledger = ledger or Ledger(paths)
    unfinished = {*ledger.open_shards(paths.shards), *pending_retry(paths, ledger)}
    kept = {paths.number(shard) for shard in unfinished}
    with storage_errors(paths.checkpoints_folder):
        existing = list(paths.checkpoints_folder.iterdir()) if paths.checkpoints_folder.exists() else []
    for path in existing:
        if path.suffix == ".lock" and path.stem not in kept:
            discard(path)
        elif path.name not in kept:
            remove_tree(path)
            failpoint("mid-clean", folder=path.name)
    finished = not unfinished
    if finished:
        remove_unreferenced(paths, ledger)
    with storage_errors(paths.output):
        for folder in (paths.tmp, paths.commit_lock(0).parent, paths.cache) if finished else (paths.tmp,):
            if folder.exists():
                shutil.rmtree(folder)
                failpoint("mid-clean", folder=folder.name)
        if not finished:
            paths.tmp.mkdir()


def _check_rows(record: Record, expected: Collection[int], data_tmp: Path | None, failures_tmp: Path | None) -> None:
    rows: list[int] = []
    for tmp in (data_tmp, failures_tmp):
        if tmp is not None:
            file_rows = check_file(tmp, fingerprint=record.fingerprint).rows
            if list(file_rows) != sorted(file_rows):
                raise DamagedError(f"{tmp}: the rows are not in the order of the manifest; nothing was committed")
            rows += file_rows
    if sorted(rows) != sorted(expected):
        which = "the failed rows" if record.generation else "all rows"
        raise DamagedError(
            f"shard {record.shard}: the {counted(len(rows), 'row')} of attempt {record.attempt} must be {which} from "
            f"{record.first_row} to {record.stop_row - 1}, once each; nothing was committed"
        )


def _committed_record(paths: RunPaths, record: Record) -> Record | None:
    """The valid record of the same shard and generation, None if there is none. An invalid one is quarantined."""
    shard, generation = record.shard, record.generation
    try:
        if (data := read_record_file(paths, shard, generation)) is None and _has_file(paths, shard, generation):
            found = find_in_segments(paths, shard, generation)
            data = found and found[0]
        if data is None:
            return None
        committed = check_record(paths, data, shard, generation)
        if committed.fingerprint != record.fingerprint:
            raise DamagedError("the record belongs to another job")
    except DamagedError as error:
        quarantine(paths, paths.record(shard, generation), str(error))
        return None
    return committed


def _has_file(paths: RunPaths, shard: int, generation: int) -> bool:
    """Whether a segment can have a valid record of a generation that has no record file.

    The search would cost more with each segment. On a disk, a committed generation has a file under one of these names:
    without one, only a late attempt or one after a killed commit has to search. On an object store, the driver alone
    publishes records, and gives no attempt to a shard whose record its ledger has found in a segment.
    """
    finals = (paths.data(shard, generation), paths.failures(shard, generation))
    with storage_errors(finals[0]):
        return not paths.on_bucket and any(final.exists() for final in finals)


def _publish_file(paths: RunPaths, tmp: Path | None, final: Path) -> Path | None:
    """Publish `tmp` as `final`, or keep a valid file with the same rows. Any other existing file is quarantined."""
    if tmp is None:
        if final.exists():
            quarantine(paths, final, "no record names it, and the shard has no such rows")
        return None
    while not publish(tmp, final):
        reason = _mismatch(final, tmp)
        if reason is None:
            sync_published(final)
            break
        quarantine(paths, final, reason)
    return final


def _mismatch(final: Path, tmp: Path) -> str | None:
    """Why the file `final` cannot replace `tmp`; None if it is valid and has the same columns, job and rows."""
    if digest(final) == digest(tmp):
        return None
    with storage_errors(tmp):
        schema = pq.read_schema(tmp)
    rewritten = tmp.with_name(f"{tmp.name}.again")
    try:
        if check_file(final, schema) != check_file(tmp):
            return "no record names it, and its rows are not those of the attempt that is committed"
        # The footer of a Parquet file has no checksum. The file is valid if writing its rows gives the same bytes.
        same = digest(rewrite(final, rewritten)) == digest(final)
    except DamagedError as error:
        return str(error)
    finally:
        discard(rewritten)
    return None if same else "it was changed after it was written"


def complete_record(paths: RunPaths, record: Record, data: Path | None, failures: Path | None) -> Record:
    """`record` with the counts, sizes and digests of its files, which may be unfinished files or published ones."""
    shard, generation = record.shard, record.generation
    finals = {"data": paths.data(shard, generation), "failures": paths.failures(shard, generation)}
    files = {"data": data, "failures": failures}
    entries = {name: _file_entry(paths, path, finals[name]) for name, path in files.items() if path is not None}
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


def _file_entry(paths: RunPaths, path: Path, final: Path) -> FileEntry:
    with storage_errors(path):
        rows = pq.read_metadata(path).num_rows
        size = path.stat().st_size
    sha256 = digest(path)
    return FileEntry(paths.relative(paths.committed_path(final, sha256)), rows, size, sha256)


def publish_record(paths: RunPaths, record: Record) -> Record:
    """Publish the complete `record`; returns the record that is committed, which may be that of another attempt."""
    final = paths.record(record.shard, record.generation)
    if publish_bytes(paths, final, record.to_bytes(), record.attempt):
        return record
    committed = valid_record(paths, record.shard, record.generation)
    if committed is None:
        raise StorageError(f"{final}: changed while shard {record.shard} was committed; the same command resumes")
    sync_published(final)
    return committed
