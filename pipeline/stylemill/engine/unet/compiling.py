"""Changes of a UNet that make its compiled calls fast on CUDA. Its results stay the same, up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor


def prepare_for_compiling(unet: Any) -> None:
    """Change a UNet2DConditionModel in place. Without compiling, it becomes slower."""
    for module in unet.modules():
        if isinstance(module, Upsample2D) and module.interpolate:
            # What torch compiles of an interpolation adds up its gradient pixel by pixel, in a slow kernel.
            module.interpolate = False
            module.register_forward_pre_hook(_enlarge, with_kwargs=True)
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # faster only where nothing converts it in between


def _enlarge(upsample: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Do the interpolation of an Upsample2D before it is called."""
    hidden_states, output_size = (*args, kwargs.get("output_size"))[:2]
    doubled = _double(hidden_states)
    height, width = output_size or doubled.shape[-2:]  # of the level above: double, or one less where that is odd
    return (doubled[..., :height, :width],), {}


def _double(x: Tensor) -> Tensor:
    """Each pixel four times: (B, C, H, W) -> (B, C, 2 H, 2 W), in the memory format channels_last."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
