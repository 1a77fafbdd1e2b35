"""What the driver and its workers exchange: the run, an attempt at a shard, its progress, choices, and events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Protocol
from uuid import uuid4

from stylemill.config.job import Job
from stylemill.manifest import Manifest
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record


@dataclass(frozen=True)
class Run:
    """What all shards of a run share. Small and picklable: every worker gets it."""

    job: Job
    paths: RunPaths
    manifest: Manifest
    fingerprint: str
    pairs_per_shard: int
    model: str  # the model's name with its commit or digest, for the output column `model`
    base: str  # the folder of relative image paths where the run was started first, for the output column `base`
    generations: Mapping[int, int] = field(default_factory=dict)  # of the shards whose generation is not 0
    newest: int = 0  # the latest generation of any shard

    def rows_of(self, shard: int) -> range:
        """The output rows of a shard."""
        return self.manifest.shard(shard, self.pairs_per_shard)

    def new_attempt(self, shard: int, occurrences: Mapping[int, int]) -> Attempt:
        """A new attempt at `shard`. `occurrences` are those of the whole manifest (`Manifest.repeated_rows`)."""
        manifest_rows = {row // self.manifest.images_per_pair for row in self.rows_of(shard)}
        own = {row: occurrences[row] for row in manifest_rows if row in occurrences}
        return Attempt(shard, uuid4().hex[:12], own, self.generations.get(shard, 0))


@dataclass(frozen=True)
class Attempt:
    """One attempt of one worker at one shard. `id` is unique among all attempts.

    `occurrences` maps the manifest rows of the shard that repeat earlier ones to their occurrence (2, 3, …).
    `poison_pairs` maps the places in the shard of pairs that kill every worker to the stage at which they do. They are
    left out. With a `probe` nothing is written. After the `last` attempt at a shard, the job's `retries` allow no other
    one in this run: a failed download fails its rows.
    """

    shard: int
    id: str
    occurrences: dict[int, int]
    generation: int = 0
    poison_pairs: dict[int, str] = field(default_factory=dict)
    probe: Probe | None = None
    last: bool = False


@dataclass(frozen=True)
class Probe:
    """Some pairs of a shard, run without the others to see whether the worker survives them."""

    places: tuple[int, ...]  # in the shard
    stage: str  # read: the pairs are only read; sample: they run through all stages before the commit
    until: int  # sampling stops after this step


@dataclass(frozen=True)
class Progress:
    """Where a shard stands. Sent at every change of the stage and after every step."""

    shard: int
    attempt_id: str
    stage: str  # read | wait (for the device) | encode | sample | measure | decode | write
    step: int
    steps: int
    pairs: int  # that are sampled; before reading, all of the shard
    limit: float | None = None  # seconds until the next progress, or the worker hangs; None: no limit


@dataclass(frozen=True)
class AutoSettings:
    """What `auto` in the job stands for in this run, as far as earlier workers have chosen it.

    `dtype` holds for every worker, whatever its device. `micro_batches` has the size for each device by its name: the
    memory of another card is another.
    """

    dtype: str | None = None
    micro_batches: Mapping[str, int] = field(default_factory=dict)

    def with_choices_of(self, numerics: Mapping[str, Any]) -> AutoSettings:
        """With what the worker of these numerics has chosen, where nothing was chosen before."""
        sizes = {numerics["device"]: numerics["micro_batch"], **self.micro_batches}
        return AutoSettings(self.dtype or numerics["dtype"], sizes)


class Listener(Protocol):
    """Receives the events of a run, on the driver's side. One call at a time; `progress` may come during another."""

    @property
    def auto_settings(self) -> AutoSettings:
        """What earlier starts of this run have chosen for `auto`; the first worker chooses the rest."""

    def record_numerics(self, numerics: dict[str, str | int]) -> None:
        """The numerics of the first worker that is ready. Called once, before any attempt."""

    def phase(self, text: str) -> None:
        """What the run does now, while no shard is in flight."""

    def progress(self, progress: Progress) -> None:
        """A shard progressed."""

    def committed_record(self, attempt: Attempt) -> Record | None:
        """The record of the attempt's shard, if an earlier attempt committed it. Asked before each attempt.

        Raises StorageError: the attempt failed.
        """

    def committed(self, record: Record) -> None:
        """A worker committed a shard.

        Raises a TransientError if the driver's part of the commit failed: then the attempt failed. Any other error
        stops the run: workers then write checkpoints and leave.
        """

    def warn(self, message: str) -> None:
        """Something failed that the run survives."""


STOPPED = "stopped before it was finished"  # the reason of an open shard where nothing failed

# Executes shards until each is committed or its attempts are used up, and returns why the open ones are open. The
# arguments: the run, its shards, the occurrences of manifest rows, the listener, and the event that asks to stop.
Executor = Callable[[Run, Sequence[int], Mapping[int, int], Listener, Event], dict[int, str]]
