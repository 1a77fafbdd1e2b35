"""A naive implementation of attention distillation: the oracle that the engine is compared with.

It follows the equations of arXiv 2502.20235 and is written for reading, not for speed: one pair at a time, no cache, no
batch, no lockstep, attention written out, plain forward hooks, `torch.optim.Adam`. Every feature is computed again for
every pair and step. It imports nothing from stylemill; of pairs, settings and noise it uses only the attributes.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

USED_LAYERS = 6  # the last six self-attention layers in running order


@dataclass(frozen=True)
class Model:
    """The frozen parts of a Stable-Diffusion-1.x- or SDXL-shaped model folder, all in one precision."""

    unet: Any
    vae: Any
    tokenizer: Any
    text_encoder: Any
    scheduler_config: dict[str, Any]
    sdxl: Any = None  # diffusers' pipeline with these parts; only its encoding of prompts and sizes is used
    controlnets: tuple[tuple[Any, float, float, float], ...] = ()  # (ControlNet, scale, start, end) each

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float64) -> Model:
        def frozen(kind: Any, part: str) -> Any:
            return kind.from_pretrained(folder, subfolder=part, torch_dtype=dtype).eval().requires_grad_(False)

        parts = {
            "unet": frozen(UNet2DConditionModel, "unet"),
            "vae": frozen(AutoencoderKL, "vae"),
            "tokenizer": CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            "text_encoder": frozen(CLIPTextModel, "text_encoder"),
        }
        sdxl = None
        if (Path(folder) / "text_encoder_2").is_dir():
            sdxl = StableDiffusionXLPipeline(
                **parts,
                tokenizer_2=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2"),
                text_encoder_2=frozen(CLIPTextModelWithProjection, "text_encoder_2"),
                scheduler=DDIMScheduler(),
                add_watermarker=False,
            )
        config = dict(DDIMScheduler.load_config(folder, subfolder="scheduler"))
        return cls(**parts, scheduler_config=config, sdxl=sdxl)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype  # type: ignore[no-any-return]

    def scheduler(self, steps: int) -> Any:
        scheduler = DDIMScheduler.from_config(self.scheduler_config, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
        return scheduler

    def sampler(self, name: str, steps: int) -> Any:
        """diffusers' scheduler for the steps of one pair from start to end, as in diffusers' pipelines."""
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "lcm": (diffusers.LCMScheduler, {}),
            "tcd": (diffusers.TCDScheduler, {}),
            "ddpm": (diffusers.DDPMScheduler, {"timestep_spacing": "leading"}),
            "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
            "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading"}),
            "deis": (diffusers.DEISMultistepScheduler, {"timestep_spacing": "leading"}),
            "dpmpp": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "leading"}),
            "dpmpp_sde": (
                diffusers.DPMSolverMultistepScheduler,
                {"timestep_spacing": "leading", "algorithm_type": "sde-dpmsolver++"},
            ),
        }
        if name == "ddim":
            return self.scheduler(steps)
        kind, options = kinds[name]
        scheduler = kind.from_config(self.scheduler_config, **options)
        scheduler.set_timesteps(steps)
        return scheduler

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:  # (1, tokens, width)
        length = self.tokenizer.model_max_length
        ids = self.tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(ids.input_ids)[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def conditions(self, prompt: str, latent: Tensor) -> dict[str, Any]:
        """The UNet's keyword arguments for a prompt and, for SDXL, for the image's size without cropping."""
        if self.sdxl is None:
            return {"encoder_hidden_states": self.encode_prompt(prompt)}
        hidden, _, pooled, _ = self.sdxl.encode_prompt(prompt, do_classifier_free_guidance=False)
        size = tuple(side * self.sdxl.vae_scale_factor for side in latent.shape[2:])
        width = self.sdxl.text_encoder_2.config.projection_dim
        ids = self.sdxl._get_add_time_ids(size, (0, 0), size, self.dtype, text_encoder_projection_dim=width)
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    @torch.no_grad()
    def encode_image(self, pixels: np.ndarray[Any, Any]) -> Tensor:  # (H, W, 3) uint8 -> (1, C, h, w)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.dtype) / 127.5 - 1
        return self.vae.encode(image).latent_dist.mean * self.vae.config.scaling_factor  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray[Any, Any]:  # (1, C, h, w) -> (H, W, 3) whole numbers from 0 to 255
        image = self.vae.decode(latents / self.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
        return ((image + 1) * 127.5).clamp(0, 255).round().to(int).numpy()  # type: ignore[no-any-return]


class Layer(NamedTuple):
    """What one self-attention layer computed, each (1, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


@dataclass
class Trace:
    """The latents after each step and the gradient of each Adam step, in order; each (1, C, h, w)."""

    latents: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def attend(q: Tensor, k: Tensor, v: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """Attention written out; `forbidden` (tokens, tokens of k) is True where a token must not attend to another."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def forbidden(pair: Any, tokens: int) -> Tensor | None:
    """Controllable synthesis: at a layer with so many tokens, a target attends to style tokens of its own label only.

    Label images are resized to the layer's grid by F.interpolate's nearest neighbour. −1, no label, attends to all.
    """
    if pair.content_mask is None:
        return None
    width, height = pair.size
    side = round(math.sqrt(width * height / tokens))  # of a token, in pixels

    def labels(mask: Any) -> list[int]:
        image = torch.from_numpy(np.array(mask.labels)).double()[None, None]
        grid = (image.shape[2] // side, image.shape[3] // side)
        return torch.nn.functional.interpolate(image, grid, mode="nearest").flatten().int().tolist()

    style = [label for mask in pair.style_masks for label in labels(mask)]
    return torch.tensor([[own not in (-1, other) for other in style] for own in labels(pair.content_mask)])


def layers(model: Model, latent: Tensor, timestep: int, count: int = USED_LAYERS) -> list[Layer]:
    """Run the UNet with the null prompt and record the last `count` self-attention layers, in running order."""
    recorded: list[dict[str, Tensor]] = []

    def heads(attn: Any, x: Tensor) -> Tensor:  # (1, tokens, heads * head_dim) -> (1, heads, tokens, head_dim)
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def hook(attn: Any) -> list[Any]:
        def start(*_: Any) -> None:
            recorded.append({})

        def record(name: str) -> Any:
            return lambda _module, _inputs, output: recorded[-1].__setitem__(name, heads(attn, output))

        def record_out(_module: Any, inputs: Any) -> None:  # the input of the output projection: all heads, joined
            recorded[-1]["out"] = heads(attn, inputs[0])

        return [
            attn.register_forward_pre_hook(start),
            attn.to_q.register_forward_hook(record("q")),
            attn.to_k.register_forward_hook(record("k")),
            attn.to_v.register_forward_hook(record("v")),
            attn.to_out[0].register_forward_pre_hook(record_out),
        ]

    hooks = [
        handle for name, module in model.unet.named_modules() if name.endswith(".attn1") for handle in hook(module)
    ]
    try:
        model.unet(latent, timestep, **model.conditions("", latent))
    finally:
        for handle in hooks:
            handle.remove()
    return [Layer(**tensors) for tensors in recorded][-count:]


@contextmanager
def injected(
    model: Model, styles: Sequence[list[Layer]], content: list[Layer] | None, query_scale: float, pair: Any
) -> Iterator[None]:
    """KV injection: the used layers attend to K and V of the styles, with the content's Q if there is a content."""
    ran: list[Any] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for name, module in model.unet.named_modules()
        if name.endswith(".attn1")
    ]
    blank = torch.zeros(1, 4, 8, 8, dtype=model.dtype)
    model.unet(blank, 0, **model.conditions("", blank))  # to see in which order the layers run
    for handle in hooks:
        handle.remove()
    used = ran[-USED_LAYERS:]

    def patched(attn: Any, i: int) -> Any:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:  # (1, tokens, channels)
            q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            q = q if content is None else content[i].q
            style_k = torch.cat([style[i].k for style in styles], dim=2)
            style_v = torch.cat([style[i].v for style in styles], dim=2)
            out = attend(q * query_scale, style_k, style_v, forbidden(pair, q.shape[2]))
            return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]

        return forward

    for i, attn in enumerate(used):
        attn.forward = patched(attn, i)
    try:
        yield
    finally:
        for attn in used:
            del attn.forward  # the method of the class is in use again


def losses(
    target: list[Layer], styles: Sequence[list[Layer]], content: list[Layer] | None, settings: Any, pair: Any
) -> tuple[Tensor, Tensor | None]:
    """L_AD and L_content, weighted and summed over layers (eqs. 3-5); `query_scale` is for the ideal attention only."""
    weights = settings.layer_weights or [1.0] * len(target)
    ad = torch.zeros((), dtype=target[0].q.dtype)
    content_loss = None if content is None else torch.zeros_like(ad)
    for i, (q, k, v, _) in enumerate(target):
        style_k = torch.cat([style[i].k for style in styles], dim=2)
        style_v = torch.cat([style[i].v for style in styles], dim=2)
        ideal = attend(q * settings.query_scale, style_k, style_v, forbidden(pair, q.shape[2])).detach()
        ad = ad + weights[i] * (attend(q, k, v) - ideal).abs().mean()
        if content is not None and content_loss is not None:
            content_loss = content_loss + weights[i] * (q - content[i].q).abs().mean()
    return ad, content_loss


class NaivePair:
    """One pair with the model, and the operations of a step on it."""

    def __init__(self, model: Model, pair: Any, settings: Any, noise: Any) -> None:
        self.model, self.pair, self.settings, self.noise = model, pair, settings, noise
        self.scheduler = model.scheduler(settings.steps)
        self.sampler = model.sampler(settings.scheduler, settings.steps)
        self.timesteps = [int(timestep) for timestep in self.sampler.timesteps]
        self.styles = [model.encode_image(image.pixels) for image in pair.styles]
        self.content = None if pair.content is None else model.encode_image(pair.content.pixels)
        weight = pair.content_weight
        self.content_weight: float = settings.content_weight if weight is None else weight

    def tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.model.dtype)[None]

    def initial_latents(self) -> Tensor:
        width, height = self.pair.size
        factor = 2 ** (len(self.model.vae.config.block_out_channels) - 1)
        shape = (self.model.unet.config.in_channels, height // factor, width // factor)
        return self.tensor(self.noise.initial_latents(self.pair, shape))

    def noised_start(self) -> Tensor:
        """The content's latent with the pair's noise, at the first timestep that is not skipped."""
        if self.content is None:
            raise ValueError("the pair has no content to start from")
        timestep = torch.tensor([self.timesteps[self.first_step]])
        return self.scheduler.add_noise(self.content, self.initial_latents(), timestep)  # type: ignore[no-any-return]

    @property
    def first_step(self) -> int:
        """With a strength s, the last s · steps steps are taken, and at least one."""
        steps = self.settings.steps
        return steps - max(1, round(self.settings.strength * steps))  # type: ignore[no-any-return]

    def noised(self, clean: Tensor, image: Any, step: int, timestep: int | None = None) -> Tensor:
        """The image's latent with the image's noise at `timestep`; by default, the timestep that follows `step`."""
        timestep = self.next_timestep(step) if timestep is None else timestep
        noise = self.tensor(self.noise.image_noise(image.digest, step, tuple(clean.shape[1:])))
        return self.scheduler.add_noise(clean, noise, torch.tensor([timestep]))  # type: ignore[no-any-return]

    def noised_styles(self, step: int, timestep: int | None = None) -> list[Tensor]:
        return [
            self.noised(clean, image, step, timestep)
            for clean, image in zip(self.styles, self.pair.styles, strict=True)
        ]

    def noised_content(self, step: int, timestep: int | None = None) -> Tensor | None:
        return None if self.content is None else self.noised(self.content, self.pair.content, step, timestep)

    def weight_at(self, step: int) -> float:
        """λ at a step: its factor changes linearly from the schedule's first number to its second."""
        first, last = self.settings.content_schedule
        progress = step / (self.settings.steps - 1) if self.settings.steps > 1 else 0.0
        return self.content_weight * (first * (1 - progress) + last * progress)  # type: ignore[no-any-return]

    def is_guided(self, step: int) -> bool:
        settings = self.settings
        first = self.first_step if settings.init == "content" and settings.method != "optimization" else 0
        in_range = [i for i in range(first, settings.steps) if i >= settings.start_step]
        guided = [i for i in in_range if settings.end_step is None or i < settings.end_step]
        return step in guided[:: settings.guided_every]

    def next_timestep(self, step: int) -> int:
        return self.timesteps[step + 1] if step + 1 < len(self.timesteps) else 0

    def predicted(self, z: Tensor, timestep: int, prompt: str) -> Tensor:
        """ε, with the residuals of the ControlNets that are active at this timestep."""
        conditions, residuals = self.model.conditions(prompt, z), {}
        share = self.timesteps.index(timestep) / len(self.timesteps), 1 / len(self.timesteps)
        for place, (net, scale, start, end) in enumerate(self.model.controlnets):
            if share[0] < start or share[0] + share[1] > end + 1e-9:
                continue
            control = self.tensor(self.pair.controls[place].pixels).permute(0, 3, 1, 2) / 255
            output = net(z, timestep, controlnet_cond=control, **conditions)
            tensors = [scale * tensor for tensor in (*output.down_block_res_samples, output.mid_block_res_sample)]
            residuals = {i: residuals.get(i, 0) + tensor for i, tensor in enumerate(tensors)}
        if not residuals:
            return self.model.unet(z, timestep, **conditions).sample  # type: ignore[no-any-return]
        *down, middle = residuals.values()
        return self.model.unet(  # type: ignore[no-any-return]
            z, timestep, down_block_additional_residuals=down, mid_block_additional_residual=middle, **conditions
        ).sample

    @torch.no_grad()
    def denoise(self, z: Tensor, timestep: int, epsilon: Tensor | None = None) -> Tensor:
        """One step of the scheduler, with classifier-free guidance when its scale is above 1, or with a given ε."""
        scale = self.settings.guidance_scale
        if epsilon is not None:
            return self.step(epsilon, self.timesteps.index(timestep), z)
        epsilon = self.predicted(z, timestep, self.pair.prompt)
        if scale > 1:
            negative = self.predicted(z, timestep, self.pair.negative_prompt)
            epsilon = negative + scale * (epsilon - negative)
        return self.step(epsilon, self.timesteps.index(timestep), z)

    def step(self, epsilon: Tensor, step: int, z: Tensor) -> Tensor:
        """A step of diffusers' scheduler with this pair's noise; z is scaled as the UNet takes it, before and after."""
        sampler, timestep = self.sampler, self.sampler.timesteps[step]
        if self.settings.scheduler.startswith("euler"):  # its latents are x + σ n
            before, after = ((sampler.sigmas[i] ** 2 + 1) ** 0.5 for i in (step, step + 1))
            torch.testing.assert_close(sampler.scale_model_input(z * before, timestep), z, rtol=0, atol=1e-12)
        else:
            before = after = 1.0
        pair = self.pair
        content = None if pair.content is None else pair.content.digest
        identity = (pair.image_number, content, [style.digest for style in pair.styles], pair.prompt)
        key = hashlib.sha256(repr(identity if pair.seed is None else pair.seed).encode()).hexdigest()

        def draw(shape: Any, **_: Any) -> Tensor:
            return self.tensor(self.noise.step_noise(key, step, tuple(shape[1:])))

        eta = {} if self.settings.eta is None else {"eta": self.settings.eta}
        module = sys.modules[type(sampler).__module__]
        with mock.patch.object(module, "randn_tensor", draw, create=True):
            return sampler.step(epsilon, timestep, z * before, **eta).prev_sample / after  # type: ignore[no-any-return]

    def gradient(
        self, z: Tensor, timestep: int, styles: Sequence[Tensor], content: Tensor | None, step: int, trace: Trace
    ) -> Tensor:
        """∂L_total/∂z at `timestep`, with the features of style and content latents computed again."""
        with torch.no_grad():
            style_layers = [layers(self.model, style, timestep) for style in styles]
            content_layers = None if content is None else layers(self.model, content, timestep)
        z = z.detach().clone().requires_grad_(True)
        target_layers = layers(self.model, z, timestep)
        ad, content_loss = losses(target_layers, style_layers, content_layers, self.settings, self.pair)
        loss = ad if content_loss is None else ad + self.weight_at(step) * content_loss
        (gradient,) = torch.autograd.grad(loss, z)
        trace.gradients.append(gradient.clone())
        return gradient

    def guided_gradient(self, z: Tensor, step: int, trace: Trace) -> Tensor:
        """The gradient of guided sampling, with all images noised to the timestep that follows `step`."""
        styles, content = self.noised_styles(step), self.noised_content(step)
        return self.gradient(z, self.next_timestep(step), styles, content, step, trace)


def adain(z: Tensor, styles: Sequence[Tensor]) -> Tensor:
    """Give z the channel means and unbiased standard deviations of the styles' latents, pooled over all styles."""
    pooled = torch.cat([style.flatten(2) for style in styles], dim=2)  # (1, C, sum of h * w)
    mean, std = z.mean(dim=(2, 3), keepdim=True), z.std(dim=(2, 3), keepdim=True)
    return (z - mean) / (std + 1e-6) * pooled.std(dim=2)[..., None, None] + pooled.mean(dim=2)[..., None, None]


def adam(z: Tensor, learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([z], lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)


def naive_guided(model: Model, pair: Any, settings: Any, noise: Any) -> Trace:
    """Guided sampling of one pair: a scheduler step, AdaIN, then a fresh Adam at the timestep that follows.

    With method `gradient`, plain gradient steps instead of Adam's. With `reuse_prediction`, a step after a guided one
    denoises with ε at the latents whose gradient was computed last.
    """
    naive, trace = NaivePair(model, pair, settings, noise), Trace()
    z = naive.noised_start() if settings.init == "content" else naive.initial_latents()
    epsilon = None
    for step in range(naive.first_step if settings.init == "content" else 0, settings.steps):
        z = naive.denoise(z, naive.timesteps[step], epsilon)
        epsilon = None
        if naive.is_guided(step):
            if settings.adain:
                z = adain(z, naive.noised_styles(step))
            optimizer = adam(z, settings.learning_rate)
            for _ in range(settings.iterations):
                if settings.reuse_prediction and step + 1 < settings.steps:
                    with torch.no_grad():
                        epsilon = naive.predicted(z, naive.next_timestep(step), "")
                if settings.method == "gradient":
                    z = z - settings.learning_rate * naive.guided_gradient(z, step, trace)
                else:
                    z.grad = naive.guided_gradient(z, step, trace)
                    optimizer.step()
        trace.latents.append(z.detach().clone())
    return trace


def naive_optimization(model: Model, pair: Any, settings: Any, noise: Any) -> Trace:
    """Latent optimization of one pair: one Adam for the run, features of clean latents at decreasing timesteps."""
    naive, trace = NaivePair(model, pair, settings, noise), Trace()
    from_noise = naive.content is None or settings.init == "noise"
    z = naive.initial_latents() if from_noise else naive.content.clone()  # type: ignore[union-attr]
    optimizer = adam(z, settings.learning_rate)
    for step, timestep in enumerate(naive.timesteps):
        for _ in range(settings.iterations if naive.is_guided(step) else 0):
            z.grad = naive.gradient(z, timestep, naive.styles, naive.content, step, trace)
            optimizer.step()
        trace.latents.append(z.detach().clone())
    return trace


@torch.no_grad()
def naive_kv_injection(model: Model, pair: Any, settings: Any, noise: Any) -> Trace:
    """KV injection: denoising at t with K, V of the styles and Q of the content, both noised to t; no gradient."""
    naive, trace = NaivePair(model, pair, settings, noise), Trace()
    z = naive.noised_start() if settings.init == "content" else naive.initial_latents()
    for step in range(naive.first_step if settings.init == "content" else 0, settings.steps):
        t = naive.timesteps[step]
        if naive.is_guided(step):
            styles, content = naive.noised_styles(step, t), naive.noised_content(step, t)
            if settings.adain:
                z = adain(z, styles)
            # With λ = 0, the content is not used in any method.
            content_layers = None if content is None or not naive.content_weight else layers(model, content, t)
            style_layers, scale = [layers(model, style, t) for style in styles], settings.query_scale
            with injected(model, style_layers, content_layers, scale, pair):
                z = naive.denoise(z, t)
        else:
            z = naive.denoise(z, t)
        trace.latents.append(z.clone())
    return trace


def window_starts(size: int, settings: Any, wraps: bool) -> list[int]:
    """The first latent of each window along an axis; where it wraps, a window starts at every stride."""
    starts, wraps = [0], wraps and size > settings.window
    while starts[-1] + settings.window < size and not wraps:
        starts.append(min(starts[-1] + settings.window_stride, size - settings.window))
    while wraps and starts[-1] + settings.window_stride < size:
        starts.append(starts[-1] + settings.window_stride)
    return starts


def windows(z: Tensor, settings: Any) -> list[tuple[int, int]]:
    """(top, left) of each window onto latents z."""
    tops = window_starts(z.shape[2], settings, settings.tiling in ("y", "both"))
    lefts = window_starts(z.shape[3], settings, settings.tiling in ("x", "both"))
    return [(top, left) for top in tops for left in lefts]


def crop(z: Tensor, corner: tuple[int, int], settings: Any) -> Tensor:
    return torch.roll(z, (-corner[0], -corner[1]), (2, 3))[:, :, : settings.window, : settings.window].clone()


def naive_expansion(model: Model, pair: Any, settings: Any, noise: Any) -> Trace:
    """Guided sampling of latents larger than a window: a step in each window alone, then the mean over the windows.

    Along an axis of `settings.tiling`, windows continue at the other end, and one starts at every stride.
    """
    naive, trace = NaivePair(model, pair, settings, noise), Trace()
    z = naive.initial_latents()
    for step, timestep in enumerate(naive.timesteps):
        total, count = torch.zeros_like(z), torch.zeros_like(z)
        for top, left in windows(z, settings):
            window = naive.denoise(crop(z, (top, left), settings), timestep)
            if settings.adain:
                window = adain(window, naive.noised_styles(step))
            optimizer = adam(window, settings.learning_rate)
            for _ in range(settings.iterations):
                window.grad = naive.guided_gradient(window, step, trace)
                optimizer.step()
            for part, value in ((total, window), (count, torch.ones_like(window))):
                whole = torch.zeros_like(z)
                whole[:, :, : settings.window, : settings.window] = value
                part += torch.roll(whole, (top, left), (2, 3))
        z = total / count
        trace.latents.append(z.clone())
    return trace


class WrappedConv(torch.nn.Module):
    """A convolution with circular padding along some axes (2: y, 3: x) and zeros along the others."""

    def __init__(self, conv: Any, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.axes = copy.deepcopy(conv), axes
        self.conv.padding = tuple(0 if axis in axes else conv.padding[axis - 2] for axis in (2, 3))
        self.reach = {axis: conv.padding[axis - 2] for axis in axes}

    def forward(self, x: Tensor) -> Tensor:
        for axis, reach in self.reach.items():
            size = x.shape[axis]
            x = torch.cat([x.narrow(axis, size - reach, reach), x, x.narrow(axis, 0, reach)], dim=axis)
        return self.conv(x)  # type: ignore[no-any-return]


def tiled(model: Model, tiling: str) -> Model:
    """A copy of the model whose UNet and VAE decoder have circular padding along x, y or both."""

    def wrapped(module: Any) -> Any:
        module = copy.deepcopy(module)
        for name, conv in list(module.named_modules()):
            if isinstance(conv, torch.nn.Conv2d) and any(conv.padding):
                parent, _, leaf = name.rpartition(".")
                if tiling == "both":
                    circular: Any = torch.nn.Conv2d(
                        conv.in_channels,
                        conv.out_channels,
                        conv.kernel_size,  # type: ignore[arg-type]
                        conv.stride,  # type: ignore[arg-type]
                        conv.padding,
                        padding_mode="circular",
                        dtype=conv.weight.dtype,
                    )
                    circular.load_state_dict(conv.state_dict())
                else:
                    circular = WrappedConv(conv, (3,) if tiling == "x" else (2,))
                setattr(module.get_submodule(parent), leaf, circular.requires_grad_(False))
        return module

    vae = copy.deepcopy(model.vae)
    vae.decoder = wrapped(vae.decoder)
    return replace(model, unet=wrapped(model.unet), vae=vae)


def refined(model: Model, pixels: np.ndarray[Any, Any], steps: int, learning_rate: float) -> tuple[Model, list[float]]:
    """A copy of the model whose decoder is fine-tuned to reconstruct one image, and the loss before each step."""
    vae = copy.deepcopy(model.vae)
    image = torch.from_numpy(pixels).to(model.dtype).permute(2, 0, 1)[None] / 127.5 - 1
    latents = model.encode_image(pixels) / vae.config.scaling_factor
    optimizer = torch.optim.Adam(vae.decoder.requires_grad_(True).parameters(), lr=learning_rate)
    loss_values = []
    for _ in range(steps):
        loss = torch.nn.functional.l1_loss(vae.decode(latents).sample, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_values.append(loss.item())
    return replace(model, vae=vae.requires_grad_(False)), loss_values


@torch.no_grad()
def naive_distances(
    model: Model, pair: Any, settings: Any, noise: Any, latents: Tensor
) -> tuple[float, float, float | None]:
    """L_AD of the content image (or the initial noise) and of `latents` (1, C, h, w), and L_content of the latents.

    Clean latents at timestep 1, every layer with weight 1, Q as it is; the means over the windows.
    """
    naive, plain = NaivePair(model, pair, settings, noise), SimpleNamespace(layer_weights=None, query_scale=1.0)
    start = naive.initial_latents() if naive.content is None else naive.content
    style_layers = [layers(model, style, 1) for style in naive.styles]
    found = []
    for corner in windows(latents, settings) if settings.window else [(0, 0)]:
        before, after = (
            layers(model, crop(z, corner, settings) if settings.window else z, 1) for z in (start, latents)
        )
        style_before, _ = losses(before, style_layers, None, plain, pair)
        style, content = losses(after, style_layers, before, plain, pair)
        found.append(torch.stack([style_before, style, content]))  # type: ignore[list-item]
    style_before, style, content = torch.stack(found).mean(0)
    return style_before.item(), style.item(), None if naive.content is None else content.item()  # type: ignore[union-attr]


def naive_sample(model: Model, pair: Any, settings: Any, noise: Any) -> Trace:
    methods = {"optimization": naive_optimization, "kv_injection": naive_kv_injection}
    return methods.get(settings.method, naive_guided)(model, pair, settings, noise)


def naive_gradient(model: Model, pair: Any, settings: Any, noise: Any, latents: Tensor, step: int) -> Tensor:
    """∂L_total/∂z of guided sampling at `latents` (1, C, h, w), after the scheduler step of number `step`."""
    return NaivePair(model, pair, settings, noise).guided_gradient(latents.to(model.dtype), step, Trace())
