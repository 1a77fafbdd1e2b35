"""Paths of a run folder on an object store: `s3://bucket/prefix/…`, with those of Path's methods that the store uses.

What needs a real file (os, open, pyarrow) gets a TypeError from one, not a file of a strange name.
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
from stylemill.store.object_store.bucket import Bucket, Found, bucket

PROBE = ".stylemill-probe-"

if TYPE_CHECKING:
    _Base = Path  # so that one type goes through the store; `iterdir` and the like are the only ones it has at run time
else:
    _Base = PurePosixPath


@dataclass(frozen=True)
class _Stat:
    st_size: int
    st_mtime_ns: int = 0
    st_ino: int = 0


class BucketPath(_Base):
    """`s3://bucket/key`. What an object is, is asked anew each time, but of what `iterdir` found."""

    _found: Found | None = None

    def __str__(self) -> str:
        return re.sub("^s3:/", "s3://", super().__str__())

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no file of this machine")

    @property
    def bucket(self) -> Bucket:
        return bucket(self.parts[1])

    @property
    def key(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def prefix(self) -> str:
        """What the keys below this folder begin with."""
        return f"{self.key}/" if self.key else ""

    def absolute(self) -> BucketPath:
        return self

    def read_bytes(self) -> bytes:
        return self.bucket.get(self.key)

    def exists(self, **_: Any) -> bool:
        return self.bucket.size(self.key) is not None or self.is_dir()

    def is_dir(self, **_: Any) -> bool:
        """Whether anything is below."""
        return self.bucket.has_below(self.prefix)

    def stat(self, **_: Any) -> Any:
        """Raises FileNotFoundError."""
        if self._found:
            return _Stat(self._found.size, int(self._found.modified * 1e9))
        size = self.bucket.size(self.key)
        if size is None:
            raise FileNotFoundError(str(self))
        return _Stat(size)

    def iterdir(self) -> Generator[BucketPath, None, None]:
        """What is directly below, in order of names; nothing where there is no such folder."""
        return self._listed(below=False)

    def walk_files(self) -> Generator[BucketPath, None, None]:
        """Every object below, however deep."""
        return self._listed(below=True)

    def _listed(self, below: bool) -> Generator[BucketPath, None, None]:
        for key, found in sorted(self.bucket.list(self.prefix, below).items()):
            path = self / key.removeprefix(self.prefix).rstrip("/")
            path._found = found
            yield path

    def unlink(self, missing_ok: bool = False) -> None:
        self.bucket.delete([self.key])

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Folders are there as soon as something is in them."""

    def try_out(self) -> None:
        """Write, read, list and delete below this folder once, and see whether puts can be conditional.

        Raises OutputError where one of that is not allowed.
        """
        probe = self / f"{PROBE}{uuid4().hex[:12]}"
        probe.bucket.try_out(probe.key)


def output_path(output: str | Path) -> Path:
    """The run folder that a job or a user names. Raises OutputError for a scheme that is not written."""
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
