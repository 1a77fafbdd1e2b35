"""Every error that stylemill raises on purpose.

    StylemillError                 exit code 1
    ├── InputError                 exit code 2: the user has to change something first
    │   ├── JobError               in the job file or a command-line option
    │   ├── ManifestError          in the manifest file or its columns
    │   ├── ModelError             in the model folder or hub id
    │   ├── OutputError            the run folder is not writable, belongs to another job, or is not a run folder
    │   └── ClusterError           Ray cannot be reached, or has no resources for a worker
    ├── RowError                   one row failed: it is recorded as a failure, and the other rows of its shard go on
    │   ├── ImageError             an input image cannot be read, decoded or fitted
    │   ├── EncodingError          the VAE or a text encoder gave NaN or Inf for an input of the row
    │   ├── SamplingError          the latents of the row became NaN or Inf, or it cannot be sampled as the job says
    │   ├── DecodingError          the VAE's decoder gave NaN or Inf for the row
    │   └── PoisonPairError        every worker that sampled the row died, also when it sampled the row alone
    ├── TransientError             a retry can succeed; no row is recorded as a failure
    │   ├── StorageError           reading or writing the run folder failed (disk full, I/O error)
    │   ├── DeviceMemoryError      the free device memory is too small even for a micro-batch of one pair
    │   └── DownloadError          the server of an input image does not answer, is busy, or breaks connections; in the
    │                              last attempt at a shard the rows of the image are recorded as failed
    ├── DamagedError               a file of the run folder is truncated or was edited; it is quarantined and made again
    ├── LockedError                another live process works on this run folder
    └── IncompleteError            the run stopped before every row was committed

A message says what was wrong, where (file, row, column), and what to do next.
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
    """A row that failed. `stage`, recorded with the failure, is where: read | encode | sample | decode.

    encode: of images and texts, by the VAE and the text encoders, before sampling. decode: of latents, by the VAE.
    """

    stage = "read"


class ImageError(RowError):
    pass


class EncodingError(RowError):
    stage = "encode"


class SamplingError(RowError):
    stage = "sample"


class DecodingError(RowError):
    stage = "decode"


class PoisonPairError(RowError):
    stage = "sample"


class TransientError(StylemillError):
    pass


class StorageError(TransientError):
    pass


class DeviceMemoryError(TransientError):
    pass


class DownloadError(TransientError):
    """`retry_after`: the seconds that the server asks clients to wait before the next request; 0 if it does not say."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DamagedError(StylemillError):
    pass


class LockedError(StylemillError):
    pass


class IncompleteError(StylemillError):
    pass
