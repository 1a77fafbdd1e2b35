"""Self-attention layers of the loaded UNet: recording their q, k, v and output, or injecting other keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stylemill.errors import ModelError
from stylemill.models.attention_layers import AttentionLayer, attention_layers


@dataclass(frozen=True, eq=False)
class Layer:
    """A self-attention layer of the loaded UNet: diffusers' Attention module, and what the configuration says of it."""

    attention: Any
    config: AttentionLayer

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def level(self) -> int:
        return self.config.level

    def feature_bytes(self, latent_height: int, latent_width: int) -> int:
        """Size of q, k and v of one image, in bytes."""
        element_size: int = self.attention.to_q.weight.element_size()
        return self.config.feature_elements((latent_width, latent_height)) * element_size


def self_attention_layers(unet: Any) -> list[Layer]:
    """All self-attention layers of a UNet2DConditionModel in running order: down, mid, up.

    Raises ModelError where the modules of the UNet are not those that its configuration describes.
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
    return [Layer(unet.get_submodule(layer.name), layer) for layer in described]


@torch.no_grad()
def ideal_attention(
    q: Tensor, style_k: Tensor, style_v: Tensor, query_scale: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """softmax(Q Ksᵀ / √d) Vs (eq. 3 of arXiv 2502.20235). Q (B, heads, N, d), Ks, Vs (B, heads, Ns, d) -> as Q.

    `query_scale` above 1 makes the attention sharper. `allowed` (B, 1, N, Ns) bool says which style tokens a query may
    attend to. The result is a constant: no gradient flows through it, so no activations are kept for one.
    """
    return scaled_dot_product_attention(q * query_scale, style_k, style_v, attn_mask=allowed)


@dataclass(frozen=True)
class Activations:
    """What one layer computed in one call; each (B, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


@dataclass(frozen=True)
class Target:
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


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> attention output, each (B, heads, tokens, head_dim)


@contextmanager
def record_attention(layers: Sequence[Layer]) -> Iterator[list[Activations]]:
    """Yield a list that gets the Activations of each of `layers` whenever it runs, until the block ends."""
    recorded: list[Activations] = []

    def attend_and_record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, k, v)
        recorded.append(Activations(q, k, v, out))
        return out

    with _attention_replaced(layers, [attend_and_record] * len(layers)):
        yield recorded


@contextmanager
def inject_attention(layers: Sequence[Layer], targets: Sequence[Target], query_scale: float) -> Iterator[None]:
    """Let each of `layers` attend to K and V of its target, with the content's Q if the target has one.

    This is KV injection; it lasts until the block ends.
    """

    def attend_to(target: Target) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = q if target.content_q is None else target.content_q
            return ideal_attention(q, target.style_k, target.style_v, query_scale, target.allowed)

        return attend

    with _attention_replaced(layers, [attend_to(target) for target in targets]):
        yield


@contextmanager
def _attention_replaced(layers: Sequence[Layer], functions: Sequence[Attend]) -> Iterator[None]:
    """Set a processor with its own attention function on each layer; restore the previous ones, also after an error."""
    previous = [layer.attention.processor for layer in layers]
    try:
        for layer, function in zip(layers, functions, strict=True):
            layer.attention.set_processor(_SelfAttentionProcessor(function))
        yield
    finally:
        for layer, processor in zip(layers, previous, strict=True):
            layer.attention.set_processor(processor)


class _SelfAttentionProcessor:
    """diffusers processor for the self-attention of a transformer block that computes the attention by `attend`."""

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
            raise ModelError(
                "a self-attention layer of the UNet was called with encoder_hidden_states or attention_mask; "
                "use a UNet2DConditionModel of Stable Diffusion 1.x, 2.x or SDXL"
            )
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # (B, heads, tokens, head_dim)
        out = self.attend(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]
