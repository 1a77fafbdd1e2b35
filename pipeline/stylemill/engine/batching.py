"""How the pairs of a shard are laid out for the UNet: fixed slots in micro-batches, micro-batches in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stylemill.engine.state import PairInputs, ShardInputs

Batch = tuple[int, ...]  # pair indices that share one UNet call


@dataclass(frozen=True)
class Block:
    """Micro-batches whose features are held at the same time.

    A tile is one block, so each of its images is read once a step. Only where the features of a shard exceed the
    budget are there more, and an image that two blocks need is read twice.
    """

    batches: tuple[Batch, ...]
    images: tuple[int, ...]


def micro_batches(inputs: ShardInputs, size: int, by_style: bool = False) -> list[Batch]:
    """Cut the pairs into micro-batches of at most `size` with equal latent shapes and style tokens.

    `by_style` also keeps pairs of different first styles apart.
    Who shares a batch is a function of the manifest rows alone, never of what failed: batch sizes change low bits.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, pair in enumerate(inputs.pairs):
        if pair.slot:
            own = pair.styles[0] if by_style else None
            alike.setdefault((own, _kind(inputs, pair)), []).append(index)
    return [tuple(group[i : i + size]) for group in alike.values() for i in range(0, len(group), size)]


def _kind(inputs: ShardInputs, pair: PairInputs) -> tuple[object, ...]:
    styles = tuple(tuple(inputs.images[style].shape) for style in pair.styles)
    return pair.shape, styles, uses_content(pair), bool(pair.masks)


def uses_content(pair: PairInputs) -> bool:
    """Whether the content loss counts for this pair; with λ = 0 its features are not worth a pass."""
    return pair.content is not None and pair.content_weight > 0


def images_of(inputs: ShardInputs, batch: Batch) -> set[int]:
    """The images whose features a micro-batch needs."""
    pairs = [inputs.pairs[index] for index in batch]
    contents = {pair.content for pair in pairs if pair.content is not None and uses_content(pair)}
    return contents | {style for pair in pairs for style in pair.styles}


def blocks(inputs: ShardInputs, batches: Sequence[Batch], feature_bytes: Sequence[int], budget: int) -> list[Block]:
    """Gather consecutive micro-batches into blocks whose features stay within `budget` bytes.

    A micro-batch is never split: one that exceeds the budget by itself is a block of its own.
    """
    found: list[Block] = []
    members: list[Batch] = []
    images: set[int] = set()
    for batch in batches:
        wider = images | images_of(inputs, batch)
        if members and sum(feature_bytes[image] for image in wider) > budget:
            found.append(Block(tuple(members), tuple(sorted(images))))
            members, wider = [], images_of(inputs, batch)
        members.append(batch)
        images = wider
    if members:
        found.append(Block(tuple(members), tuple(sorted(images))))
    return found
