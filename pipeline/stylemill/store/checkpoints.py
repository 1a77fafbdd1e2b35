"""Checkpoints of a shard in flight, as safetensors: its inputs once, its progress every few steps.

    checkpoints/00000/inputs-<attempt>-<digest>.safetensors
    checkpoints/00000/progress-<step>-<attempt>-<digest>.safetensors

The digest of a file's bytes is part of its name, so that a truncation or a flipped bit anywhere is noticed; the name of
the inputs is part of a progress file, so that progress is never joined to the inputs of another attempt.
"""

from __future__ import annotations

import hashlib
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
from stylemill.store.atomic import publish_bytes, quarantine, remove_tree, storage_errors
from stylemill.store.paths import RunPaths

Arrays = dict[str, np.ndarray[Any, Any]]
_PROGRESS = re.compile(r"progress-(?P<step>[0-9]{5,})-(?P<attempt>.+)-[0-9a-f]{32}\.safetensors")
_KEPT = 2  # progress files: the newest and, should it turn out damaged, the one before


@dataclass(frozen=True)
class Checkpoint:
    """State of a shard after `step` steps. `inputs_name` is to be handed on to `save_progress`."""

    step: int
    inputs_name: str
    inputs: Arrays
    inputs_meta: dict[str, Any]
    arrays: Arrays
    meta: dict[str, Any]


def save_inputs(paths: RunPaths, shard: int, attempt: str, arrays: Arrays, meta: Mapping[str, Any]) -> str:
    """Save what a resume would otherwise have to read and encode again; returns the name `save_progress` wants."""
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
    """Save the state after `step` steps and remove those that two newer ones make useless.

    `inputs_name` is what `save_inputs` returned or the loaded Checkpoint says. Raises StorageError.
    """
    header = {"shard": shard, "step": step, "inputs": inputs_name, "meta": meta}
    _save(paths, shard, f"progress-{step:05d}-{attempt}", attempt, arrays, header)
    # Only older than this one: an attempt never removes its own newest, whatever others left or still write.
    for path in [path for found, path in _progress(paths, shard) if found <= step][_KEPT:]:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def load(paths: RunPaths, shard: int, expect: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint of a shard with the most steps whose meta, or that of its inputs, has every item of `expect`.

    Damaged ones and those of another job are moved to quarantine. Arrays are writable. Raises StorageError only.
    """
    for step, path in _progress(paths, shard):
        try:
            arrays, header = _load(paths, path)
            inputs, inputs_header = _load(paths, path.parent / str(header["inputs"]))
            if (header["shard"], header["step"], inputs_header["shard"]) != (shard, step, shard):
                raise DamagedError("it is that of another shard or step")
            _check_expected(expect, {**inputs_header["meta"], **header["meta"]})
        except (DamagedError, KeyError, TypeError) as error:
            quarantine(paths, path, f"checkpoint not used: {error}")
        else:
            return Checkpoint(step, str(header["inputs"]), inputs, inputs_header["meta"], arrays, header["meta"])
    return None


def newest_step(paths: RunPaths, shard: int) -> int | None:
    """The step that a shard in flight has safely behind it; None where it has no checkpoint, or the disk fails."""
    try:
        return next((step for step, _ in _progress(paths, shard)), None)
    except StorageError:
        return None


def clear(paths: RunPaths, shard: int) -> None:
    """Remove the checkpoints of a shard; what cannot be removed now is left to `clean`."""
    remove_tree(paths.checkpoints(shard))


def _check_expected(expect: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(dict(expect)))  # as it comes back from a file: tuples as lists, keys as strings
    other = [key for key in expected if key not in meta or meta[key] != expected[key]]
    if other:
        raise DamagedError(f"it was written with another {', '.join(other)}")


def _progress(paths: RunPaths, shard: int) -> list[tuple[int, Path]]:
    """Progress files by falling step, the latest written first among equals."""
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
    # Not ascontiguousarray, which makes a vector of a scalar.
    packed = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = save_arrays(packed, {"stylemill": json.dumps(header, sort_keys=True)})
    final = paths.checkpoints(shard) / f"{stem}-{_digest(data)}.safetensors"
    with storage_errors(final):
        final.parent.mkdir(exist_ok=True)
    publish_bytes(paths, final, data, attempt)
    return final.name


def _load(paths: RunPaths, path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and header of a file, which is moved to quarantine if its digest is not the one in its name."""
    with storage_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamagedError(f"{path.name} is missing") from None
    if not path.stem.endswith(_digest(data)):
        quarantine(paths, path, "truncated or changed")
        raise DamagedError(f"{path.name} is truncated or was changed")
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["stylemill"])
        return {name: array.copy() for name, array in load_arrays(data).items()}, header
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path.name} is no checkpoint: {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
