"""Schedulers of diffusers in lockstep: one scale for all latents, noise and history handed in from outside.

A diffusers scheduler counts its own steps, remembers predictions and draws noise, all for one batch that is sampled
from start to end. Here it is asked for any step of any micro-batch: what it would remember is an argument.
"""

from __future__ import annotations

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
    """The scheduler of a job, on top of the model's own `noise_schedule` (a DDIMScheduler).

    Between steps latents are √ᾱ x + √(1−ᾱ) n, as the UNet takes them, whatever scale the scheduler computes in: so the
    gradient, its learning rate and the noised images mean the same under every scheduler.
    """

    def __init__(self, noise_schedule: Any, settings: Sampling) -> None:
        kind = SCHEDULERS[settings.scheduler]
        made: Any = getattr(diffusers, kind.scheduler)
        # Only what the model was trained with: a model's file may name sigmas and spacings of another sampler.
        trained = signature(diffusers.DDIMScheduler).parameters.keys() & signature(made).parameters.keys()
        config = {name: value for name, value in noise_schedule.config.items() if name in trained}
        self.noise_schedule = noise_schedule
        self.scheduler = made(**{**config, **kind.options})
        self.scheduler.set_timesteps(settings.steps)
        self.scheduler.is_scale_input_called = True  # Euler warns, not knowing that its scale is ours to undo
        self.timesteps = [int(t) for t in self.scheduler.timesteps.tolist()]
        self.history = kind.history if settings.method != "optimization" else 0
        self.first_step = settings.first_step
        self.eta = {} if settings.eta is None else {"eta": settings.eta}
        self.scales = [(sigma**2 + 1) ** 0.5 for sigma in self.scheduler.sigmas] if kind.sigmas else []

    def next_timestep(self, step: int) -> int:
        """s: the timestep that latents stand at after `step`."""
        return self.timesteps[step + 1] if step + 1 < len(self.timesteps) else 0

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """√ᾱ x + √(1−ᾱ) n at `timestep`, of any shape."""
        noised: Tensor = self.noise_schedule.add_noise(latent[None], noise[None], torch.tensor([timestep]))
        return noised[0]

    def step(
        self, epsilon: Tensor, z: Tensor, step: int, history: Tensor | None, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """z (B, C, h, w) after `step` and its history (B, `self.history`, C, h, w), if it has one.

        `draw` gives the noise (B, C, h, w) of this step; it is called by those that add some, and no more than once.
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
    """Let the scheduler take its noise from `draw`: torch's generators know neither pairs nor restarts."""
    module: Any = sys.modules[type(scheduler).__module__]
    theirs = getattr(module, "randn_tensor", None)

    def ours(shape: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        noise = draw().to(device, dtype)
        if noise.shape != torch.Size(shape):
            raise ValueError(f"{type(scheduler).__name__} wants noise of {tuple(shape)}, not {tuple(noise.shape)}")
        return noise

    if theirs is None:  # it has no noise to take
        yield
        return
    module.randn_tensor = ours
    try:
        yield
    finally:
        module.randn_tensor = theirs
