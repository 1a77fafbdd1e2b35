"""The lockstep engine against the naive oracle, which has the same equations without sharing, batching or caching.

Whole runs are compared in float64, where a difference means different equations. In float32, only the gradient of a
step is compared, from the same latents: Adam's steps depend on the sign of small numbers and amplify rounding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, InputImage, Noise, Pair, SampleState

SIZE = (64, 64)  # pixels; latents of 8 x 8


def image(number: int, size: tuple[int, int] = SIZE) -> InputImage:
    """An image of large patches with noise, a different one for each number."""
    random, (width, height) = np.random.default_rng(number), size
    patches = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((height // 4, width // 4, 1)))
    pixels = patches + random.integers(-30, 30, patches.shape)
    return InputImage(f"image {number}", pixels.astype(np.uint8))


CONTENTS = [image(1), image(2), image(3)]
STYLES = [image(11), image(12), image(13)]
TILE = [Pair((style,), SIZE, content) for content in CONTENTS for style in STYLES]
# All that may differ within a shard: contents or none, one or two styles, prompts, seeds, λ.
MIXED = [
    Pair((STYLES[0],), SIZE, CONTENTS[0], prompt="a lighthouse"),
    Pair((STYLES[1],), SIZE, CONTENTS[0], content_weight=0.5),
    Pair((STYLES[2], STYLES[0]), SIZE, CONTENTS[0], seed=7),
    Pair((STYLES[0],), SIZE, prompt="a lighthouse", negative_prompt="blurry"),
    Pair((STYLES[1], STYLES[2]), SIZE),
    Pair((STYLES[2],), SIZE, seed=8, prompt="a horse"),
    Pair((STYLES[0],), SIZE, CONTENTS[2], seed=7, content_weight=0.0),
    Pair((STYLES[1], STYLES[0]), SIZE, CONTENTS[1], prompt="two trees", negative_prompt="text"),
    Pair((STYLES[2],), SIZE, CONTENTS[1]),
]
MIXED_SETTINGS = Sampling(steps=2, guidance_scale=4.0, adain=True)


@pytest.fixture(scope="module")
def mixed(engine: Engine) -> list[Tensor]:
    return trajectory(engine, MIXED, MIXED_SETTINGS)


def assert_equal(actual: Tensor, expected: Tensor, where: str = "") -> None:
    """Equal to 1e-8 in every element: far above float64's rounding, far below the effect of other equations."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=1e-8, msg=lambda text: f"{where}: {text}" if where else text
    )


def trajectory(engine: Engine, pairs: Sequence[Pair], settings: Sampling, noise: Any = None) -> list[Tensor]:
    """The latents after every step, each (P, C, h, w)."""
    return [state.latents.clone() for state in engine.sample(pairs, settings, noise=noise)]


def last(engine: Engine, pairs: Sequence[Pair], settings: Sampling, noise: Any = None) -> SampleState:
    *_, state = engine.sample(pairs, settings, noise=noise)
    return state


# --- the oracle itself ---------------------------------------------------------------------------------------------


def test_the_oracles_hooks_record_the_attention_of_the_equations_in_running_order(model: oracle.Model) -> None:
    latent = torch.from_numpy(Noise(0).image_noise("any", 0, (1, 4, 8, 8)))
    layers = oracle.layers(model, latent, 500, count=16)
    for layer in layers:
        assert_equal(layer.out, oracle.attend(layer.q, layer.k, layer.v))
    tokens = [layer.q.shape[2] for layer in layers]
    assert tokens == [64, 64, 16, 16, 4, 4, 1, 4, 4, 4, 16, 16, 16, 64, 64, 64]  # the mid block is seventh, not last


def test_the_oracles_gradient_is_zero_at_the_latents_of_the_style_itself(model: oracle.Model) -> None:
    pair, settings, noise = Pair((STYLES[0],), SIZE), Sampling(steps=3), Noise(0)
    style = oracle.NaivePair(model, pair, settings, noise).noised_styles(1)[0]
    assert oracle.naive_gradient(model, pair, settings, noise, style, 1).abs().max() < 1e-12


# --- whole runs ----------------------------------------------------------------------------------------------------

ONE_STYLE = Pair((STYLES[0],), SIZE)
WITH_CONTENT = Pair((STYLES[0],), SIZE, CONTENTS[0])
PROMPTED = Pair((STYLES[0],), SIZE, prompt="a lighthouse", negative_prompt="blurry", seed=5)
TWO_STYLES = Pair((STYLES[1], STYLES[2]), SIZE, CONTENTS[1], prompt="a horse", content_weight=0.4)
RUNS = {
    "style only": (ONE_STYLE, Sampling(steps=4, content_weight=0.0)),
    "content": (WITH_CONTENT, Sampling(steps=5)),
    "job's seed": (WITH_CONTENT, Sampling(steps=1, seed=3)),
    "content weight 0": (WITH_CONTENT, Sampling(steps=2, content_weight=0.0)),
    "image in both roles": (Pair((CONTENTS[0],), SIZE, CONTENTS[0]), Sampling(steps=2)),
    "iterations": (WITH_CONTENT, Sampling(steps=2, iterations=3)),
    "no iterations": (PROMPTED, Sampling(steps=3, iterations=0, adain=True)),
    "prompt without guidance": (PROMPTED, Sampling(steps=2, guidance_scale=1.0)),
    "guidance and AdaIN": (PROMPTED, Sampling(steps=3, iterations=2, guidance_scale=7.5, adain=True)),
    "several styles": (TWO_STYLES, Sampling(steps=3, learning_rate=0.015)),
    "several styles, guidance and AdaIN": (TWO_STYLES, Sampling(steps=3, iterations=2, guidance_scale=3.0, adain=True)),
    "late start": (TWO_STYLES, Sampling(steps=3, start_step=2, adain=True)),
    "optimization, content": (WITH_CONTENT, Sampling(method="optimization", steps=3, iterations=2)),
    "optimization, noise": (ONE_STYLE, Sampling(method="optimization", steps=4, content_weight=0.0)),
    "optimization, several styles": (TWO_STYLES, Sampling(method="optimization", steps=2)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_whole_run_equals_the_oracle(engine: Engine, model: oracle.Model, run: str) -> None:
    pair, settings = RUNS[run]
    expected = oracle.naive_sample(model, pair, settings, Noise(settings.seed)).latents
    actual = trajectory(engine, [pair], settings)
    assert len(actual) == settings.steps
    for step, (actual_latents, expected_latents) in enumerate(zip(actual, expected, strict=True)):
        assert_equal(actual_latents, expected_latents, f"after step {step}")


def test_each_pair_of_a_mixed_shard_equals_the_pair_alone(engine: Engine, mixed: list[Tensor]) -> None:
    for i, pair in enumerate(MIXED):
        alone = trajectory(engine, [pair], MIXED_SETTINGS)[-1]
        assert_equal(mixed[-1][i : i + 1], alone)


def test_each_pair_of_a_mixed_shard_equals_the_oracle(model: oracle.Model, mixed: list[Tensor]) -> None:
    for i, pair in enumerate(MIXED):
        expected = oracle.naive_guided(model, pair, MIXED_SETTINGS, Noise(MIXED_SETTINGS.seed)).latents
        assert_equal(mixed[-1][i : i + 1], expected[-1])


def test_an_optimized_shard_equals_the_oracle(engine: Engine, model: oracle.Model) -> None:
    settings, pairs = Sampling(method="optimization", steps=3), [TILE[0], TILE[4], *MIXED[2:5]]
    actual = trajectory(engine, pairs, settings)[-1]
    expected = [oracle.naive_optimization(model, pair, settings, Noise(0)).latents[-1] for pair in pairs]
    assert_equal(actual, torch.cat(expected))


def test_images_and_outputs_of_several_sizes_in_one_shard_equal_the_oracle(engine: Engine, model: oracle.Model) -> None:
    wide, tall = (128, 64), (64, 128)
    pairs = [
        Pair((image(21, wide), STYLES[0]), SIZE, CONTENTS[0]),
        Pair((STYLES[0],), wide, image(22, wide)),
        Pair((image(21, wide),), tall),
    ]
    settings = Sampling(steps=2, adain=True)
    state = last(engine, pairs, settings)
    for latents, pair in zip(state.latents_of, pairs, strict=True):
        expected = oracle.naive_guided(model, pair, settings, Noise(0)).latents[-1]
        assert_equal(latents[None], expected)
    sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in engine.decode(state) if pixels is not None]
    assert sizes == [SIZE, wide, tall]


def test_decoded_images_are_the_latents_through_the_vae(engine: Engine, model: oracle.Model) -> None:
    state = last(engine, TILE[:2], Sampling(steps=1))
    for pixels, latents in zip(engine.decode(state), state.latents, strict=True):
        assert pixels is not None
        assert pixels.shape == (SIZE[1], SIZE[0], 3)
        assert (
            np.abs(pixels.astype(int) - model.decode(latents[None])).max() <= 1
        )  # values halfway between two integers may round to either


# --- float32 -------------------------------------------------------------------------------------------------------


def test_the_float32_gradient_of_each_step_is_that_of_the_oracle(
    engine: Engine, engine32: Engine, model: oracle.Model
) -> None:
    settings, noise, pairs = Sampling(steps=3), Noise(0), [WITH_CONTENT, ONE_STYLE, TWO_STYLES]
    for step, latents in enumerate(trajectory(engine, pairs, settings)):
        latents = latents.float()
        gradients = engine32.gradient(pairs, settings, latents, step, noise=noise)
        for actual, pair, z in zip(gradients, pairs, latents, strict=True):
            expected = oracle.naive_gradient(model, pair, settings, noise, z[None], step)[0]  # in float64
            assert (actual - expected).norm() / expected.norm() < 1e-4


# --- sharing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "denoise_rows"),
    [
        (Sampling(steps=2), 9),
        (Sampling(steps=2, iterations=2, guidance_scale=5.0, adain=True), 18),
        (Sampling(steps=2, method="optimization"), 0),
    ],
    ids=["plain", "guidance", "optimization"],
)
def test_unet_passes_of_a_tile(engine: Engine, settings: Sampling, denoise_rows: int) -> None:
    before = engine.passes.copy()
    last(engine, TILE, settings)
    assert engine.passes - before == Counter(
        denoise=settings.steps * denoise_rows,
        feature=settings.steps * (len(CONTENTS) + len(STYLES)),  # one for each image, not for each pair
        gradient=settings.steps * settings.iterations * len(TILE),
    )


def test_before_guidance_starts_all_unet_passes_denoise(engine: Engine) -> None:
    before = engine.passes.copy()
    last(engine, TILE, Sampling(steps=3, start_step=2))
    assert engine.passes - before == Counter(denoise=27, feature=6, gradient=9)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_the_micro_batch_changes_only_the_rounding(engine: Engine, mixed: list[Tensor], micro_batch: int) -> None:
    actual = trajectory(Engine(engine.model, micro_batch=micro_batch), MIXED, MIXED_SETTINGS)
    assert_equal(actual[-1], mixed[-1])


def test_the_feature_budget_changes_only_the_feature_passes(engine: Engine, mixed: list[Tensor]) -> None:
    limited = Engine(engine.model, feature_budget_mb=0)
    actual = trajectory(limited, MIXED, MIXED_SETTINGS)
    assert_equal(actual[-1], mixed[-1])
    needed = sum(len(pair.styles) + (pair.content is not None and pair.content_weight != 0) for pair in MIXED)
    assert limited.passes["feature"] == MIXED_SETTINGS.steps * needed  # a block for each pair
    assert limited.passes["denoise"] == MIXED_SETTINGS.steps * 2 * len(MIXED)
    assert limited.passes["gradient"] == MIXED_SETTINGS.steps * len(MIXED)


# --- failures, noise, resume ---------------------------------------------------------------------------------------


class NoiseWithNaN(Noise):
    """Noise in which some pairs start from NaN."""

    def __init__(self, seed: int, nan_pairs: Sequence[Pair]) -> None:
        super().__init__(seed)
        self.nan_pairs = nan_pairs

    def initial_latents(self, pair: Pair, shape: tuple[int, ...]) -> Any:
        latents = super().initial_latents(pair, shape)
        return np.full_like(latents, np.nan) if pair in self.nan_pairs else latents


def test_nan_in_one_pair_is_reported_and_does_not_change_the_other_pairs(engine: Engine, mixed: list[Tensor]) -> None:
    bad = 4
    state = last(engine, MIXED, MIXED_SETTINGS, NoiseWithNaN(0, [MIXED[bad]]))
    assert list(state.failures) == [bad]
    assert state.failures[bad]
    others = [i for i in range(len(MIXED)) if i != bad]
    assert torch.equal(state.latents[others], mixed[-1][others])
    assert [i for i, pixels in enumerate(engine.decode(state)) if pixels is None] == [bad]


def test_an_unreadable_image_fails_only_its_pairs(engine: Engine, mixed: list[Tensor]) -> None:
    bad, unreadable = [3, 8], InputImage("unreadable", None)
    pairs = list(MIXED)
    pairs[3] = Pair((unreadable,), SIZE, prompt="a lighthouse")
    pairs[8] = Pair((STYLES[2],), SIZE, unreadable)
    state = last(engine, pairs, MIXED_SETTINGS)
    assert sorted(state.failures) == bad
    others = [i for i in range(len(pairs)) if i not in bad]
    assert torch.equal(state.latents[others], mixed[-1][others])


class TorchNoise:
    """Noise of another generator, to show that engine and oracle draw no noise by themselves."""

    def initial_latents(self, pair: Pair, shape: tuple[int, ...]) -> Any:
        return torch.rand(shape, generator=torch.Generator().manual_seed(len(pair.styles))).double().numpy()

    def image_noise(self, digest: str, step: int, shape: tuple[int, ...]) -> Any:
        seed = int(digest[:8], 16) + step
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double().numpy()


def test_the_noise_can_be_replaced(engine: Engine, model: oracle.Model) -> None:
    settings = Sampling(steps=2, adain=True)
    actual = trajectory(engine, [WITH_CONTENT, TWO_STYLES], settings, TorchNoise())[-1]
    expected = [
        oracle.naive_guided(model, pair, settings, TorchNoise()).latents[-1] for pair in (WITH_CONTENT, TWO_STYLES)
    ]
    assert_equal(actual, torch.cat(expected))


@pytest.mark.parametrize("method", ["guided", "optimization"])
def test_a_restored_run_continues_to_the_same_bits(folder: Path, engine32: Engine, method: Any) -> None:
    denoising = {"guidance_scale": 2.0, "adain": True} if method == "guided" else {}
    settings = Sampling(method=method, steps=3, iterations=2, **denoising)
    pairs, stop = MIXED[1:5], 1
    noise = NoiseWithNaN(0, pairs[3:])
    whole = []
    for state in engine32.sample(pairs, settings, noise=noise):
        whole.append((state.step, state.latents.clone(), dict(state.failures)))
        if state.step == stop:  # later steps must not change what was exported
            inputs, progress = state.export_inputs(), state.export_progress()

    facts, progress_facts = (json.loads(json.dumps(exported[1])) for exported in (inputs, progress))
    restored = SampleState.restore(inputs[0], facts, progress[0], progress_facts)
    assert restored.step == stop
    again = Engine.load(folder, dtype="float32", device="cpu", micro_batch=engine32.micro_batch)
    continued = again.sample(pairs, settings, state=restored, noise=noise)
    for state, (step, latents, failures) in zip(continued, whole[stop:], strict=True):
        assert state.step == step
        assert torch.equal(state.latents, latents)
        assert state.failures == failures != {}
