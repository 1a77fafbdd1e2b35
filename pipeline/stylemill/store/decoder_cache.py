"""The refined VAE decoders of a run, one safetensors file for each style image:

    cache/decoders/<key>-<digest>.safetensors

A worker that finds no file, or a damaged one, computes the decoder again, to the same bytes. The file name contains the
digest of the bytes, as with checkpoints. The cache is removed when the run is finished.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from stylemill.errors import StorageError
from stylemill.store.atomic import digest_in_name, publish_bytes, quarantine, storage_errors
from stylemill.store.paths import RunPaths

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDecoders:
    """The cache that all workers of a run share. `attempt` makes the names of unfinished files unique."""

    paths: RunPaths
    attempt: str

    def get(self, key: str) -> dict[str, np.ndarray[Any, Any]] | None:
        """The tensors of `key`; None if there is no undamaged file. Raises StorageError."""
        folder = self.paths.decoders_folder
        with storage_errors(folder):
            for path in sorted(folder.glob(f"{key}-*.safetensors")):
                data = path.read_bytes()
                if path.stem == f"{key}-{digest_in_name(data)}":
                    return dict(load(data))
                quarantine(self.paths, path, "truncated or changed")
        return None

    def put(self, key: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        """Publish the tensors of `key`. If the disk fails, only a warning is logged."""
        data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
        final = self.paths.decoders_folder / f"{key}-{digest_in_name(data)}.safetensors"
        try:
            with storage_errors(final):
                final.parent.mkdir(parents=True, exist_ok=True)
            publish_bytes(self.paths, final, data, self.attempt)
        except StorageError as error:
            _log.warning("a refined decoder was not cached: %s", error)
