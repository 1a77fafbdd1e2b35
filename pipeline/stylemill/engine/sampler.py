"""The two ways to use attention distillation, one timestep of a whole shard at a time."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from stylemill.engine.guidance import Features, Guide, adain, adam_step
from stylemill.engine.layout import Batch, Block
from stylemill.engine.model import DiffusionModel
from stylemill.engine.noise import Noise
from stylemill.engine.state import Inputs, SampleState
from stylemill.settings import Sampling


class Sampler:
    """Advances a SampleState by one step; holds what is fixed for a shard: scheduler, blocks, noise."""

    def __init__(
        self, model: DiffusionModel, guide: Guide, settings: Sampling, noise: Noise, blocks: list[Block]
    ) -> None:
        self.model = model.with_steps(settings.steps)
        self.guide = guide
        self.settings = settings
        self.noise = noise
        self.blocks = blocks
        self.timesteps: list[int] = self.model.scheduler.timesteps.tolist()

    @property
    def passes(self) -> Counter[str]:
        return self.guide.passes

    def advance(self, state: SampleState) -> None:
        """One step for every pair, in place."""
        step_of_a_block = self._guided if self.settings.method == "guided" else self._optimized
        for block in self.blocks:
            step_of_a_block(state, block)
        state.step += 1

    def _guided(self, state: SampleState, block: Block) -> None:
        """Denoise to the next timestep s, then pull each latent towards its targets with a fresh Adam."""
        t, s = self.timesteps[state.step], self.guided_timestep(state.step)
        guiding = state.step >= self.settings.start_step
        noised = self.noised_images(state, block, s) if guiding else {}
        if descending := guiding and self.settings.iterations > 0:
            features = self.guide.extract(state.inputs, block.batches, noised, s)
        for batch in block.batches:
            z = self._denoise(_gather(state.latents_of, batch), t, state.inputs, batch)
            if guiding and self.settings.adain:
                z = adain(z, [[noised[style] for style in state.inputs.pairs[pair].styles] for pair in batch])
            if descending:
                z, _ = self._descend(z, z.new_zeros(2, *z.shape), 0, s, state.inputs, batch, features)
            _put_back(state, batch, z)

    def _optimized(self, state: SampleState, block: Block) -> None:
        """Pull each latent towards the features of the clean images at t, with one Adam over the run."""
        t = self.timesteps[state.step]
        clean = {image: state.inputs.images[image] for image in block.images}
        features = self.guide.extract(state.inputs, block.batches, clean, t)
        done = state.step * self.settings.iterations
        for batch in block.batches:
            moments = _gather(state.moments_of, batch).transpose(0, 1)  # (2, B, C, h, w)
            z, moments = self._descend(
                _gather(state.latents_of, batch), moments, done, t, state.inputs, batch, features
            )
            _put_back(state, batch, z)
            for place, pair in enumerate(batch):
                state.moments_of[pair] = moments[:, place]

    def gradient(self, state: SampleState, latents: Tensor) -> Tensor:
        """The gradient (P, C, h, w) that guided sampling would follow from `latents` after denoising `state.step`."""
        s = self.guided_timestep(state.step)
        gradient = torch.zeros_like(latents)
        for block in self.blocks:
            features = self.guide.extract(state.inputs, block.batches, self.noised_images(state, block, s), s)
            for batch in block.batches:
                targets, weights = features.targets(state.inputs, batch), _weights(latents, state.inputs, batch)
                pulled = self.guide.gradient(latents[list(batch)], s, state.inputs.null_text, weights, targets)
                gradient[list(batch)] = pulled
        return gradient

    def guided_timestep(self, step: int) -> int:
        """s: the timestep the latents stand at after the denoising of `step`."""
        return self.timesteps[step + 1] if step + 1 < len(self.timesteps) else 0

    def noised_images(self, state: SampleState, block: Block, s: int) -> dict[int, Tensor]:
        """The block's clean latents noised to s, each with the noise of its own picture at this step."""
        return {
            image: self._add_noise(state.inputs.images[image], state.inputs.digests[image], state.step, s)
            for image in block.images
        }

    def _add_noise(self, latent: Tensor, digest: str, step: int, s: int) -> Tensor:
        noise = torch.from_numpy(self.noise.image_noise(digest, step, tuple(latent.shape))).to(latent)
        noised: Tensor = self.model.scheduler.add_noise(latent[None], noise[None], torch.tensor([s]))
        return noised[0]

    @torch.no_grad()
    def _denoise(self, z: Tensor, t: int, inputs: Inputs, batch: Batch) -> Tensor:
        """One scheduler step t -> s, with classifier-free guidance when its scale is above 1."""
        pairs = [inputs.pairs[pair] for pair in batch]
        text = torch.stack([inputs.texts[pair.prompt] for pair in pairs])
        if self.settings.guidance_scale > 1:
            negative = torch.stack([inputs.texts[pair.negative] for pair in pairs])
            both = self.model.predict_noise(torch.cat([z, z]), t, torch.cat([negative, text]))
            self.passes["denoise"] += len(both)
            without, towards = both.chunk(2)
            epsilon = without + self.settings.guidance_scale * (towards - without)
        else:
            epsilon = self.model.predict_noise(z, t, text)
            self.passes["denoise"] += len(z)
        previous: Tensor = self.model.scheduler.step(epsilon, t, z).prev_sample
        return previous

    def _descend(
        self, z: Tensor, moments: Tensor, done: int, s: int, inputs: Inputs, batch: Batch, features: Features
    ) -> tuple[Tensor, Tensor]:
        """`iterations` Adam steps on the micro-batch z, after `done` earlier ones."""
        targets = features.targets(inputs, batch)
        weights = _weights(z, inputs, batch)
        for count in range(done + 1, done + 1 + self.settings.iterations):
            # Optimization starts at the content itself, where L_content is 0 and |Q − Qc| has no slope; in another
            # batch than the content's, rounding would give it one of random sign.
            at_content = count == 1 and self.settings.method == "optimization"
            pull = torch.zeros_like(weights) if at_content else weights
            gradient = self.guide.gradient(z, s, inputs.null_text, pull, targets)
            z, moments = adam_step(z, gradient, moments, count, self.settings.learning_rate)
        return z, moments


def _weights(z: Tensor, inputs: Inputs, batch: Batch) -> Tensor:
    return z.new_tensor([inputs.pairs[pair].content_weight for pair in batch])  # λ, (B,)


def _gather(tensors: list[Tensor], batch: Batch) -> Tensor:
    return torch.stack([tensors[pair] for pair in batch])


def _put_back(state: SampleState, batch: Batch, z: Tensor) -> None:
    """Store a micro-batch; a pair that is not finite any more is noted and zero-filled, in its slot."""
    finite = z.isfinite().flatten(1).all(1)
    z = torch.where(finite[:, None, None, None], z, 0)
    where = torch.tensor(batch, device=state.lost_at.device)
    newly = ~finite & (state.lost_at[where] < 0)
    state.lost_at[where] = torch.where(newly, state.step, state.lost_at[where])
    for place, pair in enumerate(batch):
        state.latents_of[pair] = z[place]
