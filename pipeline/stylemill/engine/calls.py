"""The ways in which the engine calls the UNet: to predict noise, to read activations, for losses, for losses and noise.

Each is a function of tensors alone, so that torch.compile makes one graph of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stylemill.engine.attention import Activations, Layer, Target, ideal_attention, inject_attention, record_attention
from stylemill.engine.kernels import constant, repeatable_backward
from stylemill.engine.memory import is_out_of_memory
from stylemill.engine.unet.controlnet import Control, controlnet_residuals
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.unet.text import Text
from stylemill.errors import ModelError

T = TypeVar("T")
# Arguments of torch.compile. Its optimization of layouts gave wrong gradients of convolutions (torch 2.13 on a CPU, the
# loss was right); a UNet whose weights are channels_last does not need it.
COMPILER: dict[str, Any] = {"backend": "inductor", "options": {"layout_optimization": False}}
LEAST_COSINE = 0.98  # of a compiled gradient to that of the eager call: more than what half precision changes
COMPILED_MICRO_BATCH = 32  # at most: the last call of a shard is padded, and so are calls for few features


def ad_loss(
    q: Tensor,
    out: Tensor,
    style_k: Tensor,
    style_v: Tensor,
    query_scale: float = 1.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """L_AD of one layer (eq. 4 of arXiv 2502.20235): distance of attention output and ideal attention -> (B,)."""
    return _mean_l1(out, ideal_attention(q, style_k, style_v, query_scale, allowed))


def content_loss(q: Tensor, content_q: Tensor) -> Tensor:
    """L_content of one layer (eq. 5): distance of the queries to the content's queries -> (B,)."""
    return _mean_l1(q, content_q)


def sum_losses(
    z: Tensor,
    layers: Sequence[Activations],
    targets: Sequence[Target],
    content_weights: Tensor,
    layer_weights: Sequence[float],
    query_scale: float,
) -> Tensor:
    """L_AD + λ L_content of each pair, summed over the layers with their weights -> (B,)."""
    ad = content = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for activations, target, weight in zip(layers, targets, layer_weights, strict=True):
        style = target.style_k, target.style_v
        ad = ad + weight * ad_loss(activations.q, activations.out, *style, query_scale, target.allowed)
        if target.content_q is not None:
            content = content + weight * content_loss(activations.q, target.content_q)
    return ad + content_weights * content


def _mean_l1(a: Tensor, b: Tensor) -> Tensor:
    """mean |a − b| of each pair over heads, tokens and channels: (B, heads, N, d) -> (B,).

    Computed in fp32 at least: in half precision, the mean of a million terms would be inexact.
    """
    difference = a - b if a.dtype == torch.float64 else a.float() - b.float()
    return difference.abs().mean(dim=(1, 2, 3))


class UNetCalls:
    """Calls of one loaded UNet, of which `layers` are recorded; created once, because compiling takes minutes.

    `repeatable` gradients have the same bits every time. With `compiled`, each way of calling is compiled when it is
    used first, for batches of `slot` rows, and the first gradient is checked; `eager` are the same calls without.
    """

    def __init__(
        self, model: DiffusionModel, layers: Sequence[Layer], repeatable: bool = True, compiled: bool = False
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.repeatable = repeatable
        self.slot = 1
        # Of the two ways to compute a gradient, without and with noise, those not compared with an eager one.
        self.unchecked = {False, True} if compiled else set()
        self.eager = UNetCalls(model, layers, repeatable) if compiled else self
        self._predict_noise = self._noise
        self._predict_injected_noise = self._injected_noise
        self._read_activations = self._activations
        self._sum_losses = self._losses
        self._sum_losses_and_predict = self._losses_and_noise
        if compiled:
            # One graph for noise and activations: another one would take as long to compile, and save hardly any work.
            both = self._compile(self._noise_and_activations)
            self._predict_noise = lambda *arguments: both(*arguments)[0]
            self._read_activations = lambda *arguments: both(*arguments)[1]
            self._predict_injected_noise = self._compile(self._injected_noise)
            self._sum_losses = self._compile(self._losses)
            self._sum_losses_and_predict = self._compile(self._losses_and_noise)

    @torch.no_grad()
    def predict_noise(
        self,
        latents: Tensor,
        timestep: int,
        text: Text,
        control: Control | None = None,
        targets: Sequence[Target] | None = None,
        query_scale: float = 1.0,
    ) -> Tensor:
        """ε(z, t, text): latents (B, C, h, w), a batch of B texts or one for all -> (B, C, h, w).

        The model's ControlNets act only with `control`. The layers attend to `targets`, if there are any.
        """
        t = self._timestep(timestep)
        conditions = self.model.conditions(latents, text)
        if control is not None:
            conditions |= controlnet_residuals(self.model.controlnets, latents, t, conditions, control)
        if targets is None:
            return self._predict_noise(latents, t, conditions).contiguous()
        return self._predict_injected_noise(latents, t, conditions, targets, query_scale).contiguous()

    @torch.no_grad()
    def activations(self, latents: Tensor, timestep: int, text: Text) -> list[Activations]:
        """What each layer computes of latents (B, C, h, w)."""
        t = self._timestep(timestep)
        return self._read_activations(latents, t, self.model.conditions(latents, text))

    def gradient(
        self,
        latents: Tensor,
        timestep: int,
        text: Text,
        targets: Sequence[Target],
        content_weights: Tensor,
        layer_weights: Sequence[float],
        query_scale: float,
        scales: Tensor,
        with_noise: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """∂L/∂z of L = L_AD + λ L_content of each pair, summed over the layers with their weights, and L itself.

        Latents (B, C, h, w), λ = `content_weights` (B,) -> (B, C, h, w), (B,). In the backward pass the loss of each
        pair is multiplied by its `scales` (B,), and its gradient divided by it afterwards. `with_noise`, the pass does
        not end after the last layer, and the third result is ε(z, t, text) (B, C, h, w), a constant.
        """
        t = self._timestep(timestep)
        conditions = self.model.conditions(latents, text)
        with torch.enable_grad(), repeatable_backward(self.repeatable):
            z = latents.detach().requires_grad_(True)
            known = z, t, conditions, targets, content_weights, tuple(layer_weights), query_scale
            losses, epsilon = self._sum_losses_and_predict(*known) if with_noise else (self._sum_losses(*known), None)
            (gradient,) = torch.autograd.grad((losses * scales).sum(), z)
        # Contiguous: the order of a sum over latents must not depend on the graph that computed them.
        gradient = gradient.contiguous() / scales[:, None, None, None]
        if with_noise in self.unchecked:
            self.unchecked.remove(with_noise)
            arguments = latents, timestep, text, targets, content_weights, layer_weights, query_scale, scales
            _check_compiled(gradient, self.eager.gradient(*arguments)[0])
        return gradient, losses.detach(), None if epsilon is None else epsilon.contiguous()

    def _timestep(self, timestep: int) -> Tensor:
        return constant((timestep,), torch.long, self.model.device)[0]

    def _noise(self, z: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
        return self.model.predict_noise(z, timestep, conditions)

    def _injected_noise(
        self, z: Tensor, timestep: Tensor, conditions: dict[str, Any], targets: Sequence[Target], query_scale: float
    ) -> Tensor:
        with inject_attention(self.layers, targets, query_scale):
            return self.model.predict_noise(z, timestep, conditions)

    def _activations(self, z: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> list[Activations]:
        with record_attention(self.layers) as recorded:
            self.model.predict_noise(z, timestep, conditions)
        return recorded

    def _noise_and_activations(
        self, z: Tensor, timestep: Tensor, conditions: dict[str, Any]
    ) -> tuple[Tensor, list[Activations]]:
        with record_attention(self.layers, whole_pass=True) as recorded:
            epsilon = self.model.predict_noise(z, timestep, conditions)
        return epsilon, recorded

    def _losses(self, z: Tensor, timestep: Tensor, conditions: dict[str, Any], *known: Any) -> Tensor:
        return sum_losses(z, self._activations(z, timestep, conditions), *known)

    def _losses_and_noise(
        self, z: Tensor, timestep: Tensor, conditions: dict[str, Any], *known: Any
    ) -> tuple[Tensor, Tensor]:
        epsilon, layers = self._noise_and_activations(z, timestep, conditions)
        return sum_losses(z, layers, *known), epsilon.detach()

    def _compile(self, call: Callable[..., T]) -> Callable[..., T]:
        """`call` as one graph, which takes batches of `slot` rows: longer ones are split, shorter ones padded.

        Raises ModelError if torch cannot compile it.
        """
        compiled = torch.compile(call, fullgraph=True, dynamic=False, **COMPILER)

        def call_compiled(*arguments: Any) -> T:
            from torch._dynamo.exc import TorchDynamoException  # not at the top of the module: it takes a second

            count, results = len(arguments[0]), []
            try:
                for start in range(0, count, self.slot):
                    rows = slice(start, start + self.slot)
                    padded = _map_batches(lambda x, rows=rows: _pad(x[rows], self.slot), arguments)
                    results.append(compiled(*padded))
            except TorchDynamoException as error:
                if is_out_of_memory(error):
                    raise
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                raise ModelError(f"torch.compile: {reason}; set cluster.compile to false") from error
            whole: T = _map_batches(lambda *parts: (torch.cat(parts) if len(parts) > 1 else parts[0])[:count], *results)
            return whole

        return call_compiled


def _check_compiled(compiled: Tensor, eager: Tensor) -> None:
    """Raise ModelError if a compiled gradient is not that of the eager call: a wrong one looks like a weak style."""
    finite = compiled.isfinite() & eager.isfinite()
    a, b = (gradient.where(finite, 0).flatten().double() for gradient in (compiled, eager))
    if b.any() and (cosine := torch.nn.functional.cosine_similarity(a, b, dim=0).item()) < LEAST_COSINE:
        raise ModelError(
            f"torch.compile computes wrong gradients on {eager.device}: their cosine to those without it is"
            f" {cosine:.3f}; set cluster.compile to false"
        )


def _pad(tensor: Tensor, size: int) -> Tensor:
    """The tensor with its last row repeated until it has `size` rows."""
    missing = size - len(tensor)
    return tensor.contiguous() if missing == 0 else torch.cat([tensor, *[tensor[-1:]] * missing])


def _map_batches(change: Callable[..., Any], *values: Any) -> Any:
    """`change` of every batch in equal structures of tuples, lists and dictionaries: every tensor with dimensions."""
    value = values[0]
    if isinstance(value, Tensor):
        return change(*values) if value.ndim else value
    if isinstance(value, dict):
        return {key: _map_batches(change, *(other[key] for other in values)) for key in value}
    if isinstance(value, tuple | list):
        items = [_map_batches(change, *items) for items in zip(*values, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
