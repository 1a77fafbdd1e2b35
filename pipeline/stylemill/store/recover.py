"""Recover records from data and failures files that are valid, so that their rows are not sampled again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from stylemill.errors import DamagedError
from stylemill.store.atomic import digest, discard, storage_errors
from stylemill.store.commit import complete_record, publish_record
from stylemill.store.ledger import Ledger
from stylemill.store.lock import file_lock
from stylemill.store.object_store.reads import list_names, local_copy
from stylemill.store.parquet import check_file, rewrite
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, valid_record
from stylemill.store.retries import failed_rows_before
from stylemill.store.run_file import RunFile


def recover_records(paths: RunPaths, run: RunFile, ledger: Ledger) -> int:
    """Publish a record for each shard whose files are valid and only its record is missing; returns how many.

    A kill or damage can leave such shards. Invalid files are not changed: the next commit of their shard quarantines
    them. The caller holds the RunLock. Raises StorageError.
    """
    count = 0
    candidates: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path, *key in files_without_record(paths, ledger, list_output_files(paths)):
        candidates[key[0], key[1]].append(path)
    for (shard, generation), files in sorted(candidates.items()):
        with file_lock(paths.commit_lock(shard)):
            record = _recover_record(paths, run, shard, generation, files)
        if record is not None:
            ledger.read(shard, generation)
            count += 1
    return count


def list_output_files(paths: RunPaths) -> list[Path]:
    """The files in data/ and failures/."""
    return [folder / name for folder in (paths.data_folder, paths.failures_folder) for name in list_names(folder)]


def files_without_record(paths: RunPaths, ledger: Ledger, files: Iterable[Path]) -> Iterator[tuple[Path, int, int]]:
    """The data and failures files of generations that have no record, each with its shard and generation."""
    for path in files:
        if (key := paths.parse_file_path(path)) and not ledger.has_record(*key):
            yield path, *key


def shard_of(paths: RunPaths, path: Path) -> tuple[int, int] | None:
    """Shard and generation of a record, data or failures file, by its name; None for any other file."""
    if path.parent == paths.records_folder:
        return paths.parse_record_name(path.name)
    return paths.parse_file_path(path)


def _recover_record(paths: RunPaths, run: RunFile, shard: int, generation: int, files: list[Path]) -> Record | None:
    """Publish the record for the files of a generation; None if they are not valid or do not hold all of its rows."""
    data = [path for path in files if path.parent == paths.data_folder and path.exists()]
    failures = [path for path in files if path.parent == paths.failures_folder and path.exists()]
    if max(len(data), len(failures)) > 1:  # on an object store, several attempts uploaded files
        return None
    attempt = f"found-{uuid4().hex[:12]}"
    rows = run.rows_of(shard)
    with ExitStack() as copies:
        local = {path: copies.enter_context(local_copy(paths, path)) for path in [*data, *failures]}
        try:
            if valid_record(paths, shard, generation) is not None:
                return None
            retried = failed_rows_before(paths, shard, generation)
            present = [row for path, copy in local.items() for row in _verified_rows(paths, run, path, copy, attempt)]
            if sorted(present) != (sorted(retried) if generation else list(rows)):
                return None
        except DamagedError:
            return None
        draft = Record(
            shard=shard,
            fingerprint=run.fingerprint_sha256,
            first_row=rows.start,
            stop_row=rows.stop,
            attempt=attempt,
            generation=generation,
            retried_by_class=dict(Counter(failure.error for failure in retried.values())),
        )
        record = complete_record(paths, draft, *(local[kind[0]] if kind else None for kind in (data, failures)))
        # On an object store, the names contain the digests of the files, and may be wrong.
        named = {paths.output / entry.name for entry in record.files}
        return publish_record(paths, record) if named == set(local) else None


def _verified_rows(paths: RunPaths, run: RunFile, path: Path, copy: Path, attempt: str) -> tuple[int, ...]:
    """The rows of a file. Raises DamagedError unless writing them again gives the same bytes.

    This also checks the footer, which has no checksum.
    """
    rows = check_file(copy, fingerprint=run.fingerprint_sha256).rows
    paths.tmp.mkdir(exist_ok=True)
    rewritten = paths.tmp_file(path, attempt)
    try:
        with storage_errors(path):
            same = digest(rewrite(copy, rewritten)) == digest(copy)
    finally:
        discard(rewritten)
    if not same or list(rows) != sorted(rows):
        raise DamagedError(f"{path}: was changed after it was written")
    return rows
