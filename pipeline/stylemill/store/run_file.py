"""Create a run folder and its job.json, which is written once, before any work, and never replaced."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from stylemill.errors import OutputError, StorageError
from stylemill.store.atomic import discard, publish, storage_errors, sync
from stylemill.store.paths import RunPaths

_MAX_LISTED = 3  # files in one message
_VERSIONED_LIBRARIES = ("stylemill", "torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True)
class RunFile:
    """The resolved job of a run, its fingerprint, and how its output rows are divided into shards."""

    fingerprint: dict[str, Any]
    fingerprint_sha256: str
    rows: int
    shards: int
    pairs_per_shard: int
    job: dict[str, Any]
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def rows_of(self, shard: int) -> range:
        first = shard * self.pairs_per_shard
        return range(first, min(first + self.pairs_per_shard, self.rows))

    @property
    def manifest(self) -> Path:
        return Path(self.job["manifest"])

    @classmethod
    def find(cls, output: str | Path) -> RunFile | None:
        """The run in the folder `output`; None if it has no job.json. Raises OutputError if job.json is damaged."""
        path = RunPaths(Path(output), 1).job
        try:
            file = cls(**json.loads(path.read_bytes()))
            if min(file.rows, file.shards, file.pairs_per_shard) < 1 or not isinstance(file.fingerprint, dict):
                raise ValueError("no rows, or no fingerprint")
            return file
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be read ({error.strerror or error}); fix that, or choose another folder with --output"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise OutputError(
                f"{path}: damaged, or written by another program. If this is a run folder, nothing committed is lost: "
                "restore job.json from a copy. Otherwise choose another folder with --output"
            ) from error

    @classmethod
    def open(cls, output: str | Path) -> tuple[RunFile, RunPaths]:
        """The run in the folder `output`, and its paths. Raises OutputError if it has no job.json."""
        file = cls.find(output)
        if file is None:
            raise OutputError(f"{output}: is not a run folder (it has no job.json); give the output folder of a run")
        return file, RunPaths(Path(output), file.shards)


def create_run_folder(paths: RunPaths) -> None:
    """Create the folders of a run, and publish a probe file as a commit would.

    Raises OutputError where the folder cannot be written or its filesystem has no hard links: before the run, not after
    hours of sampling. On an object store, RunLock makes the probe.
    """
    if paths.on_bucket:
        with storage_errors(paths.tmp):
            paths.tmp.mkdir(parents=True, exist_ok=True)
        return
    output = paths.output
    folders = (paths.data_folder, paths.failures_folder, paths.records_folder, paths.checkpoints_folder, paths.tmp)
    changed = {output, *(folder.parent for folder in (output, *output.parents) if not folder.exists())}
    unique = uuid4().hex[:12]
    probe, published = (paths.tmp / f"probe.{unique}.{name}" for name in ("tmp", "final"))
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for folder in changed:
            sync(folder)
        probe.write_bytes(b"stylemill")
        publish(probe, published)
    except (OSError, StorageError) as error:
        cause = error.__cause__ or error
        raise _not_writable(output, getattr(cause, "strerror", None) or str(cause)) from error
    finally:
        discard(probe)
        discard(published)


def refuse_foreign_files(paths: RunPaths) -> None:
    """Raise OutputError if the folder is not a run folder and contains files of other programs, or cannot be written.

    A run empties folders such as tmp/ and checkpoints/, so they must not contain anything else. Writes nothing, so a
    full disk is not noticed here.
    """
    if not paths.on_bucket and (reason := _write_obstacle(paths.output)):
        raise _not_writable(paths.output, reason)
    with storage_errors(paths.output):
        if not paths.output.is_dir() or paths.job.exists():
            return
        foreign = [path.name for path in sorted(paths.output.iterdir()) if not _is_left_by_run(paths, path)]
    if foreign:
        listed = ", ".join(foreign[:_MAX_LISTED]) + (", …" if len(foreign) > _MAX_LISTED else "")
        raise OutputError(
            f"{paths.output}: holds other files ({listed}) and no run (no job.json); give a new or an empty folder "
            "with --output"
        )


def _write_obstacle(output: Path) -> str | None:
    """Why a folder cannot be created, or written, as far as can be known without writing; None if nothing is known."""
    for folder in (output, *output.parents):
        try:
            is_folder = stat.S_ISDIR(folder.stat().st_mode)
            read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        except FileNotFoundError:
            continue
        except OSError as error:
            return error.strerror or str(error)
        if not is_folder:
            return os.strerror(errno.ENOTDIR)
        if read_only:
            return os.strerror(errno.EROFS)
        writable = os.access(folder, os.W_OK | os.X_OK, effective_ids=True)
        return None if writable else os.strerror(errno.EACCES)
    return None


def _not_writable(output: Path, reason: str) -> OutputError:
    return OutputError(
        f"{output}: cannot be written ({reason}); free some space, fix the permissions, or choose another folder with "
        "--output"
    )


def _is_left_by_run(paths: RunPaths, path: Path) -> bool:
    """Whether `path` is hidden, or a run that was killed before it wrote job.json can have left it."""
    if path.name.startswith(".") or path == paths.lock:
        return True
    if path not in (
        paths.data_folder,
        paths.failures_folder,
        paths.records_folder,
        paths.checkpoints_folder,
        paths.tmp,
    ):
        return False
    allowed = ("probe.", f"{paths.job.name}.") if path == paths.tmp else ()
    return path.is_dir() and all(inner.name.startswith(allowed) for inner in path.iterdir())


def missing_numerics(numerics: Mapping[str, Any]) -> set[str]:
    """The entries of numerics.json that a later start needs and `numerics` does not have."""
    return {"device", "dtype", "micro_batch"} - numerics.keys()


def installed_versions() -> dict[str, str]:
    """By name, the installed versions of the libraries that the output depends on."""
    versions = {}
    for name in _VERSIONED_LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
