"""A fake engine with the interface of the real one, for tests and chaos runs in which the engine is not the subject.

    python benchmarks/fake_engine.py run jobs/quickstart.yaml --inline     the command line with the fake engine

Only the engine is replaced. The driver, the stages of a shard and the store are the real ones.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylemill.config.sampling import Sampling
    from stylemill.engine import Pair, Pixels, SampleState

# torch is imported in functions, because the driver on Ray does not need it.

PIXELS_PER_LATENT = 8  # along each axis


class FakeEngine:
    """The part of `Engine` that a shard uses, without a network: a step moves latents to their styles and adds noise.

    A step depends on its number and on the step before. A step that is left out, done twice or started from another
    checkpoint therefore changes the image.
    """

    model = SimpleNamespace(grid=PIXELS_PER_LATENT, pixels_per_latent=PIXELS_PER_LATENT, truncated_text=lambda text: "")

    def __init__(self, threads: int, micro_batch: int) -> None:
        self.threads, self.micro_batch = threads, micro_batch

    @classmethod
    def load(cls, model: str, *, threads: int, micro_batch: int | str, **_: Any) -> FakeEngine:
        return cls(threads, micro_batch if isinstance(micro_batch, int) else 1)

    def calibrate(self, size: tuple[int, int], share: float = 1.0) -> int:
        self.micro_batch = 2
        return self.micro_batch

    @property
    def numerics(self) -> dict[str, str | int]:
        return {"device": "fake", "dtype": "float32", "threads": self.threads, "micro_batch": self.micro_batch}

    def sample(
        self,
        pairs: Sequence[Pair],
        settings: Sampling,
        state: SampleState | None = None,
        noise: None = None,
        excluded: Mapping[int, str] | None = None,
    ) -> Iterator[SampleState]:
        import torch

        from stylemill.engine import Noise

        draws = Noise(settings.seed)
        state = state or _initial_state(pairs, settings)
        if excluded:
            state.exclude(excluded)
        while state.step < settings.steps:
            time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
            for index, pair in enumerate(state.inputs.pairs):
                if index not in state.excluded:
                    style = torch.stack([state.inputs.images[image] for image in pair.styles]).mean(0)
                    drawn = torch.from_numpy(draws.step_noise(pair.identity, state.step, tuple(style.shape)))
                    state.latents_of[index] = 0.8 * state.latents_of[index] + 0.2 * style + 9 * drawn.float()
            state.step += 1
            yield state

    def distances(self, state: SampleState, settings: Sampling) -> list[Any]:
        styles = [state.inputs.images[pair.styles[0]] for pair in state.inputs.pairs]
        # The sum must not depend on the strides, which are others in a restored state.
        found = [
            float((z - style).abs().contiguous().mean()) for z, style in zip(state.latents_of, styles, strict=True)
        ]
        measured = [SimpleNamespace(style_before=0.0, style=one, content=None) for one in found]
        return [None if index in state.failures else one for index, one in enumerate(measured)]

    def decode(self, state: SampleState, decoders: object = None) -> list[Pixels | None]:
        large = [
            z.clamp(0, 255).byte().numpy().repeat(PIXELS_PER_LATENT, 1).repeat(PIXELS_PER_LATENT, 2)
            for z in state.latents_of
        ]
        return [None if index in state.failures else z.transpose(1, 2, 0) for index, z in enumerate(large)]


def _initial_state(pairs: Sequence[Pair], settings: Sampling) -> SampleState:
    """As in the engine: each image of the shard once, and pairs as indices of images."""
    import torch

    from stylemill.engine.noise import identity
    from stylemill.engine.state import PairFailure, PairInputs, SampleState, ShardInputs

    images = {image.name: image for pair in pairs for image in pair.images}
    indices = {name: index for index, name in enumerate(images)}
    shape = (3, pairs[0].size[1] // PIXELS_PER_LATENT, pairs[0].size[0] // PIXELS_PER_LATENT)

    def latents(pixels: Pixels | None) -> torch.Tensor:
        if pixels is None:
            return torch.zeros(shape)
        return torch.from_numpy(pixels[::PIXELS_PER_LATENT, ::PIXELS_PER_LATENT].transpose(2, 0, 1).astype("float32"))

    inputs = [
        PairInputs(
            content=indices[pair.content.name] if pair.content else None,
            styles=tuple(indices[style.name] for style in pair.styles),
            prompt=0,
            negative=0,
            content_weight=0.0,
            shape=shape,
            identity=identity(pair),
        )
        for pair in pairs
    ]
    tensors = [latents(image.pixels) for image in images.values()]
    unreadable = {
        index: PairFailure("sample", "an image of this pair could not be read, or it was not asked for")
        for index, pair in enumerate(pairs)
        if pair.placeholder or any(image.pixels is None for image in pair.images)
    }
    return SampleState(
        inputs=ShardInputs(inputs, tensors, [image.digest for image in images.values()], texts=[]),
        latents_of=[torch.zeros(shape) if pair.content is None else tensors[pair.content] for pair in inputs],
        lost_at=torch.full((len(pairs),), -1),
        excluded=unreadable,
        step=settings.first_step,
    )


def install(engine: type[FakeEngine] = FakeEngine) -> None:
    """Make workers of this process load the fake engine, or a subclass of it."""
    import stylemill.engine

    stylemill.engine.Engine = engine  # type: ignore[misc, assignment]


if __name__ == "__main__":
    from stylemill.cli import main

    install()
    sys.exit(main())
