"""The floating-point operations of a UNet pass, for the architectures on which they were counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PassCost:
    """TFLOP of one UNet pass of one pair: forward, and backward to the latent."""

    forward: float
    backward: float

    def tflop(self, passes: Mapping[str, float]) -> float:
        """Of passes by kind. One of kind gradient goes forward and backward, every other one forward."""
        return sum(count * (self.forward + self.backward * (kind == "gradient")) for kind, count in passes.items())


# Counted on the architectures: SD 1.5 at 512², SDXL at 1024².
PASS_COST = {"sd15": PassCost(0.803, 0.923), "sdxl": PassCost(6.76, 7.46)}
# What identifies these in the configuration of a UNet, and the side of an image in pixels.
_COUNTED: dict[str, tuple[dict[str, Any], int]] = {
    "sd15": ({"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "layers_per_block": 2}, 512),
    "sdxl": ({"transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048, "layers_per_block": 2}, 1024),
}


def known_pass_cost(unet: Mapping[str, Any], size: int) -> PassCost | None:
    """The cost for images of size × size pixels by the UNet with this configuration; None where none was counted."""
    for family, (config, counted_size) in _COUNTED.items():
        own = {key: list(value) if isinstance(value := unet.get(key), tuple) else value for key in config}
        if own == config and size == counted_size:
            return PASS_COST[family]
    return None
