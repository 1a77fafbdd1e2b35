"""job.json: what a run folder is. Written once, before any work, and never replaced."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from stylemill.errors import OutputError, StorageError
from stylemill.store.atomic import discard, publish, storage_errors, sync
from stylemill.store.paths import RunPaths

_NAMED = 3  # files in one message
_RECORDED = ("stylemill", "torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True)
class RunFile:
    """A run's resolved job, its fingerprint, and how its rows are cut into shards."""

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
        """The run that stands in `output`; None where there is none. Raises OutputError for a damaged job.json."""
        path = RunPaths(Path(output), 1).job
        try:
            file = cls(**json.loads(path.read_bytes()))
            if min(file.rows, file.shards, file.pairs_per_shard) < 1 or not isinstance(file.fingerprint, dict):
                raise ValueError("no rows, or no job")
            return file
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be read ({error.strerror or error}); mend that, or choose another folder with --output"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise OutputError(
                f"{path}: damaged, or written by another program. If a run stands beside it, nothing committed is "
                "lost: put job.json back from a copy. Else choose another folder with --output"
            ) from error

    @classmethod
    def open(cls, output: str | Path) -> tuple[RunFile, RunPaths]:
        """The run in `output` and its paths. Raises OutputError where there is none."""
        file = cls.find(output)
        if file is None:
            raise OutputError(f"{output}: is not a run folder (it has no job.json); name the folder a run writes to")
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
        raise OutputError(
            f"{output}: cannot be written ({getattr(cause, 'strerror', None) or cause}); make room or rights "
            "there, or choose another folder with --output"
        ) from error
    finally:
        discard(probe)
        discard(published)


def refuse_foreign_files(paths: RunPaths) -> None:
    """Raise OutputError where a folder that is no run holds what no start of a run left there.

    A run makes and empties folders such as tmp/ and checkpoints/, and they must be its own.
    """
    with storage_errors(paths.output):
        if not paths.output.is_dir() or paths.job.exists():
            return
        strangers = [path.name for path in sorted(paths.output.iterdir()) if not _left_by_a_start(paths, path)]
    if strangers:
        named = ", ".join(strangers[:_NAMED]) + (", …" if len(strangers) > _NAMED else "")
        raise OutputError(
            f"{paths.output}: holds other files ({named}) and no run (no job.json); name a new or an empty folder with "
            "--output"
        )


def _left_by_a_start(paths: RunPaths, path: Path) -> bool:
    """Whether `path` is hidden, or what a start that was killed before it wrote job.json leaves behind."""
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
    unfinished = ("probe.", f"{paths.job.name}.") if path == paths.tmp else ()
    return path.is_dir() and all(inner.name.startswith(unfinished) for inner in path.iterdir())


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    found = {}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
