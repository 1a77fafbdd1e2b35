"""The shape of a model, read from its configuration without torch, and checks of a job against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stylemill.config.job import Job
from stylemill.errors import JobError, ModelError
from stylemill.models.architecture import check_architecture, is_sdxl, pixel_grid, pixels_per_latent, read_config
from stylemill.models.attention_layers import AttentionLayer, attention_layers, select_layers
from stylemill.models.folder import model_paths
from stylemill.models.safetensors_file import count_parameters
from stylemill.models.single_file import CHECKPOINT_UNET
from stylemill.plural import counted

PIXELS_PER_LATENT = 8  # of all models of Stable Diffusion 1.x to XL; assumed while a model is not on this machine
# Scalars in memory in a backward pass through the UNet, for each latent position and channel of the first block.
# Measured on a CPU: 790 for Stable Diffusion 1.5 at 512², 960 for the demo model. SDXL on a CPU was not measured: by a
# count, autograd keeps 1.37 times as much. Measured on a GPU by benchmarks/gpu.py: 368, and 490 for SDXL at 1024².
_ACTIVATIONS = {"cpu": 900, "gpu": 400}
_ACTIVATIONS_OF_SDXL = {"cpu": 1250, "gpu": 530}


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on, read from the configuration of a model folder."""

    attention: tuple[AttentionLayer, ...]  # all self-attention layers in running order: down, mid, up
    channels: int  # of the first block
    levels: int
    latent_channels: int
    pixels_per_latent: int
    parameters: int  # of UNet, VAE and text encoders together
    is_sdxl: bool = False
    unet_parameters: int = 0

    @property
    def grid(self) -> int:
        """The number of pixels that an image's sides must be multiples of."""
        return pixel_grid(self.pixels_per_latent, self.levels)

    def activations(self, on_gpu: bool) -> int:
        """Scalars in memory in a backward pass of one pair, for each latent position and channel of the first block."""
        return (_ACTIVATIONS_OF_SDXL if self.is_sdxl else _ACTIVATIONS)["gpu" if on_gpu else "cpu"]

    def select_layers(self, selection: Sequence[int | str] | None) -> list[AttentionLayer]:
        """The layers that `model.layers` selects; None selects the last six. Raises ModelError for an unknown layer."""
        return select_layers(self.attention, selection)

    def feature_elements(self, layers: Sequence[int | str] | None, latent_size: tuple[int, int]) -> int:
        """Scalars in q, as in k and in v, of an image at the selected layers; `latent_size` is (width, height)."""
        return sum(layer.elements(latent_size) for layer in self.select_layers(layers))


def read_shape(folder: Path, checkpoint: Path | None = None) -> ModelShape:
    """The shape of the model in `folder`, or of a single-file checkpoint whose configuration `folder` has.

    Raises ModelError that names the file, or the architecture, that cannot be used.
    """
    check_architecture(folder)
    unet, vae = read_config(folder / "unet" / "config.json"), read_config(folder / "vae" / "config.json")
    weights = [checkpoint] if checkpoint else [folder / p for p in model_paths(folder) if p.endswith(".safetensors")]
    try:
        channels = list(unet["block_out_channels"])
        return ModelShape(
            attention=tuple(attention_layers(unet)),
            channels=channels[0],
            levels=len(channels),
            latent_channels=int(unet["in_channels"]),
            pixels_per_latent=pixels_per_latent(vae),
            parameters=sum(map(count_parameters, weights)),
            is_sdxl=is_sdxl(unet),
            unet_parameters=_count_unet_parameters(folder, checkpoint),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{folder}: unet/ or vae/config.json is not Stable Diffusion's: {error!r}") from error


def _count_unet_parameters(folder: Path, checkpoint: Path | None) -> int:
    if checkpoint:
        return count_parameters(checkpoint, CHECKPOINT_UNET)
    paths = (path for path in model_paths(folder) if path.startswith("unet/") and path.endswith(".safetensors"))
    return sum(count_parameters(folder / path) for path in paths)


def check_against_model(job: Job, shape: ModelShape) -> None:
    """Raise JobError for image sizes off the model's grid, and for layer weights that do not fit its layers.

    Raises ModelError for unknown layers.
    """
    width, height = job.image.width_height
    grid = shape.grid
    if width % grid or height % grid:
        nearest = "×".join(str(max(grid, round(side / grid) * grid)) for side in (width, height))
        raise JobError(
            f"image.size {width}×{height}: sides must be multiples of {grid} for this model, such as {nearest}"
        )
    style_width, style_height = job.image.style_width_height
    if style_width % grid or style_height % grid:
        raise JobError(
            f"image.style_size {style_width}×{style_height}: sides must be multiples of {grid} for this model"
        )
    _check_windows(job, shape)
    selected, weights = len(shape.select_layers(job.model.layers)), job.sampling.layer_weights
    if weights is not None and len(weights) != selected:
        numbers, layers = counted(len(weights), "number"), counted(selected, "layer")
        raise JobError(f"sampling.layer_weights has {numbers} for the {layers} of model.layers")


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
            f"sampling.window {window}: images of {width}×{height} pixels are sampled in windows of {side}, which"
            f" cannot follow a content; sampling.content_weight {job.sampling.content_weight} must then be 0"
        )
    if job.image.style_size is None:
        raise JobError(
            f"sampling.window {window}: images of {width}×{height} pixels are sampled in windows of {side}, and without"
            f" image.style_size the styles would be enlarged to the whole image; set image.style_size: {side}"
        )
