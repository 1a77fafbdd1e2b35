"""All randomness of a run: a function of (seed, identity, step), so that order, batches and restarts do not matter."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from stylemill.engine.inputs import Pair

Array = npt.NDArray[np.float64]


class Noise:
    """Standard normal draws by numpy's Philox generator, keyed by the SHA-256 of what the draw is for.

    They are the same on every device, unlike those of torch's generators. Tests may pass any object with these
    methods to `Engine.sample(noise=…)`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def initial_latents(self, pair: Pair, shape: tuple[int, ...]) -> Array:
        """z_T of a pair, of `shape` (C, h, w).

        It depends on the pair's own seed if it has one, otherwise on the job's seed, the pair's images and its prompt.
        Ids, settings and row numbers do not matter, so a sweep over settings compares images of the same noise.
        """
        if pair.seed is not None:
            return _normal(shape, "initial latents of a seed", pair.seed)
        content = pair.content.digest if pair.content else None
        return _normal(
            shape,
            "initial latents of a pair",
            self.seed + pair.image_number,
            content,
            [style.digest for style in pair.styles],
            pair.prompt,
        )

    def step_noise(self, identity: str, step: int, shape: tuple[int, ...]) -> Array:
        """Noise of `shape` (C, h, w) that a scheduler adds to the pair of this `identity` in a step."""
        return _normal(shape, "pair at a step", self.seed, identity, step)

    def image_noise(self, digest: str, step: int, shape: tuple[int, ...]) -> Array:
        """Noise of `shape` (C, h, w) for the image of this `digest` at a step, the same as style and as content."""
        return _normal(shape, "image at a step", self.seed, digest, step)


def identity(pair: Pair) -> str:
    """The key of the noise of a pair's steps: a digest of its seed, or else of its images, prompt and image number."""
    content = pair.content.digest if pair.content else None
    shown = pair.image_number, content, [style.digest for style in pair.styles], pair.prompt
    return sha256(repr(shown if pair.seed is None else pair.seed).encode()).hexdigest()


def _normal(shape: tuple[int, ...], *key: Any) -> Array:
    words = np.frombuffer(sha256(repr(key).encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words)).standard_normal(shape)
