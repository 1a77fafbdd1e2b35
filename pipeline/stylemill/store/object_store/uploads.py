"""The commit of a shard on an object store: workers upload files, the driver alone publishes records.

A worker's files have their digest in their names, so no attempt can replace what another one wrote; none of them counts
until a record names it. The driver, which holds the run's lock, creates the record from what the worker that has the
lease returned, whatever others uploaded meanwhile or upload later. Files that no record names are removed when the run
is finished.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from stylemill.errors import DamagedError
from stylemill.store.atomic import publish
from stylemill.store.ledger import Ledger
from stylemill.store.object_store.path import PROBE, BucketPath
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record, checked, valid_record
from stylemill.testing.failpoints import failpoint


def upload(paths: RunPaths, record: Record, data_tmp: Path | None, failures_tmp: Path | None) -> Record:
    """Upload the files that the complete `record` names, and return it; where one stands already, that one.

    What is returned is for the driver to publish. Raises StorageError.
    """
    try:
        standing = paths.record(record.shard, record.generation).read_bytes()
        return checked(paths, standing, record.shard, record.generation)
    except (FileNotFoundError, DamagedError):
        pass  # a damaged one is set aside by the driver
    failpoint("before-publish", shard=record.shard)
    for tmp, entry in ((data_tmp, record.data), (failures_tmp, record.failures)):
        if tmp is not None and entry is not None:
            publish(tmp, paths.output / entry.name)
    failpoint("after-publish", shard=record.shard)
    return record


def remove_unnamed(paths: RunPaths, ledger: Ledger) -> None:
    """Remove the files that no record of a finished run names: late and lost uploads. Nothing on a disk."""
    for folder, place in ((paths.data_folder, 0), (paths.failures_folder, 1)):
        if not isinstance(folder, BucketPath):
            return
        found: dict[tuple[int, int], list[Path]] = defaultdict(list)
        for path in folder.iterdir():
            if key := paths.parse_file(path):
                found[key].append(path)
        for (shard, generation), files in found.items():
            if len(files) > ledger.files(shard, generation)[place]:
                named = _named(paths, shard, generation)
                folder.bucket.delete([path.key for path in files if isinstance(path, BucketPath) and path not in named])
    if isinstance(paths.output, BucketPath):
        probes = paths.output.bucket.list(paths.output.prefix + PROBE)
        paths.output.bucket.delete(probes)


def _named(paths: RunPaths, shard: int, generation: int) -> set[Path]:
    try:
        record = valid_record(paths, shard, generation)
    except DamagedError:
        record = None
    return {paths.output / entry.name for entry in (record and record.data, record and record.failures) if entry}
