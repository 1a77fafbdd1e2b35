"""A small UNet, for tests that compile it. It takes the latents and texts of the untrained model."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel


def small_unet(levels: int = 1) -> UNet2DConditionModel:
    """With three self-attention layers for each level."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,) * levels,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",) * levels,
            norm_num_groups=4,
            cross_attention_dim=32,
            attention_head_dim=2,
        )
    return unet.eval().requires_grad_(False)
