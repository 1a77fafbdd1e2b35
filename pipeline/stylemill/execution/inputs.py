"""The inputs of a shard: each unique image, mask and control image is read once, and rows become pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

from stylemill.config.inputs import Fit
from stylemill.engine.inputs import Pair
from stylemill.execution.attempt import Run
from stylemill.execution.input_reader import InputReader
from stylemill.execution.rows import FailureReason, OutputRow
from stylemill.images.input_image import InputImage, LabelImage
from stylemill.images.masks import load_labels
from stylemill.images.read import load_image
from stylemill.manifest import ImageRef, Row
from stylemill.testing.failpoints import failpoint

READERS = 4  # images decoded at a time; Pillow releases the GIL

Size = tuple[int, int]  # width and height in pixels
Read = tuple[InputImage, FailureReason | None]  # an image, and why it could not be read
ReadMask = tuple[LabelImage, FailureReason | None]


class ImageSource(NamedTuple):
    """Where an image is, and the size it is fitted to: one file may be a content of one size and a style of another."""

    ref: ImageRef
    size: Size

    @property
    def name(self) -> str:
        return f"{self.ref.key} at {self.size[0]}×{self.size[1]}"


class MaskSource(NamedTuple):
    """Where a mask is, and the image that it is fitted with; None for the mask of a pair without a content image."""

    path: str
    image: ImageSource | None

    @property
    def name(self) -> str:
        return f"{self.path} of {self.image.name if self.image else 'no image'}"


Source = TypeVar("Source", ImageSource, MaskSource)
Result = TypeVar("Result")


def read_pairs(
    run: Run, rows: list[OutputRow], grid: int, last_attempt: bool = False
) -> tuple[list[Pair], list[OutputRow]]:
    """Read, decode and fit each unique input of a shard once. A bad input fails the rows that use it, and no others.

    Sides of images are multiples of `grid` pixels. Inputs that only rows with a known failure use are not read.
    Returns the pairs, and the rows with the digests of their inputs and the failures of reading. Raises as
    `InputReader.read` does.
    """
    keeps_size = run.job.image.fit == "keep"
    reader = InputReader(run.job.inputs, last_attempt)
    images = _read_images(run, reader, rows, grid)
    masks = _read_masks(run, reader, rows, images)
    sizes = [_pair_size(run, row.source, images) for row in rows]
    controls = _read_controls(run, reader, rows, sizes)
    pairs, read_rows = [], []
    for row, size in zip(rows, sizes, strict=True):
        source = row.source
        own_contents = [images[image.name] for image in _contents(run, source)]
        own_styles = [images[image.name] for image in _styles(run, source)]
        own_masks = [masks[mask.name] for mask in _masks(run, source)]
        own_controls = [controls[control.name] for control in _controls(run, source, size)]
        unreadable_image = any(reason for _, reason in (*own_contents, *own_styles))
        content = own_contents[0][0] if own_contents else None
        pairs.append(
            Pair(
                styles=tuple(style for style, _ in own_styles),
                size=size,
                content=content,
                prompt=source.prompt or "",
                negative_prompt=source.negative_prompt or "",
                seed=source.seed,
                image_number=source.image_number,
                content_weight=source.content_weight,
                content_mask=own_masks[0][0] if own_masks else None,
                style_masks=tuple(mask for mask, _ in own_masks[1:]),
                controls=tuple(control for control, _ in own_controls),
                size_known=not (keeps_size and unreadable_image),
                placeholder=row.failure is not None or not row.wanted,
            )
        )
        reasons = [reason for _, reason in (*own_contents, *own_styles, *own_masks, *own_controls) if reason]
        read_rows.append(
            replace(
                row,
                content_sha256=content.file_sha256 if content else None,
                style_sha256=tuple(style.file_sha256 or "" for style, _ in own_styles),
                failure=row.failure or (reasons[0] if reasons else None),
            )
        )
    return pairs, read_rows


def _contents(run: Run, row: Row) -> list[ImageSource]:
    """The content image of a row, or nothing."""
    return [ImageSource(row.content, run.job.image.width_height)] if row.content else []


def _styles(run: Run, row: Row) -> list[ImageSource]:
    return [ImageSource(style, run.job.image.style_width_height) for style in row.styles]


def _masks(run: Run, row: Row) -> list[MaskSource]:
    """The masks of a row: the content's, then one for each style; or nothing."""
    if row.content_mask is None:
        return []
    content = next(iter(_contents(run, row)), None)
    style_masks = zip(row.style_masks, _styles(run, row), strict=True)
    return [MaskSource(row.content_mask, content), *(MaskSource(path, style) for path, style in style_masks)]


def _controls(run: Run, row: Row, size: Size) -> list[ImageSource]:
    """The control images of a row, in the size of its pair; nothing where the job has no ControlNet."""
    return [ImageSource(control, size) for control in row.controls] if run.job.model.controlnet else []


def _pair_size(run: Run, row: Row, images: Mapping[str, Read]) -> Size:
    """The size of the fitted content where there is one, else the job's."""
    contents = [images[content.name][0].size for content in _contents(run, row)]
    return (contents and contents[0]) or run.job.image.width_height


def _read_images(run: Run, reader: InputReader, rows: list[OutputRow], grid: int) -> dict[str, Read]:
    """Content and style images by name."""
    image_settings = run.job.image

    def read(source: ImageSource) -> Read:
        failpoint("read-image", name=source.ref.key)
        return _load(run, reader, source, image_settings.fit, grid)

    def unread(source: ImageSource) -> InputImage:
        return InputImage(source.name, None, None if image_settings.fit == "keep" else source.size)

    sources_of = [[*_contents(run, row.source), *_styles(run, row.source)] for row in rows]
    wanted = [source for row, sources in zip(rows, sources_of, strict=True) if not row.failure for source in sources]
    known = {
        source.name: (unread(source), row.failure)
        for row, sources in zip(rows, sources_of, strict=True)
        if row.failure
        for source in sources
    }
    return known | _read_each(wanted, read)


def _read_masks(
    run: Run, reader: InputReader, rows: list[OutputRow], images: Mapping[str, Read]
) -> dict[str, ReadMask]:
    """Masks by name. A mask whose image could not be read is not read either."""

    def read(mask: MaskSource) -> ReadMask:
        size, source_size = run.job.image.width_height, None
        if mask.image:
            image, unreadable = images[mask.image.name]
            if unreadable or image.size is None:
                return LabelImage(mask.name, None), None
            size, source_size = image.size, image.source_size
        labels, reason = reader.read(
            mask.path,
            lambda inputs: load_labels(
                mask.path, None, run.manifest.base, size, run.job.image.fit, source_size, inputs
            ),
        )
        return LabelImage(mask.name, labels), reason

    every = {mask.name: mask for row in rows for mask in _masks(run, row.source)}
    wanted = [mask for row in rows if not row.failure for mask in _masks(run, row.source)]
    unread: dict[str, ReadMask] = {name: (LabelImage(name, None), None) for name in every}
    return unread | _read_each(wanted, read)


def _read_controls(run: Run, reader: InputReader, rows: list[OutputRow], sizes: list[Size]) -> dict[str, Read]:
    """Control images by name, fitted as the contents are."""
    fit = "crop" if run.job.image.fit == "keep" else run.job.image.fit  # the size to keep is the content's
    sources_of = [_controls(run, row.source, size) for row, size in zip(rows, sizes, strict=True)]
    wanted = [source for row, sources in zip(rows, sources_of, strict=True) if not row.failure for source in sources]
    unread: dict[str, Read] = {
        source.name: (InputImage(source.name, None, source.size), None) for sources in sources_of for source in sources
    }
    return unread | _read_each(wanted, lambda source: _load(run, reader, source, fit, 1))


def _load(run: Run, reader: InputReader, source: ImageSource, fit: Fit, grid: int) -> Read:
    ref = source.ref
    image, reason = reader.read(
        ref.path if ref.data is None else None,
        lambda inputs: load_image(
            ref.path, ref.data, run.manifest.base, source.size, fit, grid, inputs, name=source.name
        ),
    )
    return image or InputImage(source.name, None, None if fit == "keep" else source.size), reason


def _read_each(sources: Iterable[Source], read: Callable[[Source], Result]) -> dict[str, Result]:
    """Read each unique source once, several at a time."""
    unique = {source.name: source for source in sources}
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(unique, readers.map(read, unique.values()), strict=True))
