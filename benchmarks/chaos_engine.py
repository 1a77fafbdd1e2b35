"""The driver that the chaos run disturbs: `stylemill`'s own command line, with engines that note each step they take.

    CHAOS_ENGINE=fake|demo     the fake one below, or the product's
    CHAOS_SECONDS=0.1          that a step of the fake engine takes
    CHAOS_STEPS=FILE           where each step is noted: pid, pairs, step

Only the engine is replaced. Runner, pool, workers, shards and store are the real ones, and so are their processes.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylemill.config.sampling import Sampling
    from stylemill.engine import Pair, Pixels, SampleState

# torch is imported late: the driver on Ray has no use for it.

LINE = "{pid:8} {pairs} {step:4}\n"  # a step as it is noted
LINE_BYTES = 31
SIDE = 8  # pixels of an image that become one latent, along each axis


class FakeEngine:
    """`Engine` as `shard` uses it, without a network: a step moves latents to their styles and adds noise.

    A step depends on the one before and on its number, so that a step left out, done twice or done from another
    checkpoint changes the image.
    """

    model = SimpleNamespace(grid=SIDE, pixels_per_latent=SIDE, truncated_text=lambda text: "")

    def __init__(self, threads: int, micro_batch: int) -> None:
        self.threads, self.micro_batch = threads, micro_batch

    @classmethod
    def load(cls, model: str, *, threads: int, micro_batch: int | str, **_: Any) -> FakeEngine:
        return cls(threads, micro_batch if isinstance(micro_batch, int) else 1)

    def calibrate(self, size: tuple[int, int]) -> int:
        self.micro_batch = 2
        return self.micro_batch

    @property
    def numerics(self) -> dict[str, str | int]:
        return {"device": "fake", "threads": self.threads, "micro_batch": self.micro_batch}

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
        state = state or _begin(pairs, settings)
        if excluded:
            state.exclude(excluded)
        while state.step < settings.steps:
            time.sleep(float(os.environ.get("CHAOS_SECONDS", "0")))
            for place, pair in enumerate(state.inputs.pairs):
                if place not in state.excluded:
                    style = torch.stack([state.inputs.images[one] for one in pair.styles]).mean(0)
                    drawn = torch.from_numpy(draws.step_noise(pair.identity, state.step, tuple(style.shape)))
                    state.latents_of[place] = 0.8 * state.latents_of[place] + 0.2 * style + 9 * drawn.float()
            state.step += 1
            yield state

    def decode(self, state: SampleState, decoders: object = None) -> list[Pixels | None]:
        large = [z.clamp(0, 255).byte().numpy().repeat(SIDE, 1).repeat(SIDE, 2) for z in state.latents_of]
        return [None if place in state.failures else z.transpose(1, 2, 0) for place, z in enumerate(large)]


def _begin(pairs: Sequence[Pair], settings: Sampling) -> SampleState:
    """As the engine's: each image of the shard once, and pairs as indices into them."""
    import torch

    from stylemill.engine.noise import identity
    from stylemill.engine.state import PairInputs, SampleState, ShardInputs

    images = {image.name: image for pair in pairs for image in pair.images}
    places = {name: place for place, name in enumerate(images)}
    shape = (3, pairs[0].size[1] // SIDE, pairs[0].size[0] // SIDE)

    def latents(pixels: Pixels | None) -> torch.Tensor:
        if pixels is None:
            return torch.zeros(shape)
        return torch.from_numpy(pixels[::SIDE, ::SIDE].transpose(2, 0, 1).astype("float32"))

    made = [
        PairInputs(
            content=places[pair.content.name] if pair.content else None,
            styles=tuple(places[style.name] for style in pair.styles),
            prompt=0,
            negative=0,
            content_weight=0.0,
            shape=shape,
            identity=identity(pair),
        )
        for pair in pairs
    ]
    tensors = [latents(image.pixels) for image in images.values()]
    lost = {
        place: "an image of this pair could not be read, or it was not asked for"
        for place, pair in enumerate(pairs)
        if pair.placeholder or any(image.pixels is None for image in pair.images)
    }
    return SampleState(
        inputs=ShardInputs(made, tensors, [image.digest for image in images.values()], texts=[]),
        latents_of=[torch.zeros(shape) if pair.content is None else tensors[pair.content] for pair in made],
        lost_at=torch.full((len(pairs),), -1),
        excluded=lost,
        step=settings.first_step,
        losses=torch.full((len(pairs), 2, 2), torch.nan),
    )


def noting(engine: type[Any]) -> type[Any]:
    """An engine that notes each step it takes before anyone else hears of it."""

    class Noting(engine):
        def sample(self, *arguments: Any, **options: Any) -> Iterator[SampleState]:
            steps = os.open(os.environ["CHAOS_STEPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                for state in super().sample(*arguments, **options):
                    who = ",".join(pair.identity for pair in state.inputs.pairs)
                    pairs = hashlib.sha256(who.encode()).hexdigest()[:16]
                    os.write(steps, LINE.format(pid=os.getpid(), pairs=pairs, step=state.step).encode())
                    yield state
            finally:
                os.close(steps)

    return Noting


def write_model(folder: Path) -> None:
    from stylemill.demo.untrained import write_demo_model

    write_demo_model(folder)


def install_engine() -> None:
    from stylemill.engine import Engine
    from stylemill.execution import shard

    shard.Engine = noting(FakeEngine if os.environ["CHAOS_ENGINE"] == "fake" else Engine)  # type: ignore[misc]


def drive(arguments: Sequence[str], output: str, environment: Mapping[str, str]) -> None:
    """Run the command line in this very process, a forked one, all it says going to the file `output`."""
    os.environ.update(environment)
    with open(output, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    install_engine()
    sys.exit(command(arguments))


def command(arguments: Sequence[str]) -> int:
    from stylemill.cli import main

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return main(list(arguments))
