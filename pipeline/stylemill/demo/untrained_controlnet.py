"""A small untrained ControlNet for the untrained models, to try control images without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from stylemill.demo.untrained import ModelFamily, demo_unet, write_once
from stylemill.demo.untrained_weights import draw_weights

_GAIN = 0.3  # of its residuals: their effect is visible, and the image stays recognisable


def write_demo_controlnet(folder: str | Path, seed: int = 0, kind: ModelFamily = "sd") -> Path:
    """Write the ControlNet of `seed` for the untrained model of `kind` to `folder` and return that.

    Its output convolutions are not zero, as they would be before training, so it has an effect. A folder with this
    complete ControlNet is not changed. Raises ModelError if the folder has other content.
    """

    def write(unfinished: Path) -> None:
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
            unet = demo_unet(kind)
            net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
        draw_weights(net, "controlnet", seed)
        with torch.no_grad():
            for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block):
                conv.weight *= _GAIN
        net.save_pretrained(unfinished, safe_serialization=True)

    return write_once(folder, seed, f"controlnet of {kind}", write)
