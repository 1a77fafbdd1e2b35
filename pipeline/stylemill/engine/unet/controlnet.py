"""ControlNets: residuals that they add to the UNet while it denoises. Features and gradients are computed without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from stylemill.config.model import ControlNet
from stylemill.errors import ModelError
from stylemill.models.architecture import check_controlnet_architecture


@dataclass(frozen=True, eq=False)
class LoadedControlNet:
    """A frozen ControlNet on the model's device, with the job's settings of it."""

    net: Any
    settings: ControlNet


def load_controlnet(folder: Path, settings: ControlNet, unet: Any) -> LoadedControlNet:
    """Load a ControlNet folder for `unet`, safetensors only. Raises ModelError for one of another architecture."""
    try:
        check_controlnet_architecture(settings.name, ControlNetModel.load_config(folder), unet.config)
        stored = torch.float32 if unet.dtype == torch.float64 else unet.dtype  # no file has float64 weights
        net = ControlNetModel.from_pretrained(folder, torch_dtype=stored, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"controlnet {settings.name!r}: cannot be loaded from {folder}: {error}") from error
    return LoadedControlNet(net.requires_grad_(False).eval().to(unet.device, unet.dtype), settings)


@dataclass(frozen=True)
class Control:
    """The control images of a micro-batch that is denoised at `step` of `steps`."""

    images: list[Tensor]  # (B, 3, H, W) uint8, one for each ControlNet
    step: int
    steps: int

    @classmethod
    def stack(cls, images: Sequence[Sequence[Tensor]], step: int, steps: int) -> Control:
        """From the control images (3, H, W) of each batch row, one for each ControlNet."""
        return cls([torch.stack(one_net) for one_net in zip(*images, strict=True)], step, steps)


@torch.no_grad()
def controlnet_residuals(
    controlnets: Sequence[LoadedControlNet],
    latents: Tensor,
    timestep: Tensor,
    conditions: Mapping[str, Any],
    control: Control,
) -> dict[str, Any]:
    """Keyword arguments for the UNet: the residuals of its skips and its middle block, summed over the ControlNets.

    Only ControlNets that are active at this step count; empty if none is. `latents` are (B, C, h, w); `conditions`
    are the UNet's other keyword arguments.
    """
    down: list[Tensor] = []
    mid: Tensor | None = None
    for loaded, images in zip(controlnets, control.images, strict=True):
        if not loaded.settings.acts(control.step, control.steps):
            continue
        own_down, own_mid = loaded.net(
            latents.to(loaded.net.dtype),
            timestep,
            **conditions,
            controlnet_cond=images.to(loaded.net.dtype) / 255,
            conditioning_scale=loaded.settings.scale,
            return_dict=False,
        )
        down = [a + b for a, b in zip(down, own_down, strict=True)] if down else list(own_down)
        mid = own_mid if mid is None else mid + own_mid
    if mid is None:
        return {}
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
