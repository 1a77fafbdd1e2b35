"""The cost of a plan: UNet passes of sampling, counted from the rows, and memory, estimated from the model's shape.

Rows are batched by the engine's own functions, so the passes are those that the engine makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stylemill.config.job import Job
from stylemill.engine.batching import (
    PairKind,
    blocks,
    cpu_micro_batch,
    feature_parts,
    micro_batches,
    uses_content,
    window_corners,
)
from stylemill.manifest import Row
from stylemill.planning.model_shape import PIXELS_PER_LATENT, ModelShape

Size = tuple[int, int]  # width and height in pixels
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one worker.

    `activations` is for one pair of a micro-batch; `features` is the largest size of a block's features.
    """

    dtype: str
    weights: int
    features: int
    state: int
    activations: int
    micro_batch: int

    @property
    def total(self) -> int:
        return self.weights + self.features + self.state + self.micro_batch * self.activations


@dataclass(frozen=True)
class Cost:
    """Counts for a run. A UNet pass is one row of a batch; those of `Engine.distances`, after sampling, are in no sum.

    `memory` is None while the model is not on this machine.
    """

    contents: int
    styles: int
    denoise: int
    gradient: int
    shared_features: int
    unshared_features: int
    pairs: int  # output rows
    encoded: int  # distinct images of each shard
    distance: int  # of `Engine.distances`, with two passes for each pair: a little more than it makes
    blocks: int  # the largest number of blocks in a step of any shard
    memory: Memory | None

    @property
    def with_sharing(self) -> int:
        return self.denoise + self.gradient + self.shared_features

    @property
    def without_sharing(self) -> int:
        return self.denoise + self.gradient + self.unshared_features


def count_cost(job: Job, shards: Iterable[Iterable[Row]], shape: ModelShape | None) -> Cost:
    """Count the UNet passes of all shards and estimate the memory of a worker. The rows are read once, as a stream.

    Without `shape`, every shard counts as one block.
    """
    counter = _ShardCounter(job, shape)
    for rows in shards:
        counter.add(rows)
    passes = job.sampling.passes
    return Cost(
        contents=len(counter.contents),
        styles=len(counter.styles),
        denoise=counter.pairs * counter.windows * passes.denoise,
        gradient=counter.pairs * counter.windows * passes.gradient,
        shared_features=counter.shared * passes.features,
        unshared_features=counter.unshared * passes.features,
        pairs=counter.pairs,
        encoded=counter.encoded,
        distance=2 * counter.pairs * counter.windows + counter.shared,
        blocks=counter.most_blocks,
        memory=_memory(job, shape, counter) if shape else None,
    )


def count_windows(job: Job, shape: ModelShape | None) -> int:
    """The number of windows that a pair is sampled in."""
    return len(window_corners(_latent_size(job.image.width_height, shape), job.sampling))


def feature_images(row: Row, job: Job) -> list[tuple[str, Size]]:
    """Key and size of each image whose features a pair needs: its styles, and its content if its loss counts."""
    images = [(style.key, job.image.style_width_height) for style in row.styles]
    weight = job.sampling.content_weight if row.content_weight is None else row.content_weight
    if row.content and uses_content(True, weight):
        images.append((row.content.key, job.image.width_height))
    return images


class _ShardCounter:
    """Batches the pairs of one shard after another as the engine does, and counts over all of them."""

    def __init__(self, job: Job, shape: ModelShape | None) -> None:
        self.pairs = 0
        self.shared = 0  # images of all blocks
        self.unshared = 0  # images of all pairs
        self.encoded = 0  # images of all shards
        self.most_pairs = 0  # of a shard, as all of these
        self.most_images = 0
        self.most_blocks = 0
        self.most_feature_bytes = 0  # of a block
        self.contents: set[int] = set()  # hashes of image keys: the keys themselves could take much memory
        self.styles: set[int] = set()
        self.windows = count_windows(job, shape)
        self._job = job
        self._size, self._style_size = job.image.width_height, job.image.style_width_height
        self._micro_batch = assumed_micro_batch(job)
        self._budget = job.cluster.feature_budget_mb * 2**20
        element = BYTES[assumed_dtype(job)]
        self._part_bytes = {  # of Q, K or V of an image
            size: shape.feature_elements(job.model.layers, _latent_size(size, shape)) * element if shape else 0
            for size in (self._size, self._style_size)
        }

    def add(self, rows: Iterable[Row]) -> None:
        """Count the rows of one shard."""
        numbers: dict[tuple[str, Size], int] = {}  # of the shard's images whose features are needed, by key and size
        kinds: list[PairKind] = []
        images_of: list[set[int]] = []
        styles: set[tuple[str, Size]] = set()
        contents: set[tuple[str, Size]] = set()
        encoded: set[str] = set()
        pairs = 0
        for row in rows:
            pairs += 1
            self.styles.update(hash(style.key) for style in row.styles)
            encoded.update(style.key for style in row.styles)
            if row.content:
                self.contents.add(hash(row.content.key))
                encoded.add(row.content.key)
            needed = feature_images(row, self._job)
            styles |= set(needed[: len(row.styles)])
            contents |= set(needed[len(row.styles) :])
            kind = PairKind(
                self._size,
                (self._style_size,) * len(row.styles),
                len(needed) > len(row.styles),
                row.content_mask is not None,
            )
            self.unshared += len(needed)
            kinds += [kind] * self.windows  # the sampler treats each window as a pair
            images_of += [{numbers.setdefault(image, len(numbers)) for image in needed}] * self.windows
        feature_bytes = [
            self._part_bytes[image[1]] * feature_parts(image in styles, image in contents) for image in numbers
        ]
        shard_blocks = blocks(micro_batches(kinds, self._micro_batch), images_of, feature_bytes, self._budget)
        self.pairs += pairs
        self.encoded += len(encoded)
        self.most_pairs = max(self.most_pairs, pairs)
        self.most_images = max(self.most_images, len(numbers))
        self.most_blocks = max(self.most_blocks, len(shard_blocks))
        for block in shard_blocks:
            self.shared += len(block.images)
            size = sum(feature_bytes[image] for image in block.images)
            self.most_feature_bytes = max(self.most_feature_bytes, size)


def _memory(job: Job, shape: ModelShape, counter: _ShardCounter) -> Memory:
    sizes = (job.image.width_height, job.image.style_width_height, job.unet_call_size(shape.pixels_per_latent))
    latent_sizes = [_latent_size(size, shape) for size in sizes]
    positions, style_positions, slot_positions = (width * height for width, height in latent_sizes)
    dtype, windows = assumed_dtype(job), counter.windows
    in_windows = 2 * windows * slot_positions if windows > 1 else 0  # before and after the step
    kept = 2 if job.sampling.method == "optimization" else int(job.sampling.reuse_prediction)  # moments, or ε
    latents = counter.most_pairs * (positions * (1 + kept) + in_windows)
    image_latents = counter.most_images * max(positions, style_positions)
    return Memory(
        dtype=dtype,
        weights=shape.parameters * BYTES[dtype],
        features=counter.most_feature_bytes,
        state=4 * shape.latent_channels * (latents + image_latents),  # in float32
        activations=shape.activations(assumes_gpu(job)) * shape.channels * slot_positions * BYTES[dtype],
        micro_batch=assumed_micro_batch(job),
    )


def assumed_micro_batch(job: Job) -> int:
    """The job's micro-batch; for "auto" the one of a CPU worker. A GPU worker measures its memory when it starts."""
    micro_batch = job.cluster.micro_batch
    return micro_batch if isinstance(micro_batch, int) else cpu_micro_batch(job.unet_call_size(PIXELS_PER_LATENT))


def assumed_dtype(job: Job) -> str:
    """The job's dtype; for "auto" the one that a worker on this machine would choose, determined without torch."""
    if job.model.dtype != "auto":
        return job.model.dtype
    return "float16" if assumes_gpu(job) else "float32"


def assumes_gpu(job: Job) -> bool:
    """Whether the job's workers use a GPU; for "auto" whether this machine has one, determined without torch."""
    gpus = job.cluster.gpus_per_worker
    return Path("/dev/nvidiactl").exists() if gpus == "auto" else gpus > 0


def _latent_size(size: Size, shape: ModelShape | None) -> Size:
    pixels_per_latent = shape.pixels_per_latent if shape else PIXELS_PER_LATENT
    return size[0] // pixels_per_latent, size[1] // pixels_per_latent
