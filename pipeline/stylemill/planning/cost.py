"""What a plan will cost: UNet passes, counted from the rows, and memory, estimated from the model's shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from stylemill.errors import JobError, ModelError
from stylemill.job import Job
from stylemill.layer_names import choose
from stylemill.manifest import Row
from stylemill.model_files import ModelFiles
from stylemill.model_fit import read_config, refuse_misfits
from stylemill.settings import cpu_micro_batch

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Scalars that a gradient through the UNet keeps for each latent position and channel of the first block. Measured:
# 790 for Stable Diffusion 1.5 at 512², 960 for the demo model.
_ACTIVATIONS = 900


class AttentionLayer(NamedTuple):
    """A self-attention layer: at level n the latent grid is halved n times; `name` is its module's in the UNet."""

    level: int
    channels: int
    name: str


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on, read from the configuration of a model folder.

    `attention` lists the self-attention layers in running order: down, mid, up.
    """

    attention: tuple[AttentionLayer, ...]
    channels: int  # of the first block
    levels: int
    latent_channels: int
    pixels_per_latent: int
    parameters: int  # of UNet, VAE and text encoder together

    @property
    def grid(self) -> int:
        """Pixels that an image's sides must be multiples of."""
        return int(self.pixels_per_latent * 2 ** (self.levels - 1))

    def choose_layers(self, wanted: Sequence[int | str] | None) -> list[AttentionLayer]:
        """The layers that `model.layers` names; None: the last six. Raises ModelError for one that is not there."""
        return [self.attention[number] for number in choose([layer.name for layer in self.attention], wanted)]

    def feature_elements(self, layers: Sequence[int | str] | None, latent_size: tuple[int, int]) -> int:
        """Scalars in q, k and v of one image at the chosen layers."""
        width, height = latent_size
        return sum(
            3 * (height >> level) * (width >> level) * channels for level, channels, _ in self.choose_layers(layers)
        )


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`. Raises ModelError naming a file or an architecture that cannot be used."""
    unet, vae = _config(folder / "unet"), _config(folder / "vae")
    encoders = [path for path in sorted(folder.glob("text_encoder*")) if path.is_dir()]
    refuse_other_architectures(folder, unet, [_config(path) for path in encoders])
    try:
        channels = list(unet["block_out_channels"])
        return ModelShape(
            attention=tuple(_self_attention(unet)),
            channels=channels[0],
            levels=len(channels),
            latent_channels=int(unet["in_channels"]),
            pixels_per_latent=2 ** (len(vae["block_out_channels"]) - 1),
            parameters=sum(count_parameters(folder / p) for p in model_paths(folder) if p.endswith(".safetensors")),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{folder}: unet/ or vae/config.json is not Stable Diffusion 1.x's: {error!r}") from error


def _config(part: Path) -> dict[str, Any]:
    path = part / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a model's configuration")
    return config


def _self_attention(unet: dict[str, Any]) -> Iterator[AttentionLayer]:
    def layers(level: int, name: str, attentions: int) -> Iterator[AttentionLayer]:
        for attention, transformer in product(range(attentions), range(transformers[level])):
            path = f"{name}.attentions.{attention}.transformer_blocks.{transformer}.attn1"
            yield AttentionLayer(level, channels[level], path)

    channels = unet["block_out_channels"]
    count, deepest = len(channels), len(channels) - 1
    resnets = _each(unet.get("layers_per_block", 2), count)
    transformers = _each(unet.get("transformer_layers_per_block", 1), count)
    for level, block in enumerate(unet["down_block_types"]):
        if "CrossAttn" in block:
            yield from layers(level, f"down_blocks.{level}", resnets[level])
    yield from layers(deepest, "mid_block", 1)
    for place, block in enumerate(unet["up_block_types"]):
        level = deepest - place
        if "CrossAttn" in block:
            yield from layers(level, f"up_blocks.{place}", resnets[level] + 1)


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def check_against_model(job: Job, shape: ModelShape) -> None:
    """Raise JobError for what the job asks and this model has not: an image size off its grid, unknown layers."""
    width, height = job.image.width_height
    grid = shape.grid
    if width % grid or height % grid:
        near = "×".join(str(max(grid, round(side / grid) * grid)) for side in (width, height))
        raise JobError(f"image.size {width}×{height}: sides must be multiples of {grid} for this model, such as {near}")
    chosen, weights = len(shape.choose_layers(job.model.layers)), job.sampling.layer_weights
    if weights is not None and len(weights) != chosen:
        raise JobError(f"sampling.layer_weights has {len(weights)} numbers for the {chosen} layers of model.layers")


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one worker. `activations` is for one pair of a micro-batch, `features` at their most."""

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
    """UNet passes count batch rows, not calls. `memory` is None while the model is not on this machine."""

    contents: int
    styles: int
    denoise: int
    gradient: int
    shared_features: int
    unshared_features: int
    blocks: int  # largest number of blocks that a step of any shard works in
    memory: Memory | None

    @property
    def with_sharing(self) -> int:
        return self.denoise + self.gradient + self.shared_features

    @property
    def without_sharing(self) -> int:
        return self.denoise + self.gradient + self.unshared_features


def count_cost(job: Job, shards: Iterable[Iterable[Row]], shape: ModelShape | None) -> Cost:
    """Stream the rows of all shards once and add up what sampling them takes."""
    sampling = job.sampling
    optimized, injected = sampling.method == "optimization", sampling.method == "kv_injection"
    halves = 2 if sampling.guidance_scale > 1 else 1
    denoising = 0 if optimized else (sampling.steps - sampling.first_step) * halves
    descents = 0 if injected else sampling.iterations
    guiding = sampling.guided_steps if injected or descents else 0
    element = BYTES[assumed_dtype(job)]
    feature_bytes = shape.feature_elements(job.model.layers, _latent_size(job, shape)) * element if shape else 0
    capacity = job.cluster.feature_budget_mb * 2**20 // feature_bytes if feature_bytes else None

    contents: set[int] = set()  # hashes: a set of all paths could be large
    styles: set[int] = set()
    pairs = shared = unshared = most_pairs = most_images = held = most_blocks = 0
    for rows in shards:
        needs = []
        for row in rows:
            style_keys = [style.key for style in row.styles]
            styles.update(map(hash, style_keys))
            if row.content:
                contents.add(hash(row.content.key))
            weight = sampling.content_weight if row.content_weight is None else row.content_weight
            content_keys = (
                [row.content.key] if row.content and weight > 0 else []
            )  # λ = 0: nobody asks for its features
            needs.append((content_keys, style_keys))
        blocks = _blocks(needs, assumed_micro_batch(job), capacity)
        pairs += len(needs)
        shared += sum(blocks)
        unshared += sum(len(own_content) + len(own_styles) for own_content, own_styles in needs)
        most_pairs = max(most_pairs, len(needs))
        most_images = max(most_images, len({key for need in needs for keys in need for key in keys}))
        held = max(held, *blocks)
        most_blocks = max(most_blocks, len(blocks))
    return Cost(
        contents=len(contents),
        styles=len(styles),
        denoise=pairs * denoising,
        gradient=pairs * descents * guiding,
        shared_features=shared * guiding,
        unshared_features=unshared * guiding,
        blocks=most_blocks,
        memory=_memory(job, shape, most_pairs, most_images, held * feature_bytes) if shape else None,
    )


Need = tuple[list[str], list[str]]  # content and style images whose features a pair is pulled towards


def _blocks(needs: list[Need], size: int, capacity: int | None) -> list[int]:
    """Images in each block of a shard: the engine gathers micro-batches of like pairs while their features fit."""
    alike: dict[tuple[int, int], list[set[str]]] = {}
    for content_keys, style_keys in needs:
        alike.setdefault((len(content_keys), len(style_keys)), []).append({*content_keys, *style_keys})
    found: list[int] = []
    images: set[str] = set()
    for group in alike.values():
        for start in range(0, len(group), size):
            batch = set().union(*group[start : start + size])
            if images and capacity is not None and len(images | batch) > capacity:
                found.append(len(images))
                images = set()
            images |= batch
    return [*found, len(images)]


def _memory(job: Job, shape: ModelShape, pairs: int, images: int, features: int) -> Memory:
    width, height = _latent_size(job, shape)
    dtype, positions = assumed_dtype(job), width * height
    moments = 2 if job.sampling.method == "optimization" else 0
    return Memory(
        dtype=dtype,
        weights=shape.parameters * BYTES[dtype],
        features=features,
        state=(pairs * (1 + moments) + images) * shape.latent_channels * positions * 4,  # latents are float32
        activations=_ACTIVATIONS * shape.channels * positions * BYTES[dtype],
        micro_batch=assumed_micro_batch(job),
    )


def assumed_micro_batch(job: Job) -> int:
    """The job's micro-batch; for 'auto' what a worker on a CPU will choose. On a GPU it measures its memory first."""
    given = job.cluster.micro_batch
    return given if isinstance(given, int) else cpu_micro_batch(job.image.width_height)


def assumed_dtype(job: Job) -> str:
    """The job's dtype; for 'auto' what a worker will choose, as far as this machine can tell without torch."""
    if job.model.dtype != "auto":
        return job.model.dtype
    gpus = job.cluster.gpus_per_worker
    on_gpu = Path("/dev/nvidiactl").exists() if gpus == "auto" else gpus > 0
    return "float16" if on_gpu else "float32"


def _latent_size(job: Job, shape: ModelShape) -> tuple[int, int]:
    width, height = job.image.width_height
    return width // shape.pixels_per_latent, height // shape.pixels_per_latent
