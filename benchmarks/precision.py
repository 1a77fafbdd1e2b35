"""The accuracy of half precision: the losses' gradient in fp16 and bf16 against fp32, step by step.

    python benchmarks/precision.py                                         # demo model, this CPU
    python benchmarks/precision.py --model sd15 --size 512 --device cuda   # SD 1.5's dimensions, random weights

At every step, each precision starts from the latents of a float32 run, and from the same clean latents and texts, which
are encoded in float32: only the UNet differs. Trajectories are not compared, because Adam's steps depend on the sign of
small numbers and amplify rounding in every precision. Printed are, for the worst pair, the cosine to the float32
gradient; the share of elements that are exactly zero, minus that of float32; the number of NaN and Inf; and, last, the
difference of a pair's gradient alone and in a batch of all pairs, |difference| / |gradient|, for the worst pair.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stylemill.bench.random_models import random_model
from stylemill.bench.tile import random_images
from stylemill.config.sampling import Sampling
from stylemill.demo.untrained import write_demo_model
from stylemill.engine import Engine, Pair

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Agreement:
    """A gradient (P, C, h, w) in some precision, compared with that in float32."""

    cosine: float  # of the worst pair
    zeros: float  # share of elements that are exactly zero, minus that of float32
    broken: int  # elements that are NaN or Inf

    @classmethod
    def between(cls, gradient: Tensor, exact: Tensor) -> Agreement:
        flat, exact = gradient.double().flatten(1), exact.double().flatten(1)
        zeros = (flat == 0).double().mean() - (exact == 0).double().mean()
        cosine = cosine_similarity(flat, exact, dim=1, eps=0)
        return cls(cosine.min().item(), zeros.item(), int((~flat.isfinite()).sum()))


def in_precision(engine: Engine, dtype: torch.dtype) -> Engine:
    """The same engine with its UNet in `dtype`. VAE and text encoders do not change, so the inputs are the same."""
    # Not diffusers' own `to`, which warns about modules that are meant to stay in float32.
    unet = torch.nn.Module.to(copy.deepcopy(engine.model.unet), dtype)
    return Engine(replace(engine.model, unet=unet), threads=engine.threads, micro_batch=engine.micro_batch)


def agreements(
    exact: Engine, engines: Sequence[Engine], pairs: Sequence[Pair], settings: Sampling
) -> Iterator[list[Agreement]]:
    """Yield, for each step of a run of `exact`, the agreement of each of `engines` with it at its latents."""
    for step, state in enumerate(exact.sample(pairs, settings)):
        latents = state.latents.clone()
        expected = exact.gradient(pairs, settings, latents, step)
        yield [Agreement.between(engine.gradient(pairs, settings, latents, step), expected) for engine in engines]


def alone_against_batch(engine: Engine, pairs: Sequence[Pair], settings: Sampling, step: int) -> float:
    """|difference| / |gradient| of a pair's gradients alone and in one batch with all others, for the worst pair."""
    latents = torch.randn(len(pairs), *latent_shape(engine, pairs[0]), generator=torch.Generator().manual_seed(0))
    micro_batch, gradients = engine.micro_batch, []
    for engine.micro_batch in (1, len(pairs)):
        gradients.append(engine.gradient(pairs, settings, latents, step).double().flatten(1))
    engine.micro_batch = micro_batch
    alone, together = gradients
    return ((together - alone).norm(dim=1) / alone.norm(dim=1)).max().item()


def content_style_pairs(count: int, size: int) -> list[Pair]:
    """Pairs that share no image."""
    images = random_images(2 * count, size)
    return [Pair((style,), (size, size), content) for content, style in zip(images[::2], images[1::2], strict=True)]


def main() -> None:
    options = _parse()
    exact = _engine(options)
    settings = Sampling(steps=options.steps)
    batch = content_style_pairs(options.batch, options.size)
    pairs = batch[: options.pairs]
    halves = {name: in_precision(exact, HALVES[name]) for name in options.precision}
    print(f"{options.model}, {options.size}² pixels, {options.pairs} pairs, {options.steps} steps; {exact.numerics}")

    print("step  " + "  ".join(f"{name:>10}: cosine  zeros over fp32  NaN, Inf" for name in halves))
    rows: list[list[Agreement]] = []
    for step, row in enumerate(agreements(exact, list(halves.values()), pairs, settings)):
        rows.append(row)
        columns = (f"{one.cosine:>18.6f}  {one.zeros:>15.3%}  {one.broken:>8}" for one in row)
        print(f"{step:>4}  " + "  ".join(columns), flush=True)
    for name, column in zip(halves, zip(*rows, strict=True), strict=True):
        cosines = [one.cosine for one in column]
        print(
            f"{name}: cosine {min(cosines):.6f} to {max(cosines):.6f}, at most {max(one.zeros for one in column):.3%} "
            f"more zeros than float32, {sum(one.broken for one in column)} NaN or Inf"
        )
    for name, engine in {"float32": exact, **halves}.items():
        differences = [alone_against_batch(engine, batch, settings, step) for step in {0, options.steps - 1}]
        print(f"{name}: alone against in a batch of {len(batch)}: {max(differences):.2g} of the gradient")


def latent_shape(engine: Engine, pair: Pair) -> tuple[int, int, int]:
    """(C, h, w) of the pair's latents."""
    width, height = (side // engine.model.pixels_per_latent for side in pair.size)
    return engine.model.latent_channels, height, width


def _engine(options: argparse.Namespace) -> Engine:
    if options.model == "sd15":
        return Engine(random_model("sd15", options.device, torch.float32), threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = write_demo_model(Path(folder) / "demo")
        return Engine.load(model, dtype="float32", device=options.device, threads=options.threads)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=["demo", "sd15"], default="demo", help="sd15: the dimensions of SD 1.5, random weights"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=2, help="sampled in float32 and compared at each step")
    parser.add_argument("--batch", type=int, default=16, help="pairs in the batch that a pair alone is compared with")
    parser.add_argument("--precision", nargs="+", choices=HALVES, default=list(HALVES))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
