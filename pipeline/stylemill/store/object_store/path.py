"""Paths on an object store: `s3://bucket/prefix/…`, with the methods of pathlib.Path that the store uses.

A function that needs a local file (os, open, pyarrow) raises TypeError for such a path.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from stylemill.config.paths import split_url
from stylemill.errors import OutputError
from stylemill.store.object_store.bucket import Bucket, ObjectInfo, open_bucket

PROBE_PREFIX = ".stylemill-probe-"

if TYPE_CHECKING:
    _Base = Path  # one type for disks and buckets; at run time, a BucketPath has only the methods below
else:
    _Base = PurePosixPath


@dataclass(frozen=True)
class _Stat:
    st_size: int
    st_mtime_ns: int = 0
    st_ino: int = 0


class BucketPath(_Base):
    """`s3://bucket/key`. Each method asks the store, except `stat` of a path from `iterdir`, which uses the listing."""

    _info: ObjectInfo | None = None

    def __str__(self) -> str:
        return re.sub("^s3:/", "s3://", super().__str__())

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a local file")

    @property
    def bucket(self) -> Bucket:
        return open_bucket(self.parts[1])

    @property
    def key(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def prefix(self) -> str:
        """The prefix of the keys of all objects in this folder."""
        return f"{self.key}/" if self.key else ""

    def absolute(self) -> BucketPath:
        return self

    def read_bytes(self) -> bytes:
        return self.bucket.get(self.key)

    def exists(self, **_: Any) -> bool:
        return self.bucket.size(self.key) is not None or self.is_dir()

    def is_dir(self, **_: Any) -> bool:
        """Whether the folder contains an object."""
        return self.bucket.has_objects(self.prefix)

    def stat(self, **_: Any) -> Any:
        """Raises FileNotFoundError."""
        if self._info:
            return _Stat(self._info.size, int(self._info.modified * 1e9))
        size = self.bucket.size(self.key)
        if size is None:
            raise FileNotFoundError(str(self))
        return _Stat(size)

    def iterdir(self) -> Generator[BucketPath, None, None]:
        """The direct children by name; none if the folder does not exist."""
        return self._list(recursive=False)

    def walk_files(self) -> Generator[BucketPath, None, None]:
        """All objects in this folder and its subfolders."""
        return self._list(recursive=True)

    def _list(self, recursive: bool) -> Generator[BucketPath, None, None]:
        for key, info in sorted(self.bucket.list(self.prefix, recursive).items()):
            path = self / key.removeprefix(self.prefix).rstrip("/")
            path._info = info
            yield path

    def unlink(self, missing_ok: bool = False) -> None:
        self.bucket.delete([self.key])

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Does nothing: a folder exists as soon as it contains an object."""

    def probe(self) -> None:
        """Put, list and delete a probe object in this folder, and find out whether the store has conditional puts.

        Raises OutputError if one of these is not allowed.
        """
        probe = self / f"{PROBE_PREFIX}{uuid4().hex[:12]}"
        probe.bucket.probe(probe.key)


def output_path(output: str | Path) -> Path:
    """The path of a run folder, given as a path or a URL. Raises OutputError unless it is local or `s3://bucket/folder`."""
    url = split_url(PurePath(output))
    if url is None:
        return Path(output)
    scheme, rest = url
    uri = f"{scheme}://{rest}"
    if scheme != "s3":
        raise OutputError(f"output {uri}: only local folders and s3:// can be written; give a path such as runs/first")
    path = BucketPath(f"s3://{rest}")
    if len(path.parts) < 2 or any(part in (".", "..") for part in path.parts):
        raise OutputError(f"output {uri}: name a bucket and a folder in it, such as s3://bucket/runs/first")
    return path
