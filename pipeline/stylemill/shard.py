"""One shard, start to end: skip → read → sample → write → commit.

The same function runs inside a Ray actor and inline; it knows neither. Whatever kills it, wherever: what is committed
is valid, and the next attempt goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

import PIL
import pyarrow as pa

from stylemill.engine import Engine, InputImage, Pair, Pixels, SampleState
from stylemill.errors import RowError, SamplingError
from stylemill.images import FittedImage, encode_image, load_image
from stylemill.job import Job
from stylemill.manifest import ImageRef, Manifest, Row
from stylemill.store.checkpoints import Checkpoint, clear, load, save_inputs, save_progress
from stylemill.store.commit import commit
from stylemill.store.paths import RunPaths
from stylemill.store.records import Ledger, Record
from stylemill.store.writer import output_schema, write_failures, write_shard

READERS = 4  # images decoded at a time; Pillow lets go of the GIL


@dataclass(frozen=True)
class Run:
    """What all shards of a run share. Small and picklable: it travels to every worker."""

    job: Job
    paths: RunPaths
    manifest: Manifest
    fingerprint: str
    pairs_per_shard: int
    model: str  # the model's name with its commit or digest, as the output's `model` column shows it

    def rows_of(self, shard: int) -> range:
        first = shard * self.pairs_per_shard
        return range(first, min(first + self.pairs_per_shard, self.manifest.num_rows))


@dataclass(frozen=True)
class Lease:
    """One attempt at one shard. `occurrences` names the rows of it that repeat earlier rows of the manifest."""

    shard: int
    attempt: str
    occurrences: dict[int, int]


@dataclass(frozen=True)
class Progress:
    """Where a shard stands; sent after every step."""

    shard: int
    attempt: str
    stage: str  # read | sample | write
    step: int
    steps: int
    pairs: int


@dataclass(frozen=True)
class Failure:
    """Why a row is lost: where, by which error and in which words."""

    stage: str
    error: str
    message: str


@dataclass(frozen=True)
class Item:
    """A row on its way through the stages. Each stage adds what it learned; a failure ends the way."""

    row: Row
    content_sha256: str | None = None
    style_sha256: tuple[str, ...] = ()
    failure: Failure | None = None
    image: bytes | None = None


def process_shard(
    run: Run,
    lease: Lease,
    engine: Engine,
    device: AbstractContextManager[Any],
    watch: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> Record | None:
    """Bring one shard to its committed record. None when `stopping()` asked to leave; a checkpoint stands then.

    `device` is held while sampling, so that another thread may read ahead and a third encode. Raises TransientError
    when the attempt, not a row, failed; InputError when no attempt can succeed.
    """
    if record := Ledger(run.paths).read(lease.shard):  # an earlier attempt may have died after its commit
        return record
    steps, clock = run.job.sampling.steps, Clock()
    rows = run.rows_of(lease.shard)

    def tell(stage: str, step: int) -> None:
        watch(Progress(lease.shard, lease.attempt, stage, step, steps, len(rows)))

    tell("read", 0)
    with clock.measure("read"):
        items = [Item(row) for row in run.manifest.rows(rows.start, rows.stop, lease.occurrences)]
        keeper = CheckpointKeeper(run, lease, items, engine.numerics)
        checkpoint = keeper.load()
        if checkpoint:
            state, items = keeper.restore(checkpoint, items)
            pairs: list[Pair] = []
        else:
            state = None
            pairs, items = read_pairs(run, items)

    with device:
        with clock.measure("sample"):
            for state in engine.sample(pairs, run.job.sampling, state):
                tell("sample", state.step)
                due = state.step % run.job.checkpoint.every_steps == 0 or state.step == steps
                if due or stopping():
                    keeper.save(state, items)
                if stopping() and state.step < steps:
                    return None
        assert state is not None  # settings allow no run of zero steps
        with clock.measure("decode"):
            images = engine.decode(state)

    tell("write", steps)
    with clock.measure("write"):
        items = [encoded(run, item, image) for item, image in zip(note_lost(items, state), images, strict=True)]
        data, failures = write_tables(run, lease, items)
        failed = [item.failure for item in items if item.failure]
        record = commit(
            run.paths,
            Record(
                shard=lease.shard,
                generation=0,
                fingerprint=run.fingerprint,
                first_row=rows.start,
                stop_row=rows.stop,
                rows_ok=len(items) - len(failed),
                rows_failed=len(failed),
                data=None,
                failures=None,
                attempt=lease.attempt,
                numerics=numerics(engine),
                timings=clock.seconds,
                failed_by_class=dict(Counter(failure.error for failure in failed)),
            ),
            data,
            failures,
        )
    clear(run.paths, lease.shard)
    return record


def numerics(engine: Engine) -> dict[str, str | int]:
    """What the bytes of a data file depend on besides the job."""
    return engine.numerics | {"pillow": PIL.__version__, "pyarrow": pa.__version__}


def read_pairs(run: Run, items: list[Item]) -> tuple[list[Pair], list[Item]]:
    """Read, decode and fit each unique image of the shard once. A bad image fails its rows, and only them."""
    refs = {ref.key: ref for item in items for ref in _refs(item.row)}
    with ThreadPoolExecutor(READERS) as readers:
        loaded = dict(zip(refs, readers.map(lambda ref: _load(run, ref), refs.values()), strict=True))
    inputs = {
        key: InputImage(key, image.pixels if isinstance(image, FittedImage) else None) for key, image in loaded.items()
    }
    pairs, read = [], []
    for item in items:
        row, size = item.row, run.job.image.width_height
        pairs.append(
            Pair(
                styles=tuple(inputs[style.key] for style in row.styles),
                size=size,
                content=inputs[row.content.key] if row.content else None,
                prompt=row.prompt or "",
                negative_prompt=row.negative_prompt or "",
                seed=row.seed,
                content_weight=row.content_weight,
            )
        )
        problems = [loaded[ref.key] for ref in _refs(row) if isinstance(loaded[ref.key], Failure)]
        digests = {key: image.sha256 for key, image in loaded.items() if isinstance(image, FittedImage)}
        read.append(
            replace(
                item,
                content_sha256=digests.get(row.content.key) if row.content else None,
                style_sha256=tuple(digests.get(style.key, "") for style in row.styles),
                failure=problems[0] if problems else None,
            )
        )
    return pairs, read


def _refs(row: Row) -> Iterator[ImageRef]:
    if row.content:
        yield row.content
    yield from row.styles


def _load(run: Run, ref: ImageRef) -> FittedImage | Failure:
    image = run.job.image
    try:
        return load_image(ref.path, ref.data, run.manifest.base, image.width_height, image.fit)
    except RowError as error:
        return _failure(error)


def _failure(error: RowError) -> Failure:
    return Failure(error.stage, type(error).__name__, str(error))


def note_lost(items: list[Item], state: SampleState) -> list[Item]:
    """Items with the failures of sampling added; a reason known from reading stands."""
    lost = state.failures
    return [
        replace(item, failure=_failure(SamplingError(lost[place]))) if place in lost and not item.failure else item
        for place, item in enumerate(items)
    ]


def encoded(run: Run, item: Item, pixels: Pixels | None) -> Item:
    """The item with its image file's bytes."""
    if item.failure or pixels is None:
        return item
    shards = run.job.shards
    return replace(item, image=encode_image(pixels, shards.image_format, shards.quality))


def write_tables(run: Run, lease: Lease, items: list[Item]) -> tuple[Any, Any]:
    """Write successful rows and failed rows into tmp/; None for a file that would have no row."""
    good = [place for place, item in enumerate(items) if item.image is not None]
    data = failures = None
    if good:
        table = output_table(run, [items[place] for place in good])
        rows = run.rows_of(lease.shard)
        carried = run.manifest.carried_rows(rows.start, rows.stop)
        for name in carried.column_names:
            table = table.append_column(carried.schema.field(name), carried[name].take(good))
        data = write_shard(run.paths, lease.shard, lease.attempt, table.cast(_schema(run)))
    if len(good) < len(items):
        lost = [
            {"pair_id": item.row.pair_id, "row": item.row.row, **asdict(item.failure)} for item in items if item.failure
        ]
        failures = write_failures(run.paths, lease.shard, lease.attempt, lost)
    return data, failures


def _schema(run: Run) -> pa.Schema:
    return output_schema(run.manifest.carried, run.manifest.style_is_list)


def output_table(run: Run, items: list[Item]) -> pa.Table:
    """The columns that stylemill itself makes, without the carried ones."""
    width, height = run.job.image.width_height
    schema = _schema(run)
    rows = [
        {
            "pair_id": item.row.pair_id,
            "row": item.row.row,
            "image": {"bytes": item.image, "path": f"{item.row.pair_id}.{run.job.shards.image_format}"},
            "content": item.row.content.reference if item.row.content else None,
            "style": _one_or_list(run, [style.reference for style in item.row.styles]),
            "width": width,
            "height": height,
            "seed": run.job.sampling.seed if item.row.seed is None else item.row.seed,
            "settings": json.dumps(_settings(run.job, item.row), sort_keys=True),
            "content_sha256": item.content_sha256,
            "style_sha256": _one_or_list(run, list(item.style_sha256)),
            "sha256": sha256(item.image or b"").hexdigest(),
            "model": run.model,
        }
        for item in items
    ]
    own = pa.schema([schema.field(name) for name in rows[0]])
    return pa.Table.from_pylist(rows, schema=own)


def _one_or_list(run: Run, values: list[str]) -> Any:
    return values if run.manifest.style_is_list else values[0]


def _settings(job: Job, row: Row) -> dict[str, Any]:
    settings = job.sampling.model_dump() | {"fit": job.image.fit}
    for name in ("content_weight", "prompt", "negative_prompt"):
        if (value := getattr(row, name)) is not None:
            settings[name] = value
    return settings


class CheckpointKeeper:
    """Saves a shard in flight and brings it back: the engine's state, and what reading taught about each row."""

    def __init__(self, run: Run, lease: Lease, items: list[Item], numerics: dict[str, str | int]) -> None:
        self.run = run
        self.lease = lease
        self.numerics = numerics
        ids = "\n".join(item.row.pair_id for item in items)
        self.identity = {
            "fingerprint": run.fingerprint,
            "shard": lease.shard,
            "order": sha256(ids.encode()).hexdigest(),
        }
        self.inputs_saved = False

    def load(self) -> Checkpoint | None:
        return load(self.run.paths, self.lease.shard, self.identity)

    def restore(self, checkpoint: Checkpoint, items: list[Item]) -> tuple[SampleState, list[Item]]:
        self.inputs_saved = True
        facts = checkpoint.inputs_meta["items"]
        state = SampleState.restore(
            checkpoint.inputs, checkpoint.inputs_meta["engine"], checkpoint.arrays, checkpoint.meta["engine"]
        )
        return state, [
            replace(
                item,
                content_sha256=fact["content_sha256"],
                style_sha256=tuple(fact["style_sha256"]),
                failure=Failure(**fact["failure"]) if fact["failure"] else None,
            )
            for item, fact in zip(items, facts, strict=True)
        ]

    def save(self, state: SampleState, items: list[Item]) -> None:
        if not self.inputs_saved:
            arrays, facts = state.export_inputs()
            learned = [
                {
                    "content_sha256": item.content_sha256,
                    "style_sha256": item.style_sha256,
                    "failure": asdict(item.failure) if item.failure else None,
                }
                for item in items
            ]
            meta = self.identity | {"engine": facts, "items": learned}
            save_inputs(self.run.paths, self.lease.shard, self.lease.attempt, arrays, meta)
            self.inputs_saved = True
        arrays, facts = state.export_progress()
        meta = self.identity | {"engine": facts, "numerics": self.numerics}
        save_progress(self.run.paths, self.lease.shard, state.step, self.lease.attempt, arrays, meta)


class Clock:
    """Seconds spent in each stage of a shard, for its record."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, stage: str) -> _Lap:
        return _Lap(self, stage)


class _Lap:
    def __init__(self, clock: Clock, stage: str) -> None:
        self.clock, self.stage = clock, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.seconds[self.stage] = round(time.perf_counter() - self.start, 3)
