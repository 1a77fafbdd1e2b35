"""What a plan will cost: UNet passes, counted from the rows, and memory, estimated from the model's shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stylemill.config.job import Job
from stylemill.config.sampling import cpu_micro_batch
from stylemill.errors import JobError, ModelError
from stylemill.manifest import Row
from stylemill.models.architecture import is_sdxl, read_config, refuse_misfits
from stylemill.models.attention_layers import choose
from stylemill.models.hub import model_paths
from stylemill.models.safetensors_file import count_parameters

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
PIXELS_PER_LATENT = 8  # of a model that is not on this machine yet; so it is for all of Stable Diffusion 1.x to XL
# Scalars that a gradient through the UNet keeps for each latent position and channel of the first block. Measured:
# 790 for Stable Diffusion 1.5 at 512², 960 for the demo model.
_ACTIVATIONS = 900
_ACTIVATIONS_OF_SDXL = 1250  # never measured: counted, autograd keeps 1.37 times as much as in Stable Diffusion 1.5


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
    parameters: int  # of UNet, VAE and text encoders together
    activations: int = _ACTIVATIONS

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


def read_shape(folder: Path, checkpoint: Path | None = None) -> ModelShape:
    """The shape of the model in `folder`, or of a single-file checkpoint whose configuration is there.

    Raises ModelError naming a file or an architecture that cannot be used.
    """
    refuse_misfits(folder)
    unet, vae = read_config(folder / "unet" / "config.json"), read_config(folder / "vae" / "config.json")
    weights = [checkpoint] if checkpoint else [folder / p for p in model_paths(folder) if p.endswith(".safetensors")]
    try:
        channels = list(unet["block_out_channels"])
        return ModelShape(
            attention=tuple(_self_attention(unet)),
            channels=channels[0],
            levels=len(channels),
            latent_channels=int(unet["in_channels"]),
            pixels_per_latent=2 ** (len(vae["block_out_channels"]) - 1),
            parameters=sum(map(count_parameters, weights)),
            activations=_ACTIVATIONS_OF_SDXL if is_sdxl(unet) else _ACTIVATIONS,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{folder}: unet/ or vae/config.json is not Stable Diffusion's: {error!r}") from error


def _self_attention(unet: dict[str, Any]) -> Iterator[AttentionLayer]:
    def layers(level: int, name: str, depths: Any, attentions: int) -> Iterator[AttentionLayer]:
        for attention, depth in enumerate(_each(depths, attentions)):
            for transformer in range(depth):
                path = f"{name}.attentions.{attention}.transformer_blocks.{transformer}.attn1"
                yield AttentionLayer(level, channels[level], path)

    channels = unet["block_out_channels"]
    count, deepest = len(channels), len(channels) - 1
    resnets = _each(unet.get("layers_per_block", 2), count)
    transformers = _each(unet.get("transformer_layers_per_block", 1), count)
    on_the_way_up = unet.get("reverse_transformer_layers_per_block") or transformers[::-1]  # pruned SDXLs differ there
    for level, block in enumerate(unet["down_block_types"]):
        if "CrossAttn" in block:
            yield from layers(level, f"down_blocks.{level}", transformers[level], resnets[level])
    if "CrossAttn" in (unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""):
        yield from layers(deepest, "mid_block", transformers[deepest], 1)
    for place, block in enumerate(unet["up_block_types"]):
        level = deepest - place
        if "CrossAttn" in block:
            yield from layers(level, f"up_blocks.{place}", on_the_way_up[place], resnets[level] + 1)


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def check_against_model(job: Job, shape: ModelShape) -> None:
    """Raise JobError for what the job asks and this model has not: an image size off its grid, unknown layers."""
    width, height = job.image.width_height
    grid = shape.grid
    if width % grid or height % grid:
        near = "×".join(str(max(grid, round(side / grid) * grid)) for side in (width, height))
        raise JobError(f"image.size {width}×{height}: sides must be multiples of {grid} for this model, such as {near}")
    style_width, style_height = job.image.style_width_height
    if style_width % grid or style_height % grid:
        raise JobError(
            f"image.style_size {style_width}×{style_height}: sides must be multiples of {grid} for this model"
        )
    _check_windows(job, shape)
    chosen, weights = len(shape.choose_layers(job.model.layers)), job.sampling.layer_weights
    if weights is not None and len(weights) != chosen:
        raise JobError(f"sampling.layer_weights has {len(weights)} numbers for the {chosen} layers of model.layers")


def _check_windows(job: Job, shape: ModelShape) -> None:
    window, (width, height) = job.sampling.window, job.image.width_height
    if window is None:
        return
    side = window * shape.pixels_per_latent
    if side % shape.grid:
        raise JobError(
            f"sampling.window {window}: must be a multiple of {shape.grid // shape.pixels_per_latent} for this model"
        )
    if max(width, height) <= side:
        return
    if job.sampling.content_weight > 0:
        raise JobError(
            f"sampling.window {window} makes {width}×{height} pixels in windows of {side}, and these follow no content;"
            f" sampling.content_weight {job.sampling.content_weight} must be 0 then"
        )
    if job.image.style_size is None:
        raise JobError(
            f"sampling.window {window} makes {width}×{height} pixels in windows of {side}, and without image.style_size"
            f" styles are enlarged to the whole; set image.style_size: {side}"
        )


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
    content_size, style_size = job.image.width_height, job.image.style_width_height
    element = BYTES[assumed_dtype(job)]
    feature_bytes = {
        size: shape.feature_elements(job.model.layers, _latents(size, shape)) * element if shape else 0
        for size in (content_size, style_size)
    }
    budget, windows = job.cluster.feature_budget_mb * 2**20, _windows(job, shape)

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
            # λ = 0: nobody asks for its features
            contents_read = [(row.content.key, content_size)] if row.content and weight > 0 else []
            needs.append((contents_read, [(key, style_size) for key in style_keys], row.content_mask is not None))
        blocks = _blocks(needs, assumed_micro_batch(job), windows, feature_bytes, budget)
        pairs += len(needs)
        shared += sum(map(len, blocks))
        unshared += sum(len(own_content) + len(own_styles) for own_content, own_styles, _ in needs)
        most_pairs = max(most_pairs, len(needs))
        most_images = max(most_images, len({key for need in needs for keys in need[:2] for key in keys}))
        held = max(held, *(sum(feature_bytes[size] for _, size in block) for block in blocks))
        most_blocks = max(most_blocks, len(blocks))
    return Cost(
        contents=len(contents),
        styles=len(styles),
        denoise=pairs * windows * denoising,
        gradient=pairs * windows * descents * guiding,
        shared_features=shared * guiding,
        unshared_features=unshared * guiding,
        blocks=most_blocks,
        memory=_memory(job, shape, most_pairs, most_images, held) if shape else None,
    )


Size = tuple[int, int]  # width and height in pixels
Fitted = tuple[str, Size]  # an image by its key, at the size that it is fitted to
# Content and style images whose features a pair is pulled towards, and whether it has masks.
Need = tuple[list[Fitted], list[Fitted], bool]


def _blocks(
    needs: list[Need], size: int, windows: int, feature_bytes: Mapping[Size, int], budget: int
) -> list[set[Fitted]]:
    """The images of each block of a shard: the engine gathers micro-batches of like pairs while their features fit.

    A pair takes as many slots as it has windows.
    """
    alike: dict[tuple[int, int, bool], list[set[Fitted]]] = {}
    for content_keys, style_keys, masked in needs:
        alike.setdefault((len(content_keys), len(style_keys), masked), []).append({*content_keys, *style_keys})
    found: list[set[Fitted]] = []
    images: set[Fitted] = set()
    for group in alike.values():
        for start in range(0, len(group) * windows, size):
            batch = set().union(*group[start // windows : (start + size - 1) // windows + 1])
            if images and sum(feature_bytes[fitted] for _, fitted in images | batch) > budget:
                found.append(images)
                images = set()
            images = images | batch
    return [*found, images]


def _windows(job: Job, shape: ModelShape | None) -> int:
    """Windows that an output of the job's size is made in."""
    width, height = _latents(job.image.width_height, shape)
    return len(job.sampling.window_starts(width, "x")) * len(job.sampling.window_starts(height, "y"))


def _memory(job: Job, shape: ModelShape, pairs: int, images: int, features: int) -> Memory:
    sizes = (job.image.width_height, job.image.style_width_height, job.slot_size(shape.pixels_per_latent))
    positions, style_positions, seen = (width * height for width, height in (_latents(size, shape) for size in sizes))
    dtype, windows = assumed_dtype(job), _windows(job, shape)
    in_windows = 2 * windows * seen if windows > 1 else 0  # a step cuts them all, and joins what it made of them
    moments = 2 if job.sampling.method == "optimization" else 0
    return Memory(
        dtype=dtype,
        weights=shape.parameters * BYTES[dtype],
        features=features,
        state=4  # latents are float32
        * shape.latent_channels
        * (pairs * (positions * (1 + moments) + in_windows) + images * max(positions, style_positions)),
        activations=shape.activations * shape.channels * seen * BYTES[dtype],
        micro_batch=assumed_micro_batch(job),
    )


def assumed_micro_batch(job: Job) -> int:
    """The job's micro-batch; for 'auto' what a worker on a CPU will choose. On a GPU it measures its memory first."""
    given = job.cluster.micro_batch
    return given if isinstance(given, int) else cpu_micro_batch(job.slot_size(PIXELS_PER_LATENT))


def assumed_dtype(job: Job) -> str:
    """The job's dtype; for 'auto' what a worker will choose, as far as this machine can tell without torch."""
    if job.model.dtype != "auto":
        return job.model.dtype
    gpus = job.cluster.gpus_per_worker
    on_gpu = Path("/dev/nvidiactl").exists() if gpus == "auto" else gpus > 0
    return "float16" if on_gpu else "float32"


def _latents(size: Size, shape: ModelShape | None) -> tuple[int, int]:
    factor = shape.pixels_per_latent if shape else PIXELS_PER_LATENT
    return size[0] // factor, size[1] // factor
