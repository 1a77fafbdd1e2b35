"""Checkpoints of a shard in flight, as safetensors: its inputs once, its progress every few steps.

    checkpoints/00000/inputs-<attempt>-<digest>.safetensors
    checkpoints/00000/progress-<step>-<attempt>-<digest>.safetensors

The file name contains the digest of the bytes, so any truncation or flipped bit is noticed. A progress file contains
the name of its inputs file, so the progress of one attempt is never combined with the inputs of another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from stylemill.errors import DamagedError, StorageError
from stylemill.store.atomic import digest_in_name, publish_bytes, quarantine, remove_tree, storage_errors
from stylemill.store.paths import RunPaths

Arrays = dict[str, np.ndarray[Any, Any]]
_PROGRESS = re.compile(r"progress-(?P<step>[0-9]{5,})-(?P<attempt>.+)-[0-9a-f]{32}\.safetensors")
_KEPT = 2  # progress files: the newest, and the one before in case the newest is damaged


@dataclass(frozen=True)
class Checkpoint:
    """The state of a shard after `step` steps. Pass `inputs_name` to the next `save_progress`."""

    step: int
    inputs_name: str
    inputs: Arrays
    inputs_meta: dict[str, Any]
    arrays: Arrays
    meta: dict[str, Any]


def save_inputs(paths: RunPaths, shard: int, attempt: str, arrays: Arrays, meta: Mapping[str, Any]) -> str:
    """Save the inputs of a shard, which a resumed attempt then does not read and encode again.

    Returns the name of the file, for `save_progress`. Raises StorageError.
    """
    return _save(paths, shard, f"inputs-{attempt}", attempt, arrays, {"shard": shard, "meta": meta})


def save_progress(
    paths: RunPaths,
    shard: int,
    step: int,
    attempt: str,
    arrays: Arrays,
    meta: Mapping[str, Any],
    inputs_name: str,
) -> None:
    """Save the state after `step` steps, and remove all but the two newest progress files.

    `inputs_name` is what `save_inputs` returned or the `inputs_name` of the loaded Checkpoint. Raises StorageError.
    """
    header = {"shard": shard, "step": step, "inputs": inputs_name, "meta": meta}
    _save(paths, shard, f"progress-{step:05d}-{attempt}", attempt, arrays, header)
    # Files of later steps, of another attempt, do not count: this attempt must not remove what it just wrote.
    for path in [path for saved_step, path in _list_progress(paths, shard) if saved_step <= step][_KEPT:]:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def load(paths: RunPaths, shard: int, expect: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint of a shard with the most steps; None if there is none.

    Its meta and that of its inputs contain every item of `expect`. Damaged checkpoints and those of another job are
    moved to quarantine. The arrays are writable. Raises StorageError.
    """
    for step, path in _list_progress(paths, shard):
        try:
            arrays, header = _load(paths, path)
            inputs, inputs_header = _load(paths, path.parent / str(header["inputs"]))
            if (header["shard"], header["step"], inputs_header["shard"]) != (shard, step, shard):
                raise DamagedError("it belongs to another shard or step")
            _check_expected(expect, {**inputs_header["meta"], **header["meta"]})
        except (DamagedError, KeyError, TypeError) as error:
            quarantine(paths, path, f"checkpoint not used: {error}")
        else:
            return Checkpoint(step, str(header["inputs"]), inputs, inputs_header["meta"], arrays, header["meta"])
    return None


def newest_step(paths: RunPaths, shard: int) -> int | None:
    """The step of the newest checkpoint of a shard; None if it has none, or if the disk fails."""
    try:
        return next((step for step, _ in _list_progress(paths, shard)), None)
    except StorageError:
        return None


def clear(paths: RunPaths, shard: int) -> None:
    """Remove the checkpoints of a shard. Errors are ignored: `clean` removes what is left."""
    remove_tree(paths.checkpoints(shard))


def _check_expected(expect: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(dict(expect)))  # as read from a file: tuples become lists, keys strings
    different = [key for key in expected if key not in meta or meta[key] != expected[key]]
    if different:
        raise DamagedError(f"it was written with another {', '.join(different)}")


def _list_progress(paths: RunPaths, shard: int) -> list[tuple[int, Path]]:
    """The progress files with their steps: highest step first, and of one step, the last written first."""
    folder = paths.checkpoints(shard)
    found = []
    with storage_errors(folder):
        for path in folder.iterdir() if folder.exists() else ():
            match = _PROGRESS.fullmatch(path.name)
            if match:
                with suppress(FileNotFoundError):
                    found.append((int(match["step"]), path.stat().st_mtime_ns, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _save(paths: RunPaths, shard: int, stem: str, attempt: str, arrays: Arrays, header: Mapping[str, Any]) -> str:
    # Not np.ascontiguousarray, which turns a scalar into a vector.
    packed = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = save_arrays(packed, {"stylemill": json.dumps(header, sort_keys=True)})
    final = paths.checkpoints(shard) / f"{stem}-{digest_in_name(data)}.safetensors"
    with storage_errors(final):
        final.parent.mkdir(exist_ok=True)
    publish_bytes(paths, final, data, attempt)
    return final.name


def _load(paths: RunPaths, path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays and the header of a file. It is moved to quarantine if its digest is not that in its name."""
    with storage_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamagedError(f"{path.name} is missing") from None
    if not path.stem.endswith(digest_in_name(data)):
        quarantine(paths, path, "truncated or changed")
        raise DamagedError(f"{path.name} is truncated or was changed")
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["stylemill"])
        return {name: array.copy() for name, array in load_arrays(data).items()}, header
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path.name} is not a checkpoint: {error}") from error
