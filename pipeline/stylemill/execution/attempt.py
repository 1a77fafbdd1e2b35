"""What travels between the driver and its workers: the run, a attempt on a shard, and news of its progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

from stylemill.config.job import Job
from stylemill.manifest import Manifest
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record


@dataclass(frozen=True)
class Run:
    """What all shards of a run share. Small and picklable: it travels to every worker."""

    job: Job
    paths: RunPaths
    manifest: Manifest
    fingerprint: str
    pairs_per_shard: int
    model: str  # the model's name with its commit or digest, as the output's `model` column shows it
    generations: Mapping[int, int] = field(default_factory=dict)  # of shards whose attempt is not on generation 0
    newest: int = 0  # the latest generation that any shard has

    def rows_of(self, shard: int) -> range:
        return self.manifest.shard(shard, self.pairs_per_shard)

    def new_attempt(self, shard: int, occurrences: Mapping[int, int]) -> Attempt:
        """A new attempt at `shard`, under a name that no other attempt has."""
        rows = {image // self.manifest.images_per_pair for image in self.rows_of(shard)}
        own = {row: occurrences[row] for row in rows if row in occurrences}
        return Attempt(shard, uuid4().hex[:12], own, self.generations.get(shard, 0))


@dataclass(frozen=True)
class Attempt:
    """One attempt at one shard. `occurrences` names the rows of it that repeat earlier rows of the manifest.

    `poison_pairs` are left out, by their place in the shard, since they kill whoever takes them up, at the stage given.
    With a `probe`, nothing is committed.
    """

    shard: int
    id: str
    occurrences: dict[int, int]
    generation: int = 0
    poison_pairs: dict[int, str] = field(default_factory=dict)
    probe: Probe | None = None


@dataclass(frozen=True)
class Probe:
    """Some pairs of a shard, tried without the others to see whether a worker survives them."""

    places: tuple[int, ...]
    stage: str  # read: they are only read; sample: all the way, short of writing them
    until: int  # this step


@dataclass(frozen=True)
class Progress:
    """Where a shard stands; sent after every step."""

    shard: int
    attempt_id: str
    stage: str  # read | wait (for the device) | encode | sample | decode | write
    step: int
    steps: int
    pairs: int
    limit: float | None = None  # seconds in which there must be news, or its worker hangs; None: others decide that


class Listener(Protocol):
    """Who is told what happens: the driver's side of a run. Called from one thread."""

    micro_batch: int | None  # settled by an earlier start of this run; None: the first worker calibrates

    def settle(self, numerics: dict[str, str | int]) -> None:
        """The numerics of the first worker that is ready; called once, before any attempt."""

    def progress(self, progress: Progress) -> None:
        """A shard moved on."""

    def committed(self, record: Record) -> None:
        """A shard is done. May raise to stop the run; workers then write checkpoints and leave."""

    def warn(self, message: str) -> None:
        """Something went wrong that the run survives."""
