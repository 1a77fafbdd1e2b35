"""Everything stylemill raises on purpose.

    StylemillError                 exit code 1
    ├── InputError                 exit code 2: the user must change something before trying again
    │   ├── JobError               the job file or a flag
    │   ├── ManifestError          the manifest file or its columns
    │   ├── ModelError             the model folder or hub id
    │   ├── OutputError            the run folder: not writable, another job's, not a run
    │   └── ClusterError           Ray cannot be reached or has no room for a worker
    ├── RowError                   one row is lost for good; its shard goes on
    │   ├── ImageError             an input image cannot be read, decoded or fitted
    │   ├── SamplingError          the row's latents became NaN or Inf
    │   └── PoisonPairError            the row killed every worker that took it up, alone too
    ├── TransientError             trying again can cure it; a row is never blamed
    │   ├── StorageError           writing or reading the run folder failed (disk full, I/O error)
    │   ├── DeviceMemoryError      even one pair in a UNet call is too much for the memory that is free
    │   └── DownloadError          an input's server or store is silent, busy or cuts connections
    ├── DamagedError               a state file of the run is truncated or edited; it is set aside and redone
    ├── LockedError                another live process works on this run folder
    └── IncompleteError            the run stopped before every row was committed

Messages say what was wrong, where (file, row, column) and what to do next.
"""

from __future__ import annotations


class StylemillError(Exception):
    exit_code = 1


class InputError(StylemillError):
    exit_code = 2


class JobError(InputError):
    pass


class ManifestError(InputError):
    pass


class ModelError(InputError):
    pass


class OutputError(InputError):
    pass


class ClusterError(InputError):
    pass


class RowError(StylemillError):
    """A row that can never succeed. `stage` is where it was lost: read | sample | decode | encode."""

    stage = "read"


class ImageError(RowError):
    pass


class SamplingError(RowError):
    stage = "sample"


class PoisonPairError(RowError):
    stage = "sample"


class TransientError(StylemillError):
    pass


class StorageError(TransientError):
    pass


class DeviceMemoryError(TransientError):
    pass


class DownloadError(TransientError):
    """`retry_after`: the seconds that the server asked to be left alone for."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DamagedError(StylemillError):
    pass


class LockedError(StylemillError):
    pass


class IncompleteError(StylemillError):
    pass
