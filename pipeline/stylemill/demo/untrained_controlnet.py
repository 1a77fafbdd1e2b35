"""A small untrained ControlNet for the demo model, so that control images can be tried without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from stylemill.demo.untrained import ModelFamily, demo_unet, draw_weights, write_once

_GAIN = 0.3  # of what it adds to the UNet: enough to be seen, too little to drown the picture


def write_demo_controlnet(folder: str | Path, seed: int = 0, kind: ModelFamily = "sd") -> Path:
    """Write the ControlNet of `seed` that fits the demo model of `kind` to `folder` and return it.

    Its output convolutions are not zero, as those of a ControlNet are before training: it acts. A complete one is left
    as it is. Raises ModelError when the folder holds anything else.
    """

    def write(unfinished: Path) -> None:
        with torch.random.fork_rng(devices=[]):  # the caller's stream must not notice
            unet = demo_unet(kind)
            net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
        draw_weights(net, "controlnet", seed)
        with torch.no_grad():
            for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block):
                conv.weight *= _GAIN
        net.save_pretrained(unfinished, safe_serialization=True)

    return write_once(folder, seed, f"controlnet of {kind}", write)
