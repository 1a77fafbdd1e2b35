"""Kernels of self-attention on CUDA: those of the engine, and a faster forward pass before the same backward pass.

`make gpu` has this as its stage `attention`. A gradient takes flash attention both ways, because cuDNN's backward pass
is not repeatable. cuDNN's forward pass is, and is faster: here flash attention's backward pass follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from stylemill.bench.measure import median_seconds
from stylemill.engine.kernels import repeatable, repeatable_backward

# Heads, tokens and head dimension of self-attention in SD 1.5 at 512² and in SDXL at 1024².
SHAPES = {
    "sd15 64²": (8, 4096, 40),
    "sd15 32²": (8, 1024, 80),
    "sd15 16²": (8, 256, 160),
    "sdxl 64²": (10, 4096, 64),
    "sdxl 32²": (20, 1024, 64),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class CudnnThenFlash(torch.autograd.Function):
    """Attention with cuDNN's forward pass and flash attention's backward pass. q, k, v (B, heads, tokens, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, logsumexp, *sequences, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True
        )
        ctx.save_for_backward(q, k, v, out, logsumexp.reshape(q.shape[:-1]))
        ctx.rest = *sequences, 0.0, False, seed, offset
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)


def measure_attention(device: torch.device, batch: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each way, forwards and both ways; whether its bits repeat; its cosine to flash attention."""
    ways: dict[str, tuple[Attend, bool]] = {
        "flash": (scaled_dot_product_attention, True),
        "fastest": (scaled_dot_product_attention, False),
    }
    if device.type == "cuda":
        ways["cudnn, then flash"] = (CudnnThenFlash.apply, True)
    return {name: _measure_shape(ways, device, batch, *shape) for name, shape in SHAPES.items()}


def _measure_shape(
    ways: dict[str, tuple[Attend, bool]], device: torch.device, batch: int, heads: int, tokens: int, dimension: int
) -> dict[str, Any]:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    tokens = tokens if device.type == "cuda" else 16
    inputs = torch.randn(4, batch, tokens, heads * dimension, device=device, dtype=dtype)
    q, k, v, grad = inputs.unflatten(-1, (heads, dimension)).transpose(2, 3)  # with the strides that a UNet gives them

    def gradients(attend: Attend, deterministic: bool) -> Tensor:
        with torch.enable_grad(), repeatable_backward(deterministic):
            leaves = [one.detach().requires_grad_() for one in (q, k, v)]
            return torch.stack(torch.autograd.grad(attend(*leaves), leaves, grad))

    found: dict[str, Any] = {}
    with repeatable(1):
        expected = gradients(*ways["flash"])
        for name, way in ways.items():
            result = gradients(*way)
            with torch.no_grad(), repeatable_backward(way[1]):
                found[f"{name}: forward ms"] = 1000 * median_seconds(lambda way=way: way[0](q, k, v), device)
            found[f"{name}: both ms"] = 1000 * median_seconds(lambda way=way: gradients(*way), device)
            found[f"{name}: same bits twice"] = torch.equal(result, gradients(*way))
            found[f"{name}: cosine"] = cosine_similarity(
                expected.flatten().double(), result.flatten().double(), 0
            ).item()
    return found
