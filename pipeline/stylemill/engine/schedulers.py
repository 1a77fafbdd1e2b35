"""diffusers' schedulers for lockstep sampling: one scale of latents for all, with noise and history as arguments.

A diffusers scheduler counts its steps, keeps earlier predictions and draws noise for one batch that it samples from
start to end. Here it takes any step of any micro-batch, so its caller keeps the history and draws the noise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import diffusers
import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.config.schedulers import SCHEDULERS


class Scheduler:
    """The scheduler that a job names, for the noise levels of the model's own `noise_schedule` (a DDIMScheduler).

    Between steps, latents are √ᾱ x + √(1−ᾱ) n, as the UNet takes them, also if the scheduler computes in another scale.
    So gradients, learning rates and noised images mean the same with every scheduler.
    """

    def __init__(self, noise_schedule: Any, settings: Sampling) -> None:
        kind = SCHEDULERS[settings.scheduler]
        scheduler_class: Any = getattr(diffusers, kind.scheduler)
        # Only parameters of training: the model's file may have sigmas and spacings for another scheduler's sampling.
        names = signature(diffusers.DDIMScheduler).parameters.keys() & signature(scheduler_class).parameters.keys()
        config = {name: value for name, value in noise_schedule.config.items() if name in names}
        self.noise_schedule = noise_schedule
        self.scheduler = scheduler_class(**{**config, **kind.options})
        self.scheduler.set_timesteps(settings.steps)
        self.scheduler.is_scale_input_called = True  # silences Euler's warning: `step` scales the input
        self.timesteps = [int(t) for t in self.scheduler.timesteps.tolist()]
        self.history = kind.history if settings.method != "optimization" else 0
        self.first_step = settings.first_step
        self.eta = {} if settings.eta is None else {"eta": settings.eta}
        self.scales = [(sigma**2 + 1) ** 0.5 for sigma in self.scheduler.sigmas] if kind.sigmas else []

    def next_timestep(self, step: int) -> int:
        """s, the timestep of the latents after `step`; 0 after the last one."""
        return self.timesteps[step + 1] if step + 1 < len(self.timesteps) else 0

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """√ᾱ x + √(1−ᾱ) n at `timestep`, of any shape."""
        product = float(self.noise_schedule.alphas_cumprod[timestep])  # on the CPU: nothing waits for the device
        return latent * math.sqrt(product) + noise * math.sqrt(1 - product)

    def step(
        self, epsilon: Tensor, z: Tensor, step: int, history: Tensor | None, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The latents z (B, C, h, w) after `step`, and their history (B, `self.history`, C, h, w) if there is one.

        `draw` returns the noise (B, C, h, w) of this step. It is called at most once, and only by a scheduler that adds
        noise.
        """
        scheduler = self.scheduler
        scheduler._step_index = step
        if history is not None:
            scheduler.model_outputs = list(history.unbind(1))
            scheduler.lower_order_nums = min(step - self.first_step, self.history)
        if self.scales:
            z = z * self.scales[step]
        with _noise_from(scheduler, draw):
            z = scheduler.step(epsilon, scheduler.timesteps[step], z, **self.eta).prev_sample
        if self.scales:
            z = z / self.scales[step + 1]
        return z, None if history is None else torch.stack(scheduler.model_outputs, dim=1)


@contextmanager
def _noise_from(scheduler: Any, draw: Callable[[], Tensor]) -> Iterator[None]:
    """Let the scheduler take its noise from `draw` until the block ends.

    A torch generator's noise would depend on the pair's batch and on restarts. diffusers draws by `randn_tensor`.
    """
    module: Any = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)

    def randn_tensor(shape: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        noise = draw().to(device, dtype)
        if noise.shape != torch.Size(shape):
            raise ValueError(f"{type(scheduler).__name__} draws noise of {tuple(shape)}, not {tuple(noise.shape)}")
        return noise

    if original is None:  # the scheduler adds no noise
        yield
        return
    module.randn_tensor = randn_tensor
    try:
        yield
    finally:
        module.randn_tensor = original
