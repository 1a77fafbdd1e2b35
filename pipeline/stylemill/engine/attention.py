"""Chosen self-attention layers: reading q, k, v and outputs while the UNet runs, or giving them others to attend to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stylemill.engine.losses import ideal_attention
from stylemill.errors import ModelError
from stylemill.models.attention_layers import choose


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


def choose_layers(unet: Any, wanted: Sequence[int | str] | None) -> list[Layer]:
    """The layers that features are read from, in running order. Raises ModelError for what names none, or several."""
    layers = self_attention_layers(unet)
    names = {module: name for name, module in unet.named_modules()}
    return [layers[number] for number in choose([names[layer.attention] for layer in layers], wanted)]


@dataclass(frozen=True)
class Target:
    """What one layer is pulled towards, for the pairs of one micro-batch."""

    style_k: Tensor  # (B, heads, style tokens, head_dim)
    style_v: Tensor
    content_q: Tensor | None  # (B, heads, tokens, head_dim)
    allowed: Tensor | None = None  # (B, 1, tokens, style tokens): which of them a token may attend to

    def twice(self) -> Target:
        """For a batch that holds every pair twice, as classifier-free guidance does."""
        q = None if self.content_q is None else torch.cat([self.content_q] * 2)
        allowed = None if self.allowed is None else torch.cat([self.allowed] * 2)
        return Target(torch.cat([self.style_k] * 2), torch.cat([self.style_v] * 2), q, allowed)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> attention output, each (B, heads, tokens, head_dim)


@contextmanager
def reading(layers: Sequence[Layer]) -> Iterator[list[Reading]]:
    """Append a Reading to the list each time one of `layers` runs, until the block ends."""
    readings: list[Reading] = []

    def note(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        readings.append(Reading(q, k, v, scaled_dot_product_attention(q, k, v)))
        return readings[-1].out

    with _installed(layers, [note] * len(layers)):
        yield readings


@contextmanager
def injecting(layers: Sequence[Layer], targets: Sequence[Target], query_scale: float) -> Iterator[None]:
    """Let each of `layers` attend to its target's K and V, with the content's Q where there is one (KV injection)."""

    def turned_to(target: Target) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = q if target.content_q is None else target.content_q
            return ideal_attention(q, target.style_k, target.style_v, query_scale, target.allowed)

        return attend

    with _installed(layers, [turned_to(target) for target in targets]):
        yield


@contextmanager
def _installed(layers: Sequence[Layer], attends: Sequence[Attend]) -> Iterator[None]:
    """Install a processor on each layer, and put the old ones back whatever happens."""
    previous = [layer.attention.processor for layer in layers]
    try:
        for layer, attend in zip(layers, attends, strict=True):
            layer.attention.set_processor(_SelfAttention(attend))
        yield
    finally:
        for layer, processor in zip(layers, previous, strict=True):
            layer.attention.set_processor(processor)


class _SelfAttention:
    """Self-attention of a transformer block as a diffusers processor; how q, k and v are joined is `attend`'s."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

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
        out = self.attend(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]
