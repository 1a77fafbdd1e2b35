"""A row's way through the stages of a shard: read, sampled, encoded, written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import isnan, nan
from pathlib import Path
from typing import Any

import pyarrow as pa

from stylemill.config.job import Job
from stylemill.engine import InputImage, LabelImage, Pair, Pixels, SampleState
from stylemill.errors import RowError, SamplingError
from stylemill.execution.attempt import Attempt, Run
from stylemill.images.masks import load_labels
from stylemill.images.read import FittedImage, encode_image, load_image
from stylemill.manifest import ImageRef, Row
from stylemill.store.parquet import Failure, output_schema, write_failures, write_shard
from stylemill.store.retries import GenerationRows
from stylemill.testing.failpoints import failpoint

READERS = 4  # images decoded at a time; Pillow lets go of the GIL


@dataclass(frozen=True)
class FailureReason:
    """Why a row is lost: at which stage, by which error and in which words."""

    stage: str
    error: str
    message: str


@dataclass(frozen=True)
class OutputRow:
    """A row on its way through the stages. Each stage adds what it learned; a failure ends the way."""

    row: Row
    content_sha256: str | None = None
    style_sha256: tuple[str, ...] = ()
    failure: FailureReason | None = None
    wanted: bool = True  # False: it keeps its slot, and another generation of the shard has it
    losses: tuple[tuple[float, float], ...] = ((nan, nan), (nan, nan))  # first and last; AD and content
    image: bytes | None = None
    size: tuple[int, int] = (0, 0)  # of the image, width and height


def assigned(items: list[OutputRow], work: GenerationRows) -> list[OutputRow]:
    """The items of a generation: those of other rows, and those whose failure is known, only keep their slots."""
    return [
        replace(
            item,
            wanted=item.row.output_row in work.rows or item.row.output_row in work.known_failures,
            failure=FailureReason(held.stage, held.error, held.message)
            if (held := work.known_failures.get(item.row.output_row))
            else None,
        )
        for item in items
    ]


def read_pairs(run: Run, items: list[OutputRow], grid: int) -> tuple[list[Pair], list[OutputRow]]:
    """Read, decode and fit each unique image of the shard once. A bad image fails its rows, and only them.

    `grid` is the model's: what image sides are multiples of. What only items that failed before need is not touched.
    """
    needs = list(dict.fromkeys(need for item in items if not item.failure for need in _needs(run, item.row)))
    with ThreadPoolExecutor(READERS) as readers:
        read_now = zip(needs, readers.map(lambda need: _load(run, need, grid), needs), strict=True)
        without = {need: item.failure for item in items if item.failure for need in _needs(run, item.row)}
        loaded: dict[Need, FittedImage | FailureReason] = {**without, **dict(read_now)}
    keeps = run.job.image.fit == "keep"
    inputs = {need: _input(need, image, keeps) for need, image in loaded.items()}
    masks = _read_masks(run, items, loaded)
    sizes = [_size(run, item.row, inputs) for item in items]
    controls = _read_controls(run, items, sizes)
    digests = {need: image.sha256 for need, image in loaded.items() if isinstance(image, FittedImage)}
    pairs, read = [], []
    for item, size in zip(items, sizes, strict=True):
        row = item.row
        content, styles = _content(run, row), _styles(run, row)
        lost = [problem for need in _needs(run, row) if isinstance(problem := loaded[need], FailureReason)]
        pairs.append(
            Pair(
                styles=tuple(inputs[style] for style in styles),
                size=size,
                content=inputs[content] if content else None,
                prompt=row.prompt or "",
                negative_prompt=row.negative_prompt or "",
                seed=row.seed,
                image_number=row.image_number,
                content_weight=row.content_weight,
                content_mask=next((masks[need][0] for need in _masks(run, row)), None),
                style_masks=tuple(masks[need][0] for need in _masks(run, row)[1:]),
                controls=tuple(controls[need][0] for need in _controls(run, row, size)),
                sized=not (keeps and lost),
                idle=item.failure is not None or not item.wanted,
            )
        )
        problems = lost + [unusable for need in _masks(run, row) if (unusable := masks[need][1])]
        problems += [unusable for need in _controls(run, row, size) if (unusable := controls[need][1])]
        read.append(
            replace(
                item,
                content_sha256=digests.get(content) if content else None,
                style_sha256=tuple(digests.get(style, "") for style in styles),
                failure=item.failure or (problems[0] if problems else None),
            )
        )
    return pairs, read


@dataclass(frozen=True)
class Need:
    """An image at the size that it is fitted to: the same file may be a content of one and a style of another."""

    key: str
    size: tuple[int, int]
    ref: ImageRef = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"{self.key} at {self.size[0]}×{self.size[1]}"


def _size(run: Run, row: Row, inputs: Mapping[Need, InputImage]) -> tuple[int, int]:
    """Of the pair: of its fitted content, where it has one."""
    content = _content(run, row)
    return (content and inputs[content].size) or run.job.image.width_height


def _content(run: Run, row: Row) -> Need | None:
    return Need(row.content.key, run.job.image.width_height, row.content) if row.content else None


def _styles(run: Run, row: Row) -> tuple[Need, ...]:
    return tuple(Need(style.key, run.job.image.style_width_height, style) for style in row.styles)


def _needs(run: Run, row: Row) -> tuple[Need, ...]:
    content = _content(run, row)
    return (content, *_styles(run, row)) if content else _styles(run, row)


def _input(need: Need, image: FittedImage | FailureReason, keeps: bool) -> InputImage:
    if isinstance(image, FittedImage):
        return InputImage(need.name, image.pixels)
    return InputImage(need.name, None, None if keeps else need.size)


Mask = tuple[str, Need | None]  # its path, and the image that it belongs to: it moves with that


def _masks(run: Run, row: Row) -> list[Mask]:
    """The masks of a row: the content's, then one for each style; or none."""
    if row.content_mask is None:
        return []
    return [(row.content_mask, _content(run, row)), *zip(row.style_masks, _styles(run, row), strict=True)]


def _read_masks(
    run: Run, items: list[OutputRow], images: dict[Need, FittedImage | FailureReason]
) -> dict[Mask, tuple[LabelImage, FailureReason | None]]:
    """Each unique mask of the shard, and why it cannot be used. One of an image that is lost is not looked at."""

    def read(need: Mask) -> tuple[LabelImage, FailureReason | None]:
        path, of = need
        name, image = f"{path} of {of.name if of else 'no image'}", images[of] if of else None
        if isinstance(image, FailureReason) or need not in wanted:
            return LabelImage(name, None), None
        size, source = run.job.image.width_height, None
        if image is not None:
            size, source = (image.pixels.shape[1], image.pixels.shape[0]), image.source
        try:
            labels = load_labels(path, None, run.manifest.base, size, run.job.image.fit, source, run.job.inputs)
        except RowError as error:
            return LabelImage(name, None), _reason(error)
        return LabelImage(name, labels), None

    wanted = {need for item in items if not item.failure for need in _masks(run, item.row)}
    needs = list(dict.fromkeys(need for item in items for need in _masks(run, item.row)))
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(needs, readers.map(read, needs), strict=True))


def _controls(run: Run, row: Row, size: tuple[int, int]) -> list[Need]:
    """The control images of a row, as large as its content; none where the job has no ControlNet to look at them."""
    return [Need(control.key, size, control) for control in row.controls] if run.job.model.controlnet else []


def _read_controls(
    run: Run, items: list[OutputRow], sizes: list[tuple[int, int]]
) -> dict[Need, tuple[InputImage, FailureReason | None]]:
    """Each unique control image of the shard, fitted as the contents are, and why it cannot be used."""
    fit = "crop" if run.job.image.fit == "keep" else run.job.image.fit  # the size to keep is the content's

    def read(need: Need) -> tuple[InputImage, FailureReason | None]:
        if need not in wanted:
            return InputImage(need.name, None, need.size), None
        try:
            image = load_image(need.ref.path, need.ref.data, run.manifest.base, need.size, fit, 1, run.job.inputs)
        except RowError as error:
            return InputImage(need.name, None, need.size), _reason(error)
        return InputImage(need.name, image.pixels), None

    needs_of = [_controls(run, item.row, size) for item, size in zip(items, sizes, strict=True)]
    wanted = {need for item, own in zip(items, needs_of, strict=True) if not item.failure for need in own}
    needs = list(dict.fromkeys(need for own in needs_of for need in own))
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(needs, readers.map(read, needs), strict=True))


def _load(run: Run, need: Need, grid: int) -> FittedImage | FailureReason:
    ref, fit = need.ref, run.job.image.fit
    failpoint("read-image", name=need.key)
    try:
        return load_image(ref.path, ref.data, run.manifest.base, need.size, fit, grid, run.job.inputs)
    except RowError as error:
        return _reason(error)


def _reason(error: RowError) -> FailureReason:
    return FailureReason(error.stage, type(error).__name__, str(error))


def note_sampled(items: list[OutputRow], state: SampleState) -> list[OutputRow]:
    """Items with the losses and failures of sampling added; a reason known from reading stands."""
    lost, losses = state.failures, state.losses.tolist()
    return [
        replace(
            item,
            losses=tuple(losses[place]),
            failure=item.failure or (_reason(SamplingError(lost[place])) if place in lost else None),
        )
        for place, item in enumerate(items)
    ]


def encoded(run: Run, item: OutputRow, pixels: Pixels | None) -> OutputRow:
    """The item with its image file's bytes."""
    if item.failure or pixels is None:
        return item
    shards, (height, width, _) = run.job.shards, pixels.shape
    return replace(item, image=encode_image(pixels, shards.image_format, shards.quality), size=(width, height))


def write_tables(run: Run, attempt: Attempt, items: list[OutputRow]) -> tuple[Any, Any]:
    """Write successful rows and failed rows into tmp/; None for a file that would have no row."""
    good = [place for place, item in enumerate(items) if item.image is not None]
    data = failures = None
    if good:
        table = output_table(run, [items[place] for place in good])
        rows = run.rows_of(attempt.shard)
        carried = run.manifest.carried_output_rows(rows.start, rows.stop)
        for name in carried.column_names:
            table = table.append_column(carried.schema.field(name), carried[name].take(good))
        data = write_shard(run.paths, attempt.shard, attempt.id, table.cast(_schema(run)), attempt.generation)
    lost = [
        Failure(item.row.output_row, item.row.pair_id, **asdict(item.failure))
        for item in items
        if item.failure and item.wanted
    ]
    if lost:
        failures = write_failures(run.paths, attempt.shard, attempt.id, lost, run.fingerprint, attempt.generation)
    return data, failures


def _schema(run: Run) -> pa.Schema:
    return output_schema(run.manifest.carried, run.manifest.style_is_list, run.fingerprint)


def output_table(run: Run, items: list[OutputRow]) -> pa.Table:
    """The columns that stylemill itself makes, without the carried ones."""
    schema = _schema(run)
    rows = [
        {
            "pair_id": item.row.pair_id,
            "row": item.row.output_row,
            "image": {"bytes": item.image, "path": f"{item.row.pair_id}.{run.job.shards.image_format}"},
            "content": item.row.content.reference if item.row.content else None,
            "style": _one_or_list(run, [style.reference for style in item.row.styles]),
            "width": item.size[0],
            "height": item.size[1],
            "seed": run.job.sampling.seed + item.row.image_number if item.row.seed is None else item.row.seed,
            "settings": json.dumps(_settings(run.job, item.row), sort_keys=True),
            **_losses(item),
            "content_sha256": item.content_sha256,
            "style_sha256": _one_or_list(run, list(item.style_sha256)),
            "sha256": sha256(item.image or b"").hexdigest(),
            "model": run.model,
        }
        for item in items
    ]
    own = pa.schema([schema.field(name) for name in rows[0]])
    return pa.Table.from_pylist(rows, schema=own)


def _losses(item: OutputRow) -> dict[str, float | None]:
    first, last = item.losses
    return {
        f"{name}_loss_{when}": None if isnan(losses[place]) else losses[place]
        for place, name in enumerate(("ad", "content"))
        for when, losses in (("first", first), ("last", last))
    }


def _one_or_list(run: Run, values: list[str]) -> Any:
    return values if run.manifest.style_is_list else values[0]


def _settings(job: Job, row: Row) -> dict[str, Any]:
    settings = job.sampling.model_dump() | {"fit": job.image.fit}
    if job.image.style_size is not None:
        settings["style_size"] = list(job.image.style_width_height)
    for name in ("content_weight", "prompt", "negative_prompt"):
        if (value := getattr(row, name)) is not None:
            settings[name] = value
    if row.content_mask is not None:
        settings |= {"content_mask": row.content_mask, "style_mask": list(row.style_masks)}
    if job.model.controlnet:
        settings["control"] = [control.reference for control in row.controls]
        settings["controlnet"] = [
            {"name": Path(net.name).name, "scale": net.scale, "start": net.start, "end": net.end}
            for net in job.model.controlnet
        ]
    return settings
