"""Self-attention layers of the loaded UNet: recording their q, k, v and output, or injecting other keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stylemill.errors import ModelError
from stylemill.models.attention_layers import AttentionLayer, attention_layers


@dataclass(frozen=True, eq=False)
class Layer:
    """A self-attention layer of the loaded UNet: its processor, and what the configuration says of it."""

    processor: SelfAttention
    config: AttentionLayer

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def level(self) -> int:
        return self.config.level


def self_attention_layers(unet: Any) -> list[Layer]:
    """All self-attention layers of a UNet2DConditionModel in running order: down, mid, up.

    Each gets its SelfAttention processor, which stays: a compiled UNet must not change between passes. A UNet that has
    them keeps them. Raises ModelError where the modules of the UNet are not those that its configuration describes.
    """
    described = list(attention_layers(unet.config))
    suffix = ".attn1.processor"
    present = {name.removesuffix(".processor") for name in unet.attn_processors if name.endswith(suffix)}
    if differing := sorted(present.symmetric_difference(layer.name for layer in described)):
        where = "only in its modules" if differing[0] in present else "only in its configuration"
        raise ModelError(
            f"the UNet's self-attention layers are not those of its configuration: {differing[0]} is {where}; "
            "use a UNet2DConditionModel with its own config.json"
        )
    return [Layer(_processor(unet.get_submodule(layer.name)), layer) for layer in described]


def _processor(attention: Any) -> SelfAttention:
    if not isinstance(attention.processor, SelfAttention):
        attention.set_processor(SelfAttention())
    processor: SelfAttention = attention.processor
    return processor


@torch.no_grad()
def ideal_attention(
    q: Tensor, style_k: Tensor, style_v: Tensor, query_scale: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """softmax(Q Ksᵀ / √d) Vs (eq. 3 of arXiv 2502.20235). Q (B, heads, N, d), Ks, Vs (B, heads, Ns, d) -> as Q.

    `query_scale` above 1 makes the attention sharper. `allowed` (B, 1, N, Ns) bool says which style tokens a query may
    attend to. The result is a constant: no gradient flows through it, so no activations are kept for one.
    """
    return scaled_dot_product_attention(q * query_scale, style_k, style_v, attn_mask=allowed)


class Activations(NamedTuple):
    """What one layer computed in one call; each (B, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


class Target(NamedTuple):
    """Features of style and content images at one layer, for the pairs of a micro-batch: the losses' target."""

    style_k: Tensor  # (B, heads, style tokens, head_dim)
    style_v: Tensor
    content_q: Tensor | None  # (B, heads, tokens, head_dim)
    allowed: Tensor | None = None  # (B, 1, tokens, style tokens): the style tokens that each token may attend to

    def repeat(self, count: int) -> Target:
        """The target of a batch that holds all pairs `count` times, as with classifier-free guidance."""
        q = None if self.content_q is None else torch.cat([self.content_q] * count)
        allowed = None if self.allowed is None else torch.cat([self.allowed] * count)
        return Target(torch.cat([self.style_k] * count), torch.cat([self.style_v] * count), q, allowed)


class AllRecordedError(Exception):
    """Ends a pass of the UNet after the last layer that is recorded: what follows is not needed."""


class SelfAttention:
    """diffusers processor of a self-attention layer of a transformer block.

    Computes what diffusers' own does, and what `record_attention` and `inject_attention` ask of it.
    """

    def __init__(self) -> None:
        self.recorded: list[Activations] | None = None  # gets the activations of each call
        self.ends_pass = False  # after it has recorded
        self.target: Target | None = None  # whose K and V, and Q if it has any, replace the layer's own
        self.query_scale = 1.0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, tokens, channels)
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ModelError(
                "a self-attention layer of the UNet was called with encoder_hidden_states or attention_mask; "
                "use a UNet2DConditionModel of Stable Diffusion 1.x, 2.x or SDXL"
            )
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # (B, heads, tokens, head_dim)
        if self.target is None:
            out = scaled_dot_product_attention(q, k, v)
        else:
            target, q = self.target, q if self.target.content_q is None else self.target.content_q
            out = ideal_attention(q, target.style_k, target.style_v, self.query_scale, target.allowed)
        if self.recorded is not None:
            self.recorded.append(Activations(q, k, v, out))
            # A compiled pass needs no end: what its result does not depend on is not computed.
            if self.ends_pass and not torch.compiler.is_compiling():
                raise AllRecordedError
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


@contextmanager
def record_attention(layers: Sequence[Layer], whole_pass: bool = False) -> Iterator[list[Activations]]:
    """Yield a list that gets the Activations of each of `layers`, which are in running order, from one UNet pass.

    The pass ends after the last of them, and with it the block, unless the `whole_pass` is needed.
    """
    recorded: list[Activations] = []
    for layer in layers:
        layer.processor.recorded = recorded
        layer.processor.ends_pass = layer is layers[-1] and not whole_pass
    try:
        yield recorded
    except AllRecordedError:
        pass
    finally:
        for layer in layers:
            layer.processor.recorded, layer.processor.ends_pass = None, False


@contextmanager
def inject_attention(layers: Sequence[Layer], targets: Sequence[Target], query_scale: float) -> Iterator[None]:
    """Let each of `layers` attend to K and V of its target, with the content's Q if the target has one.

    This is KV injection; it lasts until the block ends.
    """
    for layer, target in zip(layers, targets, strict=True):
        layer.processor.target, layer.processor.query_scale = target, query_scale
    try:
        yield
    finally:
        for layer in layers:
            layer.processor.target, layer.processor.query_scale = None, 1.0
