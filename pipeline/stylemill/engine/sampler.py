"""The ways to use style and content features, one timestep of a whole shard at a time."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.engine.attention import Target, injecting
from stylemill.engine.batching import Batch, Block
from stylemill.engine.noise import Noise
from stylemill.engine.objective import Objective, adain, adam_step
from stylemill.engine.schedulers import Scheduler
from stylemill.engine.state import SampleState, constant
from stylemill.engine.unet.controlnet import Control
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.unet.text import Text
from stylemill.engine.unet.tiling import circular
from stylemill.engine.windows import Windows


class Sampler:
    """Advances a SampleState by one step; holds what is fixed for a shard: scheduler, blocks, noise."""

    def __init__(
        self,
        model: DiffusionModel,
        guide: Objective,
        settings: Sampling,
        noise: Noise,
        blocks: list[Block],
        windows: Windows,
    ) -> None:
        self.model = model
        self.scheduler = Scheduler(model.scheduler, settings)
        self.guide = guide
        self.settings = settings
        self.noise = noise
        self.blocks = blocks
        self.windows = windows
        self.timesteps = self.scheduler.timesteps

    @property
    def passes(self) -> Counter[str]:
        return self.guide.passes

    def advance(self, state: SampleState) -> None:
        """One step for every pair, in place."""
        steps = {"optimization": self._optimized, "kv_injection": self._injected}
        work = self.windows.cut(state)
        # Features too: the losses compare what one and the same network makes of both.
        with circular(self.windows.tiling, self.model.unet, *(control.net for control in self.model.controls)):
            for block in self.blocks:
                steps.get(self.settings.method, self._guided)(work, block)
        self.windows.join(work, state)
        state.step += 1

    def _guided(self, state: SampleState, block: Block) -> None:
        """Denoise to the next timestep s, then pull each latent towards its targets with a fresh Adam, or plainly."""
        t, s = self.timesteps[state.step], self.scheduler.next_timestep(state.step)
        guiding = self.settings.guides(state.step)
        noised = self.noised_images(state, block, s) if guiding else {}
        if descending := guiding and self.settings.iterations > 0:
            features = self.guide.extract(state.inputs, block.batches, noised, s)
        for batch in _asked_for(state, block):
            z = self._denoise(_gather(state.latents_of, batch), t, state, batch)
            if guiding and self.settings.adain:
                z = adain(z, [[noised[style] for style in state.inputs.pairs[pair].styles] for pair in batch])
            if descending:
                targets = features.targets(state.inputs, batch)
                z, _ = self._descend(state, batch, z, z.new_zeros(2, *z.shape), 0, s, targets)
            _put_back(state, batch, z)

    def _injected(self, state: SampleState, block: Block) -> None:
        """Denoise while the layers attend to the styles, noised to the same t, with the queries of the content."""
        t = self.timesteps[state.step]
        if guiding := self.settings.guides(state.step):
            noised = self.noised_images(state, block, t)
            features = self.guide.extract(state.inputs, block.batches, noised, t)
        for batch in _asked_for(state, block):
            z = _gather(state.latents_of, batch)
            if guiding and self.settings.adain:
                z = adain(z, [[noised[style] for style in state.inputs.pairs[pair].styles] for pair in batch])
            targets = features.targets(state.inputs, batch) if guiding else None
            _put_back(state, batch, self._denoise(z, t, state, batch, targets))

    def _optimized(self, state: SampleState, block: Block) -> None:
        """LossGradient each latent towards the features of the clean images at t, with one Adam over the run."""
        if not self.settings.guides(state.step):
            return
        t = self.timesteps[state.step]
        clean = {image: state.inputs.images[image] for image in block.images}
        features = self.guide.extract(state.inputs, block.batches, clean, t)
        done = (state.step - self.settings.start_step) * self.settings.iterations
        for batch in _asked_for(state, block):
            targets = features.targets(state.inputs, batch)
            moments = _gather(state.moments_of, batch).transpose(0, 1)  # (2, B, C, h, w)
            z = _gather(state.latents_of, batch)
            z, moments = self._descend(state, batch, z, moments, done, t, targets)
            _put_back(state, batch, z)
            for place, pair in enumerate(batch):
                state.moments_of[pair] = moments[:, place]

    def gradient(self, state: SampleState, latents: Tensor) -> Tensor:
        """The gradient (P, C, h, w) that guided sampling would follow from `latents` after denoising `state.step`."""
        s = self.scheduler.next_timestep(state.step)
        gradient = torch.zeros_like(latents)
        for block in self.blocks:
            features = self.guide.extract(state.inputs, block.batches, self.noised_images(state, block, s), s)
            for batch in block.batches:
                targets, weights = features.targets(state.inputs, batch), self._weights(latents, state, batch)
                pull = self.guide.gradient(latents[list(batch)], s, state.inputs.null_text, weights, targets)
                gradient[list(batch)] = pull.gradient
        return gradient

    def noised_images(self, state: SampleState, block: Block, s: int) -> dict[int, Tensor]:
        """The block's clean latents noised to s, each with the noise of its own picture at this step."""
        return {
            image: self._add_noise(state.inputs.images[image], state.inputs.digests[image], state.step, s)
            for image in block.images
        }

    def _add_noise(self, latent: Tensor, digest: str, step: int, s: int) -> Tensor:
        noise = torch.from_numpy(self.noise.image_noise(digest, step, tuple(latent.shape))).to(latent)
        return self.scheduler.add_noise(latent, noise, s)

    @torch.no_grad()
    def _denoise(
        self, z: Tensor, t: int, state: SampleState, batch: Batch, inject: list[Target] | None = None
    ) -> Tensor:
        """One scheduler step t -> s, with classifier-free guidance when its scale is above 1."""
        inputs = state.inputs
        pairs = [inputs.pairs[pair] for pair in batch]
        texts = [inputs.texts[pair.prompt] for pair in pairs]
        doubled = self.settings.guidance_scale > 1
        if doubled:
            texts = [inputs.texts[pair.negative] for pair in pairs] + texts
            inject = inject and [target.twice() for target in inject]
        many = torch.cat([z, z]) if doubled else z
        self.passes["denoise"] += len(many)
        control = None
        if self.model.controls:
            control = Control.of(inputs, pairs, state.step, len(self.timesteps), len(many) // len(z))
        with injecting(self.guide.layers, inject, self.settings.query_scale) if inject else nullcontext():
            epsilon = self.model.predict_noise(many, t, Text.stack(texts), control)
        if doubled:
            without, towards = epsilon.chunk(2)
            epsilon = without + self.settings.guidance_scale * (towards - without)

        def draw() -> Tensor:
            own = [self.noise.step_noise(pair.identity, state.step, pair.shape) for pair in pairs]
            return torch.from_numpy(np.stack(own)).to(z)

        history = _gather(state.history_of, batch) if state.history_of else None
        z, history = self.scheduler.step(epsilon, z, state.step, history, draw)
        if history is not None:
            for place, pair in enumerate(batch):
                state.history_of[pair] = history[place]
        return z

    def _descend(
        self, state: SampleState, batch: Batch, z: Tensor, moments: Tensor, done: int, s: int, targets: list[Target]
    ) -> tuple[Tensor, Tensor]:
        """`iterations` steps down the losses from the micro-batch z, after `done` earlier ones of the same Adam."""
        rate = self.settings.learning_rate
        for count in range(done + 1, done + 1 + self.settings.iterations):
            weights = self._weights(z, state, batch)
            if count == 1 and state.moments_of and self.settings.init != "noise":
                # Optimization starts at the content itself, where L_content is 0 and |Q − Qc| has no slope; in another
                # batch than the content's, rounding would give it one of random sign.
                weights = torch.zeros_like(weights)
            pull = self.guide.gradient(z, s, state.inputs.null_text, weights, targets)
            state.note_losses(batch, pull.losses)
            if self.settings.method == "gradient":
                z = z - rate * pull.gradient
            else:
                z, moments = adam_step(z, pull.gradient, moments, count, rate)
        return z, moments

    def _weights(self, z: Tensor, state: SampleState, batch: Batch) -> Tensor:
        """λ of each pair at this step, (B,)."""
        own = tuple(state.inputs.pairs[pair].content_weight for pair in batch)
        return constant(own, z.dtype, z.device) * self.settings.content_factor(state.step)


def _asked_for(state: SampleState, block: Block) -> list[Batch]:
    """The micro-batches with a pair that can succeed. The features of the block are read for all of them, as ever."""
    return [batch for batch in block.batches if not all(pair in state.excluded for pair in batch)]


def _gather(tensors: list[Tensor], batch: Batch) -> Tensor:
    return torch.stack([tensors[pair] for pair in batch])


def _put_back(state: SampleState, batch: Batch, z: Tensor) -> None:
    """Store a micro-batch; a pair that is not finite any more is noted and zero-filled, in its slot."""
    finite = z.isfinite().flatten(1).all(1)
    z = torch.where(finite[:, None, None, None], z, 0)
    where = constant(batch, torch.long, state.lost_at.device)
    newly = ~finite & (state.lost_at[where] < 0)
    state.lost_at[where] = torch.where(newly, state.step, state.lost_at[where])
    for place, pair in enumerate(batch):
        state.latents_of[pair] = z[place]
