"""Records made again from the files they were about: what is whole is not sampled a second time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from stylemill.errors import DamagedError
from stylemill.store.atomic import digest, discard, storage_errors
from stylemill.store.commit import complete_record, publish_record
from stylemill.store.ledger import Ledger
from stylemill.store.lock import exclusive
from stylemill.store.object_store.reads import local_copy, names
from stylemill.store.parquet import check_file, write_again
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, valid_record
from stylemill.store.retries import failed_rows_before
from stylemill.store.run_file import RunFile


def recover_records(paths: RunPaths, run: RunFile, ledger: Ledger) -> int:
    """Give a record to each shard that lacks no more than that: a kill, or damage, took it. Returns how many.

    The caller holds the RunLock. What is not whole stays as it is, for the commit that comes. Raises StorageError.
    """
    count = 0
    found: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path, *key in files_without_record(paths, ledger):
        found[key[0], key[1]].append(path)
    for (shard, generation), files in sorted(found.items()):
        with exclusive(paths.commit_lock(shard)):
            record = _adopted(paths, run, shard, generation, files)
        if record is not None:
            ledger.read(shard, generation)
            count += 1
    return count


def files_without_record(paths: RunPaths, ledger: Ledger) -> Iterator[tuple[Path, int, int]]:
    """Files that are named as those of a shard and a generation are, while no record of that one stands."""
    for folder in (paths.data_folder, paths.failures_folder):
        for path in [folder / name for name in names(folder)]:
            if (key := shard_of(paths, path)) and not ledger.has_record(*key):
                yield path, *key


def shard_of(paths: RunPaths, path: Path) -> tuple[int, int] | None:
    """Shard and generation that a record, data or failures file is of by its name; None for any other file."""
    if path.parent == paths.records_folder:
        return paths.parse_record(path.name)
    return paths.parse_file(path)


def _adopted(paths: RunPaths, run: RunFile, shard: int, generation: int, files: list[Path]) -> Record | None:
    """The record that the files of a generation deserve, published; None unless they are as a commit left them."""
    data = [path for path in files if path.parent == paths.data_folder and path.exists()]
    failures = [path for path in files if path.parent == paths.failures_folder and path.exists()]
    if max(len(data), len(failures)) > 1:  # uploads of several attempts, on an object store
        return None
    attempt = f"found-{uuid4().hex[:12]}"
    rows = run.rows_of(shard)
    with ExitStack() as copies:
        local = {path: copies.enter_context(local_copy(paths, path)) for path in [*data, *failures]}
        try:
            if valid_record(paths, shard, generation) is not None:
                return None
            retried = failed_rows_before(paths, shard, generation)
            found = [row for path, copy in local.items() for row in _whole_rows(paths, run, path, copy, attempt)]
            if sorted(found) != (sorted(retried) if generation else list(rows)):
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
        record = complete_record(paths, draft, *(local[place[0]] if place else None for place in (data, failures)))
        named = {paths.output / entry.name for entry in (record.data, record.failures) if entry}
        return publish_record(paths, record) if named == set(local) else None  # a bucket's names say the digest


def _whole_rows(paths: RunPaths, run: RunFile, path: Path, copy: Path, attempt: str) -> tuple[int, ...]:
    """The rows of a file that is, to the byte, what our writer makes of them: pages have checksums, the footer none."""
    rows = check_file(copy, fingerprint=run.fingerprint_sha256).rows
    paths.tmp.mkdir(exist_ok=True)
    again = paths.tmp_name(path, attempt)
    try:
        with storage_errors(path):
            same = digest(write_again(copy, again)) == digest(copy)
    finally:
        discard(again)
    if not same or list(rows) != sorted(rows):
        raise DamagedError(f"{path}: is not as it was written")
    return rows
