"""Batching of a shard's pairs: pairs to micro-batches, micro-batches to blocks. Torch-free.

The functions take plain values, so that the plan counts with the rules that the engine works by.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from stylemill.config.sampling import Sampling

LARGEST_MICRO_BATCH = 64
USABLE_MEMORY = 0.8  # of what a GPU has free; the rest is for fragmentation and for workspaces of the CUDA libraries
Batch = tuple[int, ...]  # a micro-batch: indices of the pairs that share one UNet call


class PairKind(NamedTuple):
    """What the pairs of a micro-batch have in common, because their tensors are stacked."""

    shape: Hashable  # of the latents
    style_shapes: Hashable
    uses_content: bool
    has_masks: bool


@dataclass(frozen=True)
class Block:
    """Micro-batches whose features are in memory at the same time, and the images that these are features of.

    A shard is one block where its features fit into the budget, and each image is then read once a step. Otherwise it
    is several, and an image that two of them need is read twice.
    """

    batches: tuple[Batch, ...]
    images: tuple[int, ...]  # ascending


def uses_content(has_content: bool, content_weight: float) -> bool:
    """Whether a pair's content loss counts: with λ = 0, features of the content would be read in vain."""
    return has_content and content_weight > 0


def feature_parts(is_style: bool, is_content: bool) -> int:
    """How many of Q, K and V are kept of an image: K and V of a style, Q of a content."""
    return 2 * is_style + is_content


def micro_batches(kinds: Sequence[Hashable | None], size: int) -> list[Batch]:
    """Group the pairs of each kind into micro-batches of at most `size`, in order.

    `kinds` has one item for each pair; a pair of kind None is in no micro-batch. Kinds must follow from the manifest
    rows alone, never from which pairs failed: the size of a batch changes the low bits of a result.
    """
    groups: dict[Hashable, list[int]] = {}
    for pair, kind in enumerate(kinds):
        if kind is not None:
            groups.setdefault(kind, []).append(pair)
    return [tuple(group[start : start + size]) for group in groups.values() for start in range(0, len(group), size)]


def blocks(
    batches: Sequence[Batch], images_of: Sequence[Set[int]], feature_bytes: Sequence[int], budget: int
) -> list[Block]:
    """Gather consecutive micro-batches into blocks whose features take at most `budget` bytes.

    `images_of` has, for each pair, the images whose features it needs; `feature_bytes` has the size of each image's
    features. A micro-batch is never split: one that exceeds the budget alone is a block of its own.
    """
    found: list[Block] = []
    members: list[Batch] = []
    images: set[int] = set()
    held = 0
    for batch in batches:
        needed = set().union(*(images_of[pair] for pair in batch))
        more = sum(feature_bytes[image] for image in needed - images)
        if members and held + more > budget:
            found.append(Block(tuple(members), tuple(sorted(images))))
            members, images, held = [], set(), 0
            more = sum(feature_bytes[image] for image in needed)
        members.append(batch)
        images |= needed
        held += more
    if members:
        found.append(Block(tuple(members), tuple(sorted(images))))
    return found


def window_corners(latent_size: tuple[int, int], settings: Sampling) -> list[tuple[int, int]]:
    """(top, left) of each window onto latents of `latent_size` (width, height); one window where these fit into it."""
    width, height = latent_size
    lefts = settings.window_starts(width, "x")
    return [(top, left) for top in settings.window_starts(height, "y") for left in lefts]


def gpu_micro_batch(
    *, peak_of_one: int, peak_of_two: int, features: int, held: int, free: int, total: int, share: float
) -> int:
    """Pairs in one UNet call on a GPU: the largest power of two that fits, from 1 to 64. All sizes are bytes.

    `peak_of_one` and `peak_of_two` are what a step with one and with two pairs takes beside what the process `held`
    before; each further pair takes their difference. `features` is reserved for features beside those of the measured
    steps. The process may use `share` of the `total`, from 0 to 1, and of that only what is `free`.
    """
    available = USABLE_MEMORY * min(free, share * total - held)
    for_more = available - features - peak_of_one
    fitting = 1 + max(int(for_more / max(peak_of_two - peak_of_one, 1)), 0)
    return min(1 << (fitting.bit_length() - 1), LARGEST_MICRO_BATCH)


def cpu_micro_batch(size: tuple[int, int]) -> int:
    """Pairs in one UNet call on a CPU, for images of `size` (width, height) pixels: 8 at 256² and below, 2 at 512².

    Measured by benchmarks/throughput.py: larger calls are no faster and take more memory.
    """
    width, height = size
    return max(1, min(8, 8 * 256**2 // (width * height)))
