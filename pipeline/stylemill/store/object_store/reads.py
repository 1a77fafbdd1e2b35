"""Reading a run folder: from a disk as it lies there, from a bucket through copies and listings."""

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
    """`path` as a file of this machine for as long as the block lasts. Raises FileNotFoundError, StorageError."""
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


def names(folder: Path) -> list[str]:
    """What is directly in a folder; nothing where there is none."""
    with storage_errors(folder):
        if isinstance(folder, BucketPath):
            return [path.name for path in folder.iterdir()]
        return [entry.name for entry in os.scandir(folder)] if folder.exists() else []


class Sizes:
    """The sizes of data and failures files, by the name that `RunPaths.data_name` or `failures_name` gives."""

    def __init__(self, paths: RunPaths) -> None:
        self._in_bucket: dict[str, list[int]] | None = None
        if isinstance(paths.output, BucketPath):
            self._in_bucket = defaultdict(list)
            for key, size in paths.output.bucket.sizes.items():
                name, _, _ = key.rpartition("-")
                self._in_bucket[f"s3://{paths.output.bucket.name}/{name}.parquet"].append(size)

    def of(self, name: str, expected: int) -> int | None:
        """That of the file, None: it is missing. Of several in a bucket, one that has the `expected` size counts."""
        if self._in_bucket is not None:
            found = self._in_bucket.get(name, [])
            return expected if expected in found else next(iter(found), None)
        try:
            return os.stat(name).st_size
        except FileNotFoundError:
            return None
        except OSError:
            with storage_errors(Path(name)):
                raise


@contextmanager
def prefetched(paths: RunPaths, records: Iterable[Path]) -> Iterator[None]:
    """For the block, a bucket's sizes come from one listing, and `records` were read together, each for one reading."""
    if not isinstance(paths.output, BucketPath):
        yield
        return
    below = [folder.prefix for folder in (paths.data_folder, paths.failures_folder) if isinstance(folder, BucketPath)]
    try:
        paths.output.bucket.read_ahead([path.key for path in records if isinstance(path, BucketPath)], below)
        yield
    finally:
        paths.output.bucket.forget()
