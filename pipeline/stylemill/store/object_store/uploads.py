"""The commit of a shard on an object store: workers upload files, only the driver publishes records.

The names of data and failures files contain their digest, so an attempt cannot replace a file of another one. A file
does not count until a record names it. The driver, which holds the lock of the run, publishes the record that the
worker of the current attempt returned; what other attempts uploaded, or upload later, has no record. Such files are
removed when the run is finished.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from stylemill.errors import DamagedError
from stylemill.store.atomic import publish
from stylemill.store.ledger import Ledger
from stylemill.store.object_store.path import PROBE_PREFIX, BucketPath
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, check_record, valid_record
from stylemill.testing.failpoints import failpoint


def upload_files(paths: RunPaths, record: Record, data_tmp: Path | None, failures_tmp: Path | None) -> Record:
    """Upload the files that the complete `record` names, and return it for the driver to publish.

    If the shard has a valid record already, nothing is uploaded and that record is returned. Raises StorageError.
    """
    try:
        existing = paths.record(record.shard, record.generation).read_bytes()
        return check_record(paths, existing, record.shard, record.generation)
    except (FileNotFoundError, DamagedError):
        pass  # the driver quarantines a damaged record
    failpoint("before-publish", shard=record.shard)
    for tmp, entry in ((data_tmp, record.data), (failures_tmp, record.failures)):
        if tmp is not None and entry is not None:
            publish(tmp, paths.output / entry.name)
    failpoint("after-publish", shard=record.shard)
    return record


def remove_unreferenced(paths: RunPaths, ledger: Ledger) -> None:
    """Remove the data and failures files of a finished run that no record names. Does nothing on a disk."""
    for folder, position in ((paths.data_folder, 0), (paths.failures_folder, 1)):
        if not isinstance(folder, BucketPath):
            return
        uploads: dict[tuple[int, int], list[BucketPath]] = defaultdict(list)
        for path in folder.iterdir():
            if key := paths.parse_file_path(path):
                uploads[key].append(path)
        for (shard, generation), files in uploads.items():
            if len(files) > ledger.has_files(shard, generation)[position]:
                referenced = _referenced_files(paths, shard, generation)
                folder.bucket.delete([path.key for path in files if path not in referenced])
    if isinstance(paths.output, BucketPath):
        probes = paths.output.bucket.list(paths.output.prefix + PROBE_PREFIX)
        paths.output.bucket.delete(probes)


def _referenced_files(paths: RunPaths, shard: int, generation: int) -> set[Path]:
    try:
        record = valid_record(paths, shard, generation)
    except DamagedError:
        record = None
    return {paths.output / entry.name for entry in (record.files if record else ())}
