"""Read a run folder that is on a disk or an object store: local copies, listings, sizes, prefetching."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from stylemill.store.atomic import discard, storage_errors
from stylemill.store.object_store.path import BucketPath
from stylemill.store.paths import RunPaths


@contextmanager
def local_copy(paths: RunPaths, path: Path) -> Iterator[Path]:
    """A local file with the content of `path`, for the block. Raises FileNotFoundError, StorageError."""
    if not isinstance(path, BucketPath):
        yield path
        return
    copy = paths.tmp / f"copy-{path.name}.{uuid4().hex[:12]}"
    try:
        with storage_errors(copy):
            paths.tmp.mkdir(parents=True, exist_ok=True)
            missing = not path.bucket.download(path.key, copy)
        if missing:
            raise FileNotFoundError(str(path))
        yield copy
    finally:
        discard(copy)


def list_names(folder: Path) -> list[str]:
    """The names of the direct children of a folder; none if it does not exist."""
    with storage_errors(folder):
        if isinstance(folder, BucketPath):
            return [path.name for path in folder.iterdir()]
        try:
            return [entry.name for entry in os.scandir(folder)]
        except FileNotFoundError:
            return []


class FileSizes:
    """The sizes of data and failures files, by the names that `RunPaths.data_name` and `failures_name` return."""

    def __init__(self, paths: RunPaths) -> None:
        self._listed: dict[str, list[int]] | None = None
        if isinstance(paths.output, BucketPath):
            self._listed = defaultdict(list)
            for key, size in paths.output.bucket.listed_sizes.items():
                name, _, _ = key.rpartition("-")  # without the digest
                self._listed[f"s3://{paths.output.bucket.name}/{name}.parquet"].append(size)

    def get(self, name: str, expected: int) -> int | None:
        """The bytes of a file; None if it is missing.

        In a bucket, several attempts may have uploaded the file: `expected` if one of these uploads has that size.
        """
        if self._listed is not None:
            sizes = self._listed.get(name, [])
            return expected if expected in sizes else next(iter(sizes), None)
        try:
            return os.stat(name).st_size
        except FileNotFoundError:
            return None
        except OSError:
            with storage_errors(Path(name)):
                raise


@contextmanager
def prefetched(paths: RunPaths, records: Iterable[Path]) -> Iterator[None]:
    """On an object store, read `records` concurrently and list the sizes of all data and failures files, for the block.

    In the block, the first read of each record and all sizes are answered without a request.
    """
    if not isinstance(paths.output, BucketPath):
        yield
        return
    folders = (paths.data_folder, paths.failures_folder)
    try:
        paths.output.bucket.prefetch(
            keys=[path.key for path in records if isinstance(path, BucketPath)],
            list_prefixes=[folder.prefix for folder in folders if isinstance(folder, BucketPath)],
        )
        yield
    finally:
        paths.output.bucket.clear_prefetched()
