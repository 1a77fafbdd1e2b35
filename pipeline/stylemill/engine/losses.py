"""The losses of attention distillation, one number per pair (arXiv 2502.20235, eq. 3–5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@torch.no_grad()
def ideal_attention(
    q: Tensor, style_k: Tensor, style_v: Tensor, query_scale: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """softmax(Q Ksᵀ / √d) Vs (eq. 3). Q (B, heads, N, d), Ks and Vs (B, heads, Ns, d) -> (B, heads, N, d).

    `query_scale` above 1 sharpens which style tokens a query takes; `allowed` (B, 1, N, Ns) says which it may.
    It is a target: with a gradient, its activations would be kept until the backward pass.
    """
    return scaled_dot_product_attention(q * query_scale, style_k, style_v, attn_mask=allowed)


def mean_l1(a: Tensor, b: Tensor) -> Tensor:
    """mean |a − b| over heads, tokens and channels: (B, heads, N, d) -> (B,). Never over the batch.

    Summed in fp32: half precision would lose a mean of a million terms.
    """
    difference = a - b if a.dtype == torch.float64 else a.float() - b.float()
    return difference.abs().mean(dim=(1, 2, 3))


def ad_loss(
    q: Tensor,
    out: Tensor,
    style_k: Tensor,
    style_v: Tensor,
    query_scale: float = 1.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """L_AD of one layer: distance of the attention output to the ideal one (eq. 4) -> (B,)."""
    return mean_l1(out, ideal_attention(q, style_k, style_v, query_scale, allowed))


def content_loss(q: Tensor, content_q: Tensor) -> Tensor:
    """L_content of one layer: distance of the queries to the content's (eq. 5) -> (B,)."""
    return mean_l1(q, content_q)
