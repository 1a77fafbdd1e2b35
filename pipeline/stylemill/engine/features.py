"""Reading q, k, v and attention outputs of chosen self-attention layers while the UNet runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stylemill.errors import ModelError

DEFAULT_LAYER_COUNT = 6  # the last six: 10–15 of SD 1.x, 64–69 of SDXL


@dataclass(frozen=True)
class Reading:
    """What one layer computed in one call; each (B, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """A self-attention layer and its level: how often the latent grid is halved where it runs."""

    attention: Any
    level: int

    def feature_bytes(self, latent_height: int, latent_width: int) -> int:
        """Size of q, k and v of one image."""
        tokens = (latent_height >> self.level) * (latent_width >> self.level)
        weight = self.attention.to_q.weight
        return int(3 * tokens * self.attention.inner_dim * weight.element_size())


def self_attention_layers(unet: Any) -> list[Layer]:
    """All self-attention layers in the order in which they run: down, mid, up.

    `named_modules()` would list the mid block last.
    """
    deepest = len(unet.down_blocks) - 1
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    levels = [*range(deepest + 1), deepest, *range(deepest, -1, -1)]
    return [
        Layer(module, level)
        for block, level in zip(blocks, levels, strict=True)
        if block is not None
        for name, module in block.named_modules()
        if isinstance(module, Attention) and name.endswith("attn1")
    ]


def choose_layers(unet: Any, numbers: Sequence[int] | None) -> list[Layer]:
    """The layers that features are read from; by default the last six. Raises ModelError for a number that is none."""
    layers = self_attention_layers(unet)
    if numbers is None:
        return layers[-DEFAULT_LAYER_COUNT:]
    if not numbers or min(numbers) < 0 or max(numbers) >= len(layers) or len(set(numbers)) < len(numbers):
        raise ModelError(f"model.layers {list(numbers)}: choose distinct ones of 0 to {len(layers) - 1}")
    return [layers[number] for number in sorted(numbers)]


@contextmanager
def reading(layers: Sequence[Layer]) -> Iterator[list[Reading]]:
    """Install processors on `layers` that append a Reading each time one runs; put the old ones back at the end."""
    readings: list[Reading] = []
    attentions = [layer.attention for layer in layers]
    previous = [attention.processor for attention in attentions]
    try:
        for attention in attentions:
            attention.set_processor(_ReadingProcessor(readings))
        yield readings
    finally:
        for attention, processor in zip(attentions, previous, strict=True):
            attention.set_processor(processor)


class _ReadingProcessor:
    """Plain self-attention of a transformer block that notes what it computes."""

    def __init__(self, readings: list[Reading]) -> None:
        self.readings = readings

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, tokens, channels)
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ModelError("a self-attention layer was called with other tokens or a mask; this UNet does not fit")
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # (B, heads, tokens, head_dim)
        out = scaled_dot_product_attention(q, k, v)
        self.readings.append(Reading(q, k, v, out))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]
