"""Distances of output images to styles and contents: against the oracle in float64, and what is shared and repeated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.engine import Distances, Engine, InputImage, LabelImage, Noise, Pair, SampleState
from stylemill.engine.distances import TIMESTEP
from stylemill.engine.schedulers import Scheduler
from test_memory import limit_memory

SIZE, WIDE = (64, 64), (128, 64)  # pixels; a latent is 8 pixels wide


def image(number: int, size: tuple[int, int] = SIZE) -> InputImage:
    random, (width, height) = np.random.default_rng(number), size
    patches = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((height // 4, width // 4, 1)))
    return InputImage(f"image {number} {size}", (patches + random.integers(-30, 30, patches.shape)).astype(np.uint8))


def halves(left: int, right: int) -> LabelImage:
    return LabelImage(f"{left} {right}", np.repeat([[left] * 32 + [right] * 32], 64, 0).astype(np.int32))


CONTENT, OTHER, STYLES = image(1), image(2), [image(11), image(12)]
MASKED = Pair((STYLES[0],), SIZE, CONTENT, content_mask=halves(1, 2), style_masks=(halves(2, 1),))
SHARD = [
    Pair((STYLES[0],), SIZE, CONTENT),
    Pair((STYLES[1],), SIZE, CONTENT, content_weight=0.0),  # λ = 0
    Pair((STYLES[1],), SIZE, OTHER, content_weight=0.5),
    Pair((STYLES[1], STYLES[0]), SIZE, CONTENT),  # several styles
    Pair((STYLES[0],), SIZE, prompt="a lighthouse", seed=5),  # no content
    Pair((STYLES[0],), SIZE),
    MASKED,
]
SETTINGS: dict[str, dict[str, Any]] = {
    "guided": {"steps": 3},
    "guided, all settings": {
        "steps": 2,
        "guidance_scale": 3.0,
        "adain": True,
        "query_scale": 1.5,
        "layer_weights": (0.5, 1.0, 2.0, 0.0, 1.5, 1.0),
        "content_schedule": (2.0, 0.0),
    },
    "gradient": {"method": "gradient", "steps": 2, "learning_rate": 20.0},
    "optimization": {"method": "optimization", "steps": 3},
    "optimization from noise": {"method": "optimization", "steps": 2, "init": "noise"},
    "KV injection": {"method": "kv_injection", "steps": 2},
    "another scheduler": {"scheduler": "euler", "steps": 2},
    "tiling": {"steps": 2, "tiling": "both"},
}
WINDOWS = Sampling(steps=1, content_weight=0.0, window=8, window_stride=5)
IN_WINDOWS = [
    Pair((STYLES[0],), WIDE),
    Pair((STYLES[1], STYLES[0]), WIDE, image(3, WIDE)),  # λ = 0, with a content
    Pair((STYLES[1],), SIZE, CONTENT, content_weight=0.5),  # it fits into a window
]


def last(engine: Engine, pairs: Sequence[Pair], settings: Sampling) -> SampleState:
    *_, state = engine.sample(pairs, settings)
    return state


def assert_close(actual: Distances | None, expected: Sequence[float | None]) -> None:
    assert actual is not None
    for found, one in zip(astuple(actual), expected, strict=True):
        assert found == (None if one is None else pytest.approx(one, rel=1e-9, abs=1e-9))


def assert_equals_the_oracle(
    engine: Engine, model: oracle.Model, pairs: Sequence[Pair], settings: Sampling
) -> list[Distances | None]:
    state = last(engine, pairs, settings)
    assert not state.failures
    found = engine.distances(state, settings)
    for pair, latents, actual in zip(pairs, state.latents_of, found, strict=True):
        assert_close(actual, oracle.naive_distances(model, pair, settings, Noise(settings.seed), latents[None]))
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_distances_of_a_mixed_shard_equal_the_oracle(engine: Engine, model: oracle.Model, name: str) -> None:
    settings = Sampling(**SETTINGS[name])
    naive = model if settings.tiling == "none" else oracle.tiled(model, settings.tiling)
    found = assert_equals_the_oracle(engine, naive, SHARD, settings)
    without = [one is not None and one.content is None for one in found]
    assert without == [False, False, False, False, True, True, False]


@pytest.mark.parametrize("tiling", ["none", "x"])
def test_distances_of_larger_outputs_are_means_over_the_windows(
    engine: Engine, model: oracle.Model, tiling: Any
) -> None:
    pairs = IN_WINDOWS if tiling == "none" else IN_WINDOWS[:2]
    found = assert_equals_the_oracle(engine, model, pairs, WINDOWS.model_copy(update={"tiling": tiling}))
    assert [one is not None and one.content is None for one in found] == [True, False, False][: len(pairs)]


def test_the_distances_of_sdxl_equal_the_oracle(sdxl_folder: Path) -> None:
    engine = Engine.load(sdxl_folder, dtype="float64", device="cpu", micro_batch=3)
    settings = Sampling(**{**PRESETS["text-to-image-sdxl"], "steps": 1})
    assert_equals_the_oracle(engine, oracle.Model.load(sdxl_folder), [SHARD[4], *SHARD[2:4]], settings)


def test_they_are_measured_at_the_last_timestep_of_50_steps_whatever_the_job_takes(engine: Engine) -> None:
    assert Scheduler(engine.model.scheduler, Sampling(steps=50)).timesteps[-1] == TIMESTEP
    state = last(engine, SHARD, Sampling(steps=2))
    expected = engine.distances(state, Sampling(steps=2))
    for name in ("guided, all settings", "optimization"):
        assert engine.distances(state, Sampling(**SETTINGS[name])) == expected


def test_a_photo_that_is_not_changed_has_its_own_distance_to_the_style_and_none_to_itself(engine: Engine) -> None:
    state = last(engine, SHARD, Sampling(method="optimization", steps=1))
    pairs = state.inputs.pairs
    state.latents_of = [
        z if pair.content is None else state.inputs.images[pair.content]
        for z, pair in zip(state.latents_of, pairs, strict=True)
    ]
    for pair, found in zip(pairs, engine.distances(state, Sampling()), strict=True):
        assert found is not None
        if pair.content is not None:
            assert_close(found, (found.style_before, found.style_before, 0.0))


# --- what is shared, and what may fail -----------------------------------------------------------------------------


def test_each_style_and_pair_takes_a_pass_and_the_contents_of_a_micro_batch_one_each(engine: Engine) -> None:
    tile = [Pair((style,), SIZE, content) for content in (CONTENT, OTHER) for style in STYLES]
    settings = Sampling(steps=1)
    state, before = last(engine, tile, settings), engine.passes.copy()
    engine.distances(state, settings)
    assert engine.passes - before == {"distance": 2 + 4 + 2}
    windowed, before = last(engine, IN_WINDOWS[:1] * 2, WINDOWS), engine.passes.copy()
    engine.distances(windowed, WINDOWS)
    assert engine.passes - before == {"distance": 1 + 2 * 3 + 2 * 3}  # three windows each


@pytest.mark.parametrize(("micro_batch", "budget"), [(1, 4096), (3, 1)])
def test_micro_batches_and_blocks_change_only_the_rounding(engine: Engine, micro_batch: int, budget: int) -> None:
    state = last(engine, SHARD, Sampling(steps=1))
    other = Engine(engine.model, micro_batch=micro_batch, feature_budget_mb=budget)
    expected = engine.distances(state, Sampling(steps=1))
    for found, one in zip(other.distances(state, Sampling(steps=1)), expected, strict=True):
        assert one is not None
        assert_close(found, astuple(one))


def test_a_failed_pair_has_no_distances_and_does_not_change_those_of_others(engine32: Engine) -> None:
    settings = Sampling(steps=1)
    whole = last(engine32, SHARD, settings)
    expected = engine32.distances(whole, settings)
    lost = [*SHARD[:2], Pair((STYLES[1],), SIZE, InputImage(OTHER.name, None), content_weight=0.5), *SHARD[3:]]
    expected[2] = None
    assert engine32.distances(last(engine32, lost, settings), settings) == expected
    whole.exclude(dict.fromkeys(range(len(SHARD)), "poison"))
    assert engine32.distances(whole, settings) == [None] * len(SHARD)


def test_a_restored_state_has_the_same_distances(engine32: Engine) -> None:
    settings = Sampling(method="optimization", steps=2)
    state = last(engine32, SHARD, settings)
    (inputs, facts), (arrays, progress) = state.export_inputs(), state.export_progress()
    restored = SampleState.restore(inputs, json.loads(json.dumps(facts)), arrays, json.loads(json.dumps(progress)))
    assert engine32.distances(restored, settings) == engine32.distances(state, settings)


def test_after_out_of_memory_they_are_measured_again_with_half_the_micro_batch(folder: Path) -> None:
    engine = Engine.load(folder, dtype="float32", device="cpu", micro_batch=4)
    state = last(engine, SHARD, Sampling(steps=1))
    smaller = Engine(engine.model, micro_batch=2).distances(state, Sampling(steps=1))
    limit_memory(engine.model.unet, "forward", 2)
    assert engine.distances(state, Sampling(steps=1)) == smaller
    assert engine.micro_batch == 2


def test_attention_processors_and_padding_are_as_before(engine: Engine) -> None:
    unet, settings = engine.model.unet, Sampling(steps=1, tiling="x")
    before = {name: type(processor) for name, processor in unet.attn_processors.items()}
    state = last(engine, SHARD[:1], settings)
    engine.distances(state, settings)
    assert {name: type(processor) for name, processor in unet.attn_processors.items()} == before
    assert not [conv for conv in unet.modules() if "_conv_forward" in vars(conv)]


def test_half_precision_gives_finite_distances_near_those_of_float32(folder: Path, engine32: Engine) -> None:
    half = Engine.load(folder, dtype="bfloat16", device="cpu", micro_batch=4)
    state = last(engine32, SHARD, Sampling(steps=1))
    for found, expected in zip(half.distances(state, Sampling()), engine32.distances(state, Sampling()), strict=True):
        assert found is not None
        assert expected is not None
        assert found.style == pytest.approx(expected.style, rel=0.1)
        assert torch.tensor(found.style_before).isfinite()
