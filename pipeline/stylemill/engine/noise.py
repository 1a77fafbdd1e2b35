"""All randomness of a run: a function of (seed, identity, step), never of order, batch mates or restarts."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from stylemill.engine.inputs import Pair

Array = npt.NDArray[np.float64]


class Noise:
    """Standard normal draws by numpy's Philox, keyed by SHA-256 of what the draw is for.

    torch's own generators give other numbers on other devices; these are the same everywhere. A test may pass any
    object with these methods to `Engine.sample(noise=…)`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def initial_latents(self, pair: Pair, shape: tuple[int, ...]) -> Array:
        """z_T of a pair, of `shape` (C, h, w).

        It depends on the pair's own seed when there is one, else on the job's seed and on what the pair shows; never
        on ids, settings or position, so that a sweep over settings compares like with like.
        """
        if pair.seed is not None:
            return _normal(shape, "initial latents of a seed", pair.seed)
        content = pair.content.digest if pair.content else None
        return _normal(
            shape,
            "initial latents of a pair",
            self.seed + pair.image_number,
            content,
            [s.digest for s in pair.styles],
            pair.prompt,
        )

    def step_noise(self, identity: str, step: int, shape: tuple[int, ...]) -> Array:
        """Noise of `shape` (C, h, w) that a scheduler adds to a pair in a step."""
        return _normal(shape, "pair at a step", self.seed, identity, step)

    def image_noise(self, digest: str, step: int, shape: tuple[int, ...]) -> Array:
        """Noise of `shape` (C, h, w) for the image with this digest at a step, whatever the image's role."""
        return _normal(shape, "image at a step", self.seed, digest, step)


def identity(pair: Pair) -> str:
    """What tells the noise of a pair's steps from another's: as with initial latents, its seed or what it shows."""
    content = pair.content.digest if pair.content else None
    shown = pair.image_number, content, [style.digest for style in pair.styles], pair.prompt
    return sha256(repr(shown if pair.seed is None else pair.seed).encode()).hexdigest()


def _normal(shape: tuple[int, ...], *key: Any) -> Array:
    words = np.frombuffer(sha256(repr(key).encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words)).standard_normal(shape)
