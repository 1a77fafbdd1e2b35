"""ControlNets: what they add to the UNet while it denoises. Features and gradients are taken without them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from stylemill.config.model import ControlNet
from stylemill.engine.inputs import Pair
from stylemill.engine.state import PairInputs, ShardInputs
from stylemill.errors import ModelError
from stylemill.images.input_image import InputImage
from stylemill.models.architecture import check_controlnet_architecture


@dataclass(frozen=True, eq=False)
class LoadedControl:
    """A frozen ControlNet on the model's device, and how the job asks it to act."""

    net: Any
    settings: ControlNet


def load_control(folder: Path, settings: ControlNet, unet: Any) -> LoadedControl:
    """Load a ControlNet folder for `unet`, safetensors only. Raises ModelError for one of another architecture."""
    try:
        check_controlnet_architecture(settings.name, ControlNetModel.load_config(folder), unet.config)
        stored = torch.float32 if unet.dtype == torch.float64 else unet.dtype  # float64 exists only in memory
        net = ControlNetModel.from_pretrained(folder, torch_dtype=stored, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"controlnet {settings.name!r}: cannot be loaded from {folder}: {error}") from error
    return LoadedControl(net.requires_grad_(False).eval().to(unet.device, unet.dtype), settings)


def control_problem(pair: Pair, controls: Sequence[LoadedControl]) -> str | None:
    """Why a pair cannot be denoised with these ControlNets; None where it can."""
    if not controls:
        return None  # control images without a ControlNet: the same manifest may be run without
    if len(pair.controls) != len(controls):
        have, needs = len(pair.controls) or "none", f"{len(controls)} control image{'s' * (len(controls) > 1)}"
        return f"model.controlnet needs {needs} (column 'control', one for each), and this pair has {have}"
    if any(image.pixels is None for image in pair.controls):
        return "a control image of this pair could not be read"
    return None


def control_images(pair: Pair, count: int) -> list[InputImage]:
    """The pair's control image for each of `count` ControlNets; blank, in its slot, where there is none to be had."""
    usable = pair.controls if len(pair.controls) == count else ()
    blank = InputImage(f"no control of {pair.size}", None)
    return [*usable] or [blank] * count


Sized = tuple[str, tuple[int, int]]  # a control image by its name, of a size in pixels


def unique_controls(images: Iterable[tuple[tuple[int, int], InputImage]]) -> dict[Sized, InputImage]:
    """Each control image of a shard once. Raises ValueError where two different ones have one name."""
    found: dict[Sized, InputImage] = {}
    for size, image in images:
        if found.setdefault((image.name, size), image).digest != image.digest:
            raise ValueError(f"two different control images of a shard have the name {image.name!r}")
    return found


def to_tensor(image: InputImage, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8; zeros for an image that could not be read."""
    if image.pixels is None:
        return torch.zeros(3, size[1], size[0], dtype=torch.uint8)
    return torch.from_numpy(image.pixels.copy()).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Control:
    """The control images of a micro-batch that is denoised at a step of so many."""

    images: list[Tensor]  # (B, 3, H, W) uint8, one for each ControlNet
    step: int
    steps: int

    @classmethod
    def of(cls, inputs: ShardInputs, pairs: Sequence[PairInputs], step: int, steps: int, copies: int) -> Control:
        """Those of `pairs`, as often as the batch holds each pair."""
        nets = zip(*(pair.controls for pair in pairs), strict=True)
        return cls([torch.stack([inputs.controls[image] for image in own] * copies) for own in nets], step, steps)


@torch.no_grad()
def residuals(
    nets: Sequence[LoadedControl], latents: Tensor, timestep: int, told: dict[str, Any], control: Control
) -> dict[str, Any]:
    """What the ControlNets that act at this step add to the UNet's skips and middle, summed, as its arguments.

    `latents` (B, C, h, w); `told` is what the UNet is told.
    """
    down: list[Tensor] = []
    mid: Tensor | None = None
    for loaded, images in zip(nets, control.images, strict=True):
        if not loaded.settings.acts(control.step, control.steps):
            continue
        own_down, own_mid = loaded.net(
            latents.to(loaded.net.dtype),
            timestep,
            **told,
            controlnet_cond=images.to(loaded.net.dtype) / 255,
            conditioning_scale=loaded.settings.scale,
            return_dict=False,
        )
        down = [a + b for a, b in zip(down, own_down, strict=True)] if down else list(own_down)
        mid = own_mid if mid is None else mid + own_mid
    if mid is None:
        return {}
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
