"""The number of pairs in a shard, where the job leaves it to the plan: the one with which the run is done first.

Large shards share more: each image of a shard is read once a step for all its pairs. Small shards are easier to
distribute: workers that are done wait for the shards of others. So the time of the run is estimated for each size, from
the rows of this manifest in their order, and the best size is chosen. One step of a shard of n pairs takes

    n · pair passes + images(n) · image passes + overhead

in forward passes. Shards go to workers one at a time, so the busiest worker has the most shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stylemill.config.job import Job
from stylemill.manifest import Manifest
from stylemill.planning.cost import Size, count_windows, feature_images
from stylemill.planning.model_shape import ModelShape

MAX_PAIRS_PER_SHARD = 256  # a tile of 16 × 16
GRADIENT = 3  # forward passes that a gradient pass is worth: forward, and backward for twice as much
OVERHEAD = 0.5  # of a shard, as a fraction of one pair: reading, writing, commit, micro-batches that are not full
# Expected loss at the end of a run of several workers, as a fraction of a shard: some are slower, and some die.
TAIL = 0.2
TOLERANCE = 0.01  # between sizes whose times differ less, that with the fewest passes is chosen

# Rows that are read to count images: all of them, or this many ranges, equally spaced.
_RANGES = 8
_RANGE_ROWS = 2048


@dataclass(frozen=True)
class _Uses:
    """The uses of images by consecutive output rows: of each, its row, and the row of the use before (-1: none)."""

    rows: range
    row: NDArray[np.int64]
    before: NDArray[np.int64]

    def count(self, size: int) -> tuple[int, int]:
        """Images of all whole shards of `size` pairs among these rows, and the number of these shards."""
        first, last = -(-self.rows.start // size), self.rows.stop // size
        counted = (self.row >= first * size) & (self.row < last * size)
        new = self.before < self.row // size * size  # the image is new in the shard of the row
        return int(np.count_nonzero(counted & new)), last - first


def choose_pairs_per_shard(job: Job, manifest: Manifest, shape: ModelShape | None) -> int:
    """The number of pairs in a shard for which the run is estimated to be done first, 256 at most.

    Reads the manifest, or a sample of it where it is large. Without `shape`, latents are assumed to be those of Stable
    Diffusion. Raises ManifestError for a bad row.
    """
    passes = job.sampling.passes
    pair = count_windows(job, shape) * (passes.denoise + GRADIENT * passes.gradient)
    return fastest_size(manifest.num_output_rows, expected_workers(job), pair, passes.features, _images(job, manifest))


def fastest_size(rows: int, workers: int, pair: float, image: float, images: Sequence[float]) -> int:
    """The number of pairs in a shard for which a run of `rows` pairs is estimated to be done first.

    `pair` and `image` are passes of a pair and of an image, and `images[n]` is the mean number of images of n pairs, up
    to the largest size allowed.
    """

    def work(pairs: int) -> float:
        return (pairs + OVERHEAD) * pair + images[pairs] * image if pairs else 0

    tail = TAIL if workers > 1 else 0.0

    def time(size: int) -> float:
        shards, rest = divmod(rows, size)
        rounds, others = divmod(shards, workers)
        return (rounds + tail) * work(size) + (work(size) if others else work(rest))

    def passes(size: int) -> float:
        shards, rest = divmod(rows, size)
        return shards * images[size] + images[rest]

    times = {size: time(size) for size in range(1, len(images))}
    limit = min(times.values()) * (1 + TOLERANCE)
    # Of equal passes, the fewest shards, and of these the evenest.
    return min(
        (size for size in times if times[size] <= limit),
        key=lambda size: (round(passes(size), 6), -(-rows // size), size),
    )


def expected_workers(job: Job) -> int:
    """The job's number of workers; for "auto" the one of this machine, with a worker for each GPU or for some CPUs."""
    cluster = job.cluster
    if cluster.workers != "auto":
        return cluster.workers
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    each = 1.0 if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    if gpus and each:
        return gpus * (10_000 // round(10_000 * each)) if each < 1 else max(1, gpus // int(each))
    return max(1, (os.cpu_count() or 1) // cluster.threads)


def _images(job: Job, manifest: Manifest) -> list[float]:
    """By number of pairs, from 0 to the largest size of a shard: the mean number of images of a shard."""
    rows = manifest.num_output_rows
    ranges = [_uses(job, manifest, some) for some in _ranges(rows)]
    images = [0.0]
    for size in range(1, min(MAX_PAIRS_PER_SHARD, rows) + 1):
        counts, shards = zip(*(uses.count(size) for uses in ranges), strict=True)
        images.append(sum(counts) / sum(shards))
    return images


def _ranges(rows: int) -> Iterator[range]:
    if rows <= _RANGES * _RANGE_ROWS:
        yield range(rows)
        return
    for number in range(_RANGES):
        start = number * (rows - _RANGE_ROWS) // (_RANGES - 1)
        yield range(start, start + _RANGE_ROWS)


def _uses(job: Job, manifest: Manifest, rows: range) -> _Uses:
    latest: dict[tuple[str, Size], int] = {}  # the row of the latest use of each image
    uses = []
    for row in manifest.output_rows(rows.start, rows.stop):
        for image in set(feature_images(row, job)):
            uses.append((row.output_row, latest.get(image, -1)))
            latest[image] = row.output_row
    row_numbers, before = np.array(uses, dtype=np.int64).reshape(-1, 2).T
    return _Uses(rows, row_numbers, before)
