"""SDXL and Stable Diffusion 2.x: whole runs in float64 against the oracle, and what differs from Stable Diffusion 1.x.

The oracle encodes prompts and image sizes by diffusers' own pipeline.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import oracle
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.engine import Engine, Noise, Pair, SampleState
from stylemill.engine.attention import self_attention_layers
from stylemill.engine.unet.text import Text
from stylemill.planning.model_shape import read_shape
from test_equivalence import CONTENTS, SIZE, STYLES, assert_equal, image, last, trajectory

PROMPTED = Pair((STYLES[0],), SIZE, prompt="a lighthouse", negative_prompt="blurry", seed=5)
TRANSFER = Pair((STYLES[1],), SIZE, CONTENTS[0])
TWO_STYLES = Pair((STYLES[1], STYLES[2]), SIZE, CONTENTS[1], prompt="a horse", content_weight=0.4)
TEXT_TO_IMAGE = Sampling(**{**PRESETS["text-to-image-sdxl"], "steps": 2})
MIXED = [PROMPTED, TRANSFER, TWO_STYLES, Pair((STYLES[0],), SIZE, CONTENTS[0], prompt="a horse")]


@pytest.fixture(scope="module")
def engine(sdxl_folder: Path) -> Engine:
    return Engine.load(sdxl_folder, dtype="float64", device="cpu", micro_batch=3)


@pytest.fixture(scope="module")
def model(sdxl_folder: Path) -> oracle.Model:
    return oracle.Model.load(sdxl_folder)


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        (PROMPTED, TEXT_TO_IMAGE),
        (TRANSFER, Sampling(steps=2)),
        (TWO_STYLES, Sampling(steps=2, guidance_scale=3.0, adain=True)),
        (TWO_STYLES, Sampling(method="optimization", steps=2)),
        (TWO_STYLES, Sampling(method="kv_injection", steps=2)),
    ],
    ids=["text to image", "guided transfer", "several styles, guidance and AdaIN", "optimization", "KV injection"],
)
def test_a_whole_run_equals_the_oracle(engine: Engine, model: oracle.Model, pair: Pair, settings: Sampling) -> None:
    expected = oracle.naive_sample(model, pair, settings, Noise(settings.seed)).latents
    for actual, latents in zip(trajectory(engine, [pair], settings), expected, strict=True):
        assert_equal(actual, latents)


def test_each_pair_of_a_mixed_shard_equals_the_pair_alone(engine: Engine) -> None:
    mixed = trajectory(engine, MIXED, TEXT_TO_IMAGE)[-1]
    for place, pair in enumerate(MIXED):
        assert_equal(mixed[place : place + 1], trajectory(engine, [pair], TEXT_TO_IMAGE)[-1])


def test_the_size_of_each_image_is_a_condition_of_the_unet(engine: Engine, model: oracle.Model) -> None:
    pair, settings = Pair((image(21, (128, 64)),), SIZE, CONTENTS[0]), Sampling(steps=1)
    expected = oracle.naive_guided(model, pair, settings, Noise(0)).latents[-1]
    assert_equal(last(engine, [pair], settings).latents, expected)


def test_a_restored_run_continues_to_the_same_bits(engine: Engine) -> None:
    whole = []
    for state in engine.sample(MIXED[:2], TEXT_TO_IMAGE):
        whole.append(state.latents.clone())
        if state.step == 1:
            inputs, progress = state.export_inputs(), state.export_progress()
    restored = SampleState.restore(
        inputs[0], json.loads(json.dumps(inputs[1])), progress[0], json.loads(json.dumps(progress[1]))
    )
    *_, continued = engine.sample([], TEXT_TO_IMAGE, state=restored)
    assert torch.equal(continued.latents, whole[-1])


def test_prompts_and_sizes_are_encoded_as_in_diffusers_pipeline(engine: Engine, model: oracle.Model) -> None:
    latent = torch.zeros(1, 4, 16, 8, dtype=torch.float64)
    for prompt in ("", "a lighthouse at night"):
        actual = engine.model.conditions(latent, engine.model.encode_text(prompt))
        expected = model.conditions(prompt, latent)
        assert_equal(actual["encoder_hidden_states"], expected["encoder_hidden_states"])
        assert_equal(actual["added_cond_kwargs"]["text_embeds"], expected["added_cond_kwargs"]["text_embeds"])
        assert actual["added_cond_kwargs"]["time_ids"].tolist() == [[128, 64, 0, 0, 128, 64]]


def test_the_null_prompt_is_encoded_and_not_zeros(engine: Engine) -> None:
    null = engine.model.encode_text("")
    assert null.pooled is not None
    assert null.hidden.abs().min() > 0
    assert null.pooled.abs().max() > 0


def test_texts_are_stacked_to_a_batch(engine: Engine) -> None:
    batch = Text.stack([engine.model.encode_text(text) for text in ("", "a horse")])
    assert (batch.hidden.shape, batch.pooled is not None and batch.pooled.shape) == ((2, 77, 48), (2, 16))
    assert batch.expand(2) is batch


def test_layers_64_to_69_are_used_and_the_plan_knows_their_size(engine: Engine, sdxl_folder: Path) -> None:
    layers, shape = self_attention_layers(engine.model.unet), read_shape(sdxl_folder)
    assert len(layers) == len(shape.attention) == 70
    assert [layer.processor for layer in engine.layers] == [layer.processor for layer in layers[64:]]
    widths = [engine.model.unet.get_submodule(layer.name).inner_dim for layer in layers]
    assert list(zip([layer.level for layer in layers], widths, strict=True)) == [layer[:2] for layer in shape.attention]
    elements = sum(layer.config.elements((8, 16)) for layer in engine.layers)
    assert elements == shape.feature_elements(None, (8, 16)) == 6 * 32 * (8 * 4)
    assert engine.model.grid == shape.grid == 32


def test_the_vae_stays_in_float32_if_it_would_overflow_in_float16(sdxl_folder: Path, tmp_path: Path) -> None:
    half = Engine.load(sdxl_folder, dtype="float16", device="cpu").model
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    assert Engine.load(sdxl_folder, dtype="bfloat16", device="cpu").model.vae.dtype == torch.bfloat16
    fixed = _changed(sdxl_folder, tmp_path / "fixed", "vae/config.json", force_upcast=False)
    assert Engine.load(fixed, dtype="float16", device="cpu").model.vae.dtype == torch.float16


def test_a_model_that_predicts_v_as_stable_diffusion_2_does(folder: Path, tmp_path: Path) -> None:
    v_folder = _changed(folder, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    engine, settings = Engine.load(v_folder, dtype="float64", device="cpu"), Sampling(steps=2, guidance_scale=3.0)
    expected = oracle.naive_guided(oracle.Model.load(v_folder), PROMPTED, settings, Noise(0)).latents[-1]
    assert_equal(last(engine, [PROMPTED], settings).latents, expected)
    epsilon = last(Engine.load(folder, dtype="float64", device="cpu"), [PROMPTED], settings).latents
    assert (epsilon - expected).abs().max() > 0.1  # the setting has an effect


def _changed(model: Path, copy: Path, file: str, **values: object) -> Path:
    shutil.copytree(model, copy)
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**config, **values}))
    return copy
