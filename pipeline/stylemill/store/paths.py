"""Every path of a run folder comes from one object.

<output>/job.json                                  resolved job, fingerprint, row and shard count, versions
<output>/data/train-00000-of-00042.parquet         successful rows only
<output>/failures/00000.parquet                    rows that failed for good
<output>/records/00000.json                        published last: what makes a shard done
<output>/records/compact-000000-<digest>.parquet   thousands of them, once a run has so many
<output>/retry.json                                which failed rows are being tried again, until they were
<output>/checkpoints/00000/  00000.lock            shards in flight only
<output>/cache/decoders/                           refined VAE decoders, until the run is finished
<output>/tmp/                                      everything unfinished, on the same filesystem as the rest
<output>/quarantine/                               damaged files, moved out of the way with the reason
<output>/lock                                      held by the run that works here

On an object store, data and failures files have the first digits of their digest in their names, and tmp/, cache/ and
the shards' locks are on each machine's own disk, in `scratch`.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from stylemill.store.object_store.path import BucketPath, output_path

LAST_GENERATION = 10_000  # what has a higher number in its name is no file of ours
_FILE = re.compile(
    r"(train-)?(?P<shard>[0-9]+)(-of-[0-9]+)?(-r(?P<generation>[0-9]+))?(-(?P<digest>[0-9a-f]{16}))?\.parquet"
)
_RECORD = re.compile(r"(?P<shard>[0-9]+)(\.r(?P<generation>[0-9]+))?\.json")


@dataclass(frozen=True)
class RunPaths:
    """The run folder at `output`, cut into `shards` shards. Numbers are as wide as the shard count, at least 5."""

    output: Path
    shards: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", output_path(self.output))

    @property
    def on_bucket(self) -> bool:
        """Whether the run folder is on an object store."""
        return isinstance(self.output, BucketPath)

    @property
    def scratch(self) -> Path:
        """Where this machine keeps what is unfinished or can be made again: for a local run, its folder."""
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
        """`data` as a string: a million Paths take as many seconds as the rest of opening a run."""
        width, suffix = self._width, _suffix("-r", generation)
        return f"{self.output}/data/train-{shard:0{width}d}-of-{self.shards:0{width}d}{suffix}.parquet"

    def failures_name(self, shard: int, generation: int = 0) -> str:
        return f"{self.output}/failures/{self.number(shard)}{_suffix('-r', generation)}.parquet"

    def committed(self, final: Path, digest: str) -> Path:
        """Where the data or failures file `final` with the SHA-256 `digest` stands once it is committed.

        On an object store no two attempts may have one name, or the later one would take the earlier one's place.
        """
        return final.with_name(f"{final.stem}-{digest[:16]}{final.suffix}") if self.on_bucket else final

    def record(self, shard: int, generation: int = 0) -> Path:
        return self.records_folder / f"{self.number(shard)}{_suffix('.r', generation)}.json"

    def parse_record(self, name: str) -> tuple[int, int] | None:
        """Shard and generation of the record whose file has this name; None for any other file."""
        match = _RECORD.fullmatch(name)
        if match is None:
            return None
        shard, generation = int(match["shard"]), int(match["generation"] or 0)
        ours = shard < self.shards and generation < LAST_GENERATION and self.record(shard, generation).name == name
        return (shard, generation) if ours else None

    def parse_file(self, path: Path) -> tuple[int, int] | None:
        """Shard and generation of the data or failures file that is named like `path`; None for any other file."""
        match = _FILE.fullmatch(path.name)
        if match is None or int(match["shard"]) >= self.shards or int(match["generation"] or 0) >= LAST_GENERATION:
            return None
        shard, generation = int(match["shard"]), int(match["generation"] or 0)
        finals = (self.data(shard, generation), self.failures(shard, generation))
        return (
            (shard, generation) if path in [self.committed(final, match["digest"] or "") for final in finals] else None
        )

    def checkpoints(self, shard: int) -> Path:
        """The folder of one shard's checkpoints."""
        return self.checkpoints_folder / self.number(shard)

    def commit_lock(self, shard: int) -> Path:
        return self.scratch / "checkpoints" / f"{self.number(shard)}.lock"

    def tmp_name(self, final: Path, attempt: str) -> Path:
        """Where `attempt` writes what becomes `final`; no other attempt and no other final name gets the same."""
        return self.tmp / f"{self.relative(final).replace('/', '-')}.{attempt}"

    def relative(self, path: Path) -> str:
        """`path` as records and messages write it: below the run folder, with forward slashes."""
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
    def contact_sheet(self) -> Path:
        return self.output / "contact-sheet.jpg"


def _suffix(mark: str, generation: int) -> str:
    return f"{mark}{generation}" if generation else ""
