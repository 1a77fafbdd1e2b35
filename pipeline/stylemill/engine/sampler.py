"""The sampling methods: one step of all pairs of a shard, with the features of their styles and contents."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.engine.attention import Target
from stylemill.engine.batching import Batch, Block
from stylemill.engine.kernels import constant, to_device
from stylemill.engine.noise import Noise
from stylemill.engine.objective import Objective, all_finite
from stylemill.engine.schedulers import Scheduler
from stylemill.engine.state import SampleState, ShardInputs
from stylemill.engine.unet.controlnet import Control
from stylemill.engine.unet.text import Text
from stylemill.engine.unet.tiling import circular_padding
from stylemill.engine.updates import adain, adam_step
from stylemill.engine.windows import Windows


class Sampler:
    """Takes the steps of a shard; holds what all of them share: objective, scheduler, noise, blocks, windows."""

    def __init__(
        self,
        objective: Objective,
        settings: Sampling,
        noise: Noise,
        blocks: list[Block],
        windows: Windows,
    ) -> None:
        self.calls = objective.calls
        self.model = objective.calls.model
        self.scheduler = Scheduler(self.model.scheduler, settings)
        self.objective = objective
        self.settings = settings
        self.noise = noise
        self.blocks = blocks
        self.windows = windows
        self.timesteps = self.scheduler.timesteps
        self._noise_ahead: dict[tuple[int, int], Tensor] = {}  # of the next step, by step and image
        self._overflowed: list[Tensor] = []  # of the gradients of a step: (B,) each
        self._keeps_in_range = False  # whether overflows are looked for at once, which waits for the device

    @property
    def passes(self) -> Counter[str]:
        return self.objective.passes

    def take_step(self, state: SampleState) -> None:
        """Take one step of every pair, in place, and wait until the device has finished it."""
        before = state.copy()
        self.queue_step(state)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        if self._overflowed and torch.cat(self._overflowed).any():
            state.assign(before)
            self._keeps_in_range = True
            try:
                self.queue_step(state)
            finally:
                self._keeps_in_range = False

    def queue_step(self, state: SampleState) -> None:
        """Take one step of every pair, in place; the device may still work on it.

        Nothing waits for the device, so that it is busy without a pause, except for pairs that have a lowered scale.
        """
        self._overflowed.clear()
        methods = {"optimization": self._optimization_step, "kv_injection": self._injection_step}
        step = methods.get(self.settings.method, self._guided_step)
        windowed = self.windows.split(state)
        # Features are extracted with the same padding, since the losses compare what one network computes of both.
        with circular_padding(self.windows.tiling, self.model.unet, *(loaded.net for loaded in self.model.controlnets)):
            for block in self.blocks:
                step(windowed, block)
        self.windows.merge(windowed, state)
        state.step += 1
        self._draw_ahead(windowed.inputs, state.step)

    def _guided_step(self, state: SampleState, block: Block) -> None:
        """Denoise to the next timestep s, then minimize the losses there, by a fresh Adam or plain gradient steps."""
        t, s = self.timesteps[state.step], self.scheduler.next_timestep(state.step)
        guided = self.settings.guides(state.step)
        noised = self._noised_images(state, block, s) if guided else {}
        if minimizes := guided and self.settings.iterations > 0:
            features = self.objective.extract(state.inputs, block.batches, noised, s)
        for batch in active_batches(state, block):
            z = self._denoise(_stacked(state.latents_of, batch), t, state, batch)
            if guided and self.settings.adain:
                z = _adain(state, batch, z, noised)
            if minimizes:
                targets = features.targets(state.inputs, batch)
                z, _ = self._minimize_losses(state, batch, z, z.new_zeros(2, *z.shape), 0, s, targets)
            _store(state, batch, z)

    def _injection_step(self, state: SampleState, block: Block) -> None:
        """Denoise while the layers attend to the styles, noised to the same t, with the queries of the content."""
        t = self.timesteps[state.step]
        if guided := self.settings.guides(state.step):
            noised = self._noised_images(state, block, t)
            features = self.objective.extract(state.inputs, block.batches, noised, t)
        for batch in active_batches(state, block):
            z = _stacked(state.latents_of, batch)
            if guided and self.settings.adain:
                z = _adain(state, batch, z, noised)
            targets = features.targets(state.inputs, batch) if guided else None
            _store(state, batch, self._denoise(z, t, state, batch, targets))

    def _optimization_step(self, state: SampleState, block: Block) -> None:
        """Minimize the losses against the features of the clean images at t, with one Adam for the whole run."""
        if not self.settings.guides(state.step):
            return
        t = self.timesteps[state.step]
        clean = {image: state.inputs.images[image] for image in block.images}
        features = self.objective.extract(state.inputs, block.batches, clean, t)
        done = (state.step - self.settings.start_step) * self.settings.iterations
        for batch in active_batches(state, block):
            targets = features.targets(state.inputs, batch)
            moments = _stacked(state.moments_of, batch).transpose(0, 1)  # (2, B, C, h, w)
            z = _stacked(state.latents_of, batch)
            z, moments = self._minimize_losses(state, batch, z, moments, done, t, targets)
            _store(state, batch, z)
            for place, pair in enumerate(batch):
                state.moments_of[pair] = moments[:, place]

    def gradient(self, state: SampleState, latents: Tensor) -> Tensor:
        """The losses' gradient of guided sampling at latents (P, C, h, w) that step `state.step` denoised to."""
        s = self.scheduler.next_timestep(state.step)
        gradient = torch.zeros_like(latents)
        for block in self.blocks:
            features = self.objective.extract(state.inputs, block.batches, self._noised_images(state, block, s), s)
            for batch in block.batches:
                targets, weights = features.targets(state.inputs, batch), self._content_weights(latents, state, batch)
                z = latents[list(batch)]
                gradient[list(batch)], *_ = self.objective.gradient_in_range(
                    z, s, state.inputs.null_text, weights, targets
                )
        return gradient

    def _noised_images(self, state: SampleState, block: Block, s: int) -> dict[int, Tensor]:
        """The block's clean latents noised to timestep s, each with the noise of its own image at this step."""
        noised = {}
        for image in block.images:
            noise = self._noise_ahead.get((state.step, image))
            noise = self._image_noise(state.inputs, state.step, image) if noise is None else noise
            noised[image] = self.scheduler.add_noise(state.inputs.images[image], noise, s)
        return noised

    def _image_noise(self, inputs: ShardInputs, step: int, image: int) -> Tensor:
        latent = inputs.images[image]
        return to_device(self.noise.image_noise(inputs.digests[image], step, tuple(latent.shape)), latent)

    def _draw_ahead(self, inputs: ShardInputs, step: int) -> None:
        """Draw the noise that the images need at `step`, while the device works on the step before."""
        noised = self.settings.method != "optimization" and step < len(self.timesteps) and self.settings.guides(step)
        images = {image for block in self.blocks for image in block.images} if noised else ()
        self._noise_ahead = {(step, image): self._image_noise(inputs, step, image) for image in images}

    @torch.no_grad()
    def _denoise(
        self, z: Tensor, t: int, state: SampleState, batch: Batch, targets: list[Target] | None = None
    ) -> Tensor:
        """One scheduler step from t, by the UNet's prediction at z or by that of the last gradient pass.

        `targets` are injected into the UNet.
        """
        if self.settings.reuses(state.step):
            epsilon = _stacked(state.predictions_of, batch)
        else:
            epsilon = self._predict_noise(z, t, state, batch, targets)
        pairs = [state.inputs.pairs[pair] for pair in batch]

        def draw() -> Tensor:
            drawn = [self.noise.step_noise(pair.identity, state.step, pair.shape) for pair in pairs]
            return to_device(np.stack(drawn), z)

        history = _stacked(state.history_of, batch) if state.history_of else None
        z, history = self.scheduler.step(epsilon, z, state.step, history, draw)
        if history is not None:
            for place, pair in enumerate(batch):
                state.history_of[pair] = history[place]
        return z

    def _predict_noise(
        self, z: Tensor, t: int, state: SampleState, batch: Batch, targets: list[Target] | None
    ) -> Tensor:
        """ε at z (B, C, h, w) with the pairs' prompts, and classifier-free guidance if its scale is above 1."""
        inputs = state.inputs
        pairs = [inputs.pairs[pair] for pair in batch]
        texts = [inputs.texts[pair.prompt] for pair in pairs]
        copies = 2 if self.settings.guidance_scale > 1 else 1
        if copies == 2:
            texts = [inputs.texts[pair.negative] for pair in pairs] + texts
            targets = targets and [target.repeat(copies) for target in targets]
        z_copies = torch.cat([z, z]) if copies == 2 else z
        self.passes["denoise"] += len(z_copies)
        control = None
        if self.model.controlnets:
            images = [[inputs.controls[number] for number in pair.controls] for pair in pairs]
            control = Control.stack(images * copies, state.step, len(self.timesteps))
        text, query_scale = Text.stack(texts), self.settings.query_scale
        epsilon = self.calls.predict_noise(z_copies, t, text, control, targets, query_scale)
        if copies == 2:
            negative, positive = epsilon.chunk(2)
            epsilon = negative + self.settings.guidance_scale * (positive - negative)
        return epsilon

    def _minimize_losses(
        self, state: SampleState, batch: Batch, z: Tensor, moments: Tensor, done: int, s: int, targets: list[Target]
    ) -> tuple[Tensor, Tensor]:
        """Take `iterations` steps from the latents z (B, C, h, w) at timestep s: the new z and Adam's new moments.

        `done` is the number of earlier steps of the same Adam.
        """
        rate = self.settings.learning_rate
        for count in range(done + 1, done + 1 + self.settings.iterations):
            weights = self._content_weights(z, state, batch)
            if count == 1 and state.moments_of and self.settings.init != "noise":
                # Optimization starts at the content latent, where L_content is 0 and |Q − Qc| has no defined slope. In
                # another batch than the content's, rounding would make it a slope of random sign.
                weights = torch.zeros_like(weights)
            gradient = self._gradient(state, batch, z, s, weights, targets)
            if self.settings.method == "gradient":
                z = z - rate * gradient
            else:
                z, moments = adam_step(z, gradient, moments, count, rate)
        return z, moments

    def _gradient(
        self, state: SampleState, batch: Batch, z: Tensor, s: int, weights: Tensor, targets: list[Target]
    ) -> Tensor:
        """The losses' gradient; whether it overflowed is in `_overflowed`, or it was kept in range.

        The ε of its pass, if that computes one, is stored for the next step.
        """
        excluded = tuple(pair in state.excluded for pair in batch)
        null_text = state.inputs.null_text
        if self._keeps_in_range or any(pair in state.lowered_scales for pair in batch):
            places = [place for place, is_excluded in enumerate(excluded) if is_excluded]
            gradient, scales, epsilon = self.objective.gradient_in_range(z, s, null_text, weights, targets, places)
            state.record_lowered_scales({batch[place]: scale for place, scale in scales.items()})
        else:
            gradient, overflowed, epsilon = self.objective.gradient(z, s, null_text, weights, targets)
            self._overflowed.append(overflowed & ~constant(excluded, torch.bool, z.device))
        if epsilon is not None:
            for place, pair in enumerate(batch):
                state.predictions_of[pair] = epsilon[place]
        return gradient

    def _content_weights(self, z: Tensor, state: SampleState, batch: Batch) -> Tensor:
        """λ of each pair at this step, (B,)."""
        weights = tuple(state.inputs.pairs[pair].content_weight for pair in batch)
        return constant(weights, z.dtype, z.device) * self.settings.content_factor(state.step)


def active_batches(state: SampleState, block: Block) -> list[Batch]:
    """The micro-batches with at least one pair that is not excluded. Features are extracted for the others too."""
    return [batch for batch in block.batches if not all(pair in state.excluded for pair in batch)]


def _stacked(tensors: list[Tensor], batch: Batch) -> Tensor:
    return torch.stack([tensors[pair] for pair in batch])


def _adain(state: SampleState, batch: Batch, z: Tensor, noised: dict[int, Tensor]) -> Tensor:
    return adain(z, [[noised[style] for style in state.inputs.pairs[pair].styles] for pair in batch])


def _store(state: SampleState, batch: Batch, z: Tensor) -> None:
    """Store the latents of a micro-batch. Those of a pair with NaN or Inf become zeros, and the pair counts as lost."""
    finite = all_finite(z)
    z = torch.where(finite[:, None, None, None], z, 0)
    where = constant(batch, torch.long, state.lost_at.device)
    newly_lost = ~finite & (state.lost_at[where] < 0)
    state.lost_at[where] = torch.where(newly_lost, state.step, state.lost_at[where])
    for place, pair in enumerate(batch):
        state.latents_of[pair] = z[place]
