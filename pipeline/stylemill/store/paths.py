"""The names of all files and folders of a run folder. Nothing here reads or writes.

<output>/job.json                                  resolved job, fingerprint, number of rows and shards, versions
<output>/numerics.json                             device, dtype, libraries and micro-batch of the first worker
<output>/data/train-00000-of-00042.parquet         the successful rows of a shard
<output>/failures/00000.parquet                    its failed rows
<output>/records/00000.json                        its record, published last: with it, the shard is committed
<output>/records/compact-000000-<digest>.parquet   a segment: the records of thousands of shards
<output>/retry.json                                the failed rows that are being retried; removed after the retry
<output>/checkpoints/00000/  00000.lock            checkpoints and commit lock of a shard in flight
<output>/cache/decoders/                           refined VAE decoders; removed when the run is finished
<output>/tmp/                                      unfinished files, on the same filesystem as the others
<output>/quarantine/                               damaged files, each with the reason
<output>/lock                                      held by the process that works on the run
<output>/contact-sheet.jpg
<output>/failures.parquet                          the rows that have no image now; only in a run that has ended

Files of a later generation have its number in their names: train-00000-of-00042-r1.parquet, 00000.r1.json.

On an object store, the names of data and failures files also contain the first digits of their SHA-256. There, tmp/,
cache/ and the commit locks are on the local disk of each machine, in the folder `scratch`.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from stylemill.store.object_store.path import BucketPath, output_path

MAX_GENERATIONS = 10_000  # a file with a higher number in its name is not part of a run
_FILE_NAME = re.compile(
    r"(train-)?(?P<shard>[0-9]+)(-of-[0-9]+)?(-r(?P<generation>[0-9]+))?(-(?P<digest>[0-9a-f]{16}))?\.parquet"
)
_RECORD_NAME = re.compile(r"(?P<shard>[0-9]+)(\.r(?P<generation>[0-9]+))?\.json")


@dataclass(frozen=True)
class RunPaths:
    """Paths of the run folder `output` with `shards` shards. Shard numbers have at least 5 digits."""

    output: Path
    shards: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", output_path(self.output))

    @property
    def on_bucket(self) -> bool:
        """Whether the run folder is on an object store, not on a disk."""
        return isinstance(self.output, BucketPath)

    @property
    def scratch(self) -> Path:
        """The local folder for unfinished files and caches: the run folder, unless that is on an object store."""
        if not self.on_bucket:
            return self.output
        name = f"stylemill-{os.getuid()}-{sha256(str(self.output).encode()).hexdigest()[:16]}"
        return Path(tempfile.gettempdir()) / name

    def number(self, shard: int) -> str:
        return f"{shard:0{self._width}d}"

    @property
    def _width(self) -> int:
        return max(5, len(str(self.shards)))

    def data(self, shard: int, generation: int = 0) -> Path:
        return output_path(self.data_name(shard, generation))

    def failures(self, shard: int, generation: int = 0) -> Path:
        return output_path(self.failures_name(shard, generation))

    def data_name(self, shard: int, generation: int = 0) -> str:
        """`data` as a string. Creating a million Path objects would double the time that opening a run takes."""
        width, suffix = self._width, _suffix("-r", generation)
        return f"{self.output}/data/train-{shard:0{width}d}-of-{self.shards:0{width}d}{suffix}.parquet"

    def failures_name(self, shard: int, generation: int = 0) -> str:
        return f"{self.output}/failures/{self.number(shard)}{_suffix('-r', generation)}.parquet"

    def committed_path(self, final: Path, digest: str) -> Path:
        """The path of the data or failures file `final` with the SHA-256 `digest` after its commit.

        On an object store, a put replaces an object of the same name. The digest in the name keeps the files of two
        attempts apart.
        """
        return final.with_name(f"{final.stem}-{digest[:16]}{final.suffix}") if self.on_bucket else final

    def record(self, shard: int, generation: int = 0) -> Path:
        return self.records_folder / f"{self.number(shard)}{_suffix('.r', generation)}.json"

    def parse_record_name(self, name: str) -> tuple[int, int] | None:
        """Shard and generation of the record file with this name; None if it is not the name of a record file."""
        match = _RECORD_NAME.fullmatch(name)
        if match is None:
            return None
        shard, generation = int(match["shard"]), int(match["generation"] or 0)
        if shard >= self.shards or generation >= MAX_GENERATIONS or self.record(shard, generation).name != name:
            return None
        return shard, generation

    def parse_file_path(self, path: Path) -> tuple[int, int] | None:
        """Shard and generation of the data or failures file `path`; None if it is not the path of such a file."""
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            return None
        shard, generation, digest = int(match["shard"]), int(match["generation"] or 0), match["digest"] or ""
        if shard >= self.shards or generation >= MAX_GENERATIONS:
            return None
        finals = (self.data(shard, generation), self.failures(shard, generation))
        return (shard, generation) if path in [self.committed_path(final, digest) for final in finals] else None

    def checkpoints(self, shard: int) -> Path:
        """The folder of the checkpoints of one shard."""
        return self.checkpoints_folder / self.number(shard)

    def commit_lock(self, shard: int) -> Path:
        return self.scratch / "checkpoints" / f"{self.number(shard)}.lock"

    def tmp_file(self, final: Path, attempt: str) -> Path:
        """The unfinished file that `attempt` writes and publishes as `final`: unique to both."""
        return self.tmp / f"{self.relative(final).replace('/', '-')}.{attempt}"

    def relative(self, path: Path) -> str:
        """`path` relative to the run folder, with forward slashes, as records and messages show it."""
        return path.relative_to(self.output if isinstance(path, type(self.output)) else self.scratch).as_posix()

    @property
    def data_folder(self) -> Path:
        return self.output / "data"

    @property
    def failures_folder(self) -> Path:
        return self.output / "failures"

    @property
    def records_folder(self) -> Path:
        return self.output / "records"

    @property
    def checkpoints_folder(self) -> Path:
        return self.output / "checkpoints"

    @property
    def cache(self) -> Path:
        return self.scratch / "cache"

    @property
    def decoders_folder(self) -> Path:
        return self.cache / "decoders"

    @property
    def tmp(self) -> Path:
        return self.scratch / "tmp"

    @property
    def quarantine(self) -> Path:
        return self.output / "quarantine"

    @property
    def job(self) -> Path:
        return self.output / "job.json"

    @property
    def retry(self) -> Path:
        return self.output / "retry.json"

    @property
    def numerics(self) -> Path:
        return self.output / "numerics.json"

    @property
    def lock(self) -> Path:
        return self.output / "lock"

    @property
    def failed_rows(self) -> Path:
        return self.output / "failures.parquet"

    @property
    def contact_sheet(self) -> Path:
        return self.output / "contact-sheet.jpg"


def _suffix(prefix: str, generation: int) -> str:
    return f"{prefix}{generation}" if generation else ""
