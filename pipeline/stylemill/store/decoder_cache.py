"""The refined VAE decoders of a run, one safetensors file for each style:

    cache/decoders/<key>-<digest>.safetensors

A cache and no more: what is missing or damaged is made again, to the same bytes, by whoever needs it. The digest of a
file's bytes is part of its name, as in a checkpoint. All of it is removed when the run is finished.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from stylemill.errors import StorageError
from stylemill.store.atomic import publish_bytes, quarantine, storage_errors
from stylemill.store.paths import RunPaths

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDecoders:
    """What all workers of a run share; `attempt` keeps their unfinished files apart."""

    paths: RunPaths
    attempt: str

    def get(self, key: str) -> dict[str, np.ndarray[Any, Any]] | None:
        """The tensors kept under `key`; None when there are none, or none that are whole."""
        folder = self.paths.decoders_folder
        with storage_errors(folder):
            for path in sorted(folder.glob(f"{key}-*.safetensors")):
                data = path.read_bytes()
                if path.stem == f"{key}-{_digest(data)}":
                    return dict(load(data))
                quarantine(self.paths, path, "truncated or changed")
        return None

    def put(self, key: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        """Publish the tensors under `key`. A disk that takes none costs time later, but stops nobody now."""
        data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
        final = self.paths.decoders_folder / f"{key}-{_digest(data)}.safetensors"
        try:
            with storage_errors(final):
                final.parent.mkdir(parents=True, exist_ok=True)
            publish_bytes(self.paths, final, data, self.attempt)
        except StorageError as error:
            _log.warning("a refined decoder is not kept: %s", error)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
