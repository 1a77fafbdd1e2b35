"""NaN and Inf: of the VAE and the text encoders, which fail a row at its own stage, and of gradients in float16, which
are repeated with a smaller loss scale. No other row changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_runs import make_run
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, InputImage, Pair, SampleState
from stylemill.execution.attempt import Progress, Run
from stylemill.execution.shard import process_shard

SETTINGS = Sampling(steps=2)
SIZE = (64, 64)


def image(number: int) -> InputImage:
    noise = np.random.default_rng(number)
    return InputImage(f"image {number}", noise.integers(0, 256, (64, 64, 3), dtype=np.uint8))


WHITE = InputImage("white.png", np.full((64, 64, 3), 255, np.uint8))
STYLE, CONTENTS = image(0), [image(1), image(2), image(3)]


def load(folder: Path, dtype: Any = "float32") -> Engine:
    return Engine.load(folder, dtype=dtype, device="cpu", micro_batch=2)


def overflow(module: Any, name: str, overflows: Callable[[torch.Tensor], bool]) -> None:
    """Let a method give a result with a single Inf where `overflows` of its argument."""
    real = getattr(module, name)

    def wrapped(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        result = real(x, *rest, **options)
        if overflows(x):
            result = result.clone()
            result.view(-1)[7] = torch.inf
        return result

    setattr(module, name, wrapped)


def white(x: torch.Tensor) -> bool:
    return bool((x == 1).all())


def every(number: int) -> Callable[[torch.Tensor], bool]:
    """True for each call with this number, of three, from 0."""
    calls: list[torch.Tensor] = []

    def counted(x: torch.Tensor) -> bool:
        calls.append(x)
        return len(calls) % 3 == number + 1

    return counted


def last(engine: Engine, pairs: list[Pair]) -> SampleState:
    *_, state = engine.sample(pairs, SETTINGS)
    return state


def test_an_image_that_overflows_in_the_encoder_fails_its_pairs_before_sampling(folder: Path) -> None:
    pairs = [Pair((STYLE,), SIZE, content) for content in CONTENTS]
    pairs += [Pair((STYLE,), SIZE, WHITE), Pair((STYLE, WHITE), SIZE), Pair((STYLE,), SIZE)]
    expected = last(load(folder), pairs)
    engine = load(folder)
    overflow(engine.model.vae.encoder, "forward", white)
    state = last(engine, pairs)
    assert {pair: failure.stage for pair, failure in state.failures.items()} == {3: "encode", 4: "encode"}
    assert "white.png: the VAE's encoder gave NaN or Inf; check the weights" in state.failures[3].message
    for pair in (0, 1, 2, 5):
        assert torch.equal(state.latents_of[pair], expected.latents_of[pair])
    assert [pixels is None for pixels in engine.decode(state)] == [False, False, False, True, True, False]


def test_in_float16_the_message_names_other_precisions(folder: Path) -> None:
    engine = load(folder, "float16")
    engine.model.vae.half()  # the untrained model's configuration asks for float32, as SDXL's does
    overflow(engine.model.vae.encoder, "forward", white)
    overflow(engine.model.vae.decoder, "forward", every(0))
    state = last(engine, [Pair((STYLE,), SIZE, WHITE), Pair((STYLE,), SIZE)])
    engine.decode(state)
    for pair, part in enumerate(("white.png: the VAE's encoder", "the VAE's decoder")):
        expected = f"{part} gave NaN or Inf in float16; set model.dtype to bfloat16 or float32"
        assert state.failures[pair].message == expected


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_text_that_overflows_in_the_text_encoder_fails_its_pairs(demo_models: dict[str, Path], kind: str) -> None:
    size = SIZE if kind == "sd" else (64, 64)
    pairs = [
        Pair((STYLE,), size, prompt="a hill"),
        Pair((STYLE,), size),
        Pair((STYLE,), size, negative_prompt="a hill"),
    ]
    engine = load(demo_models[kind])
    encode, expected = engine.model.text_encoders[-1].forward, last(load(demo_models[kind]), pairs)
    plain = engine.model.tokenizers[-1]("", padding="max_length", return_tensors="pt").input_ids

    def broken(tokens: torch.Tensor, **options: Any) -> Any:
        encoded = encode(tokens, **options)
        if not torch.equal(tokens, plain):
            (encoded.text_embeds if kind == "sdxl" else encoded.last_hidden_state).view(-1)[3] = torch.nan
        return encoded

    engine.model.text_encoders[-1].forward = broken
    state = last(engine, pairs)
    assert {pair: failure.stage for pair, failure in state.failures.items()} == {0: "encode", 2: "encode"}
    assert "prompt 'a hill': the text encoder gave NaN or Inf" in state.failures[0].message
    assert torch.equal(state.latents_of[1], expected.latents_of[1])


def test_an_image_that_overflows_in_the_decoder_fails_its_pair_and_is_not_black(folder: Path) -> None:
    engine = load(folder)
    state = last(engine, [Pair((STYLE,), SIZE, content) for content in CONTENTS])
    expected = engine.decode(state)
    overflow(engine.model.vae.decoder, "forward", every(1))
    first, second, third = engine.decode(state)
    assert second is None
    assert np.array_equal(first, expected[0])  # type: ignore[arg-type]
    assert np.array_equal(third, expected[2])  # type: ignore[arg-type]
    assert {pair: failure.stage for pair, failure in state.failures.items()} == {1: "decode"}
    assert "the VAE's decoder gave NaN or Inf" in state.failures[1].message


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["guided", "optimization"])
def test_a_pair_whose_losses_are_not_finite_fails_although_its_gradient_is_zero(folder: Path, method: str) -> None:
    """The slope of |a − b| at NaN is 0: such a pair would be sampled on without guidance."""
    settings = SETTINGS.model_copy(update={"method": method, "steps": 3})
    engine = load(folder)
    state, expected = (next(engine.sample([Pair((STYLE,), SIZE), Pair((image(4),), SIZE)], settings)) for _ in "12")
    state.inputs.images[1].view(-1)[5] = torch.inf
    *_, state = engine.sample([], settings, state)
    *_, expected = engine.sample([], settings, expected)
    assert {pair: failure.stage for pair, failure in state.failures.items()} == {1: "sample"}
    assert "NaN or Inf in step 1" in state.failures[1].message
    assert torch.equal(state.latents_of[0], expected.latents_of[0])


# --- gradients in float16 ---------------------------------------------------------------------------------------------

LARGE_WEIGHT = 1000.0  # of the content: with it the gradient overflows at a loss scale of 2¹⁶ and of 2¹²


@pytest.fixture(scope="module")
def half(demo_models: dict[str, Path]) -> Engine:
    return Engine.load(demo_models["sd"], dtype="float16", device="cpu", micro_batch=4)


def weighted(place: int | None) -> list[Pair]:
    """Four pairs; the one at `place` has LARGE_WEIGHT."""
    contents = [*CONTENTS, image(4)]
    return [
        Pair((STYLE,), SIZE, content, content_weight=LARGE_WEIGHT if number == place else None)
        for number, content in enumerate(contents)
    ]


def test_a_gradient_that_overflows_is_repeated_with_a_smaller_loss_scale_for_its_pair_alone(
    half: Engine, engine32: Engine
) -> None:
    z = torch.randn(4, half.model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    usual = half.gradient(weighted(None), SETTINGS, z, 0)
    half.passes.clear()
    gradient = half.gradient(weighted(1), SETTINGS, z, 0)
    assert half.passes["gradient"] == 3 * 4, "at 2¹⁶, 2¹² and 2⁸"
    exact = engine32.gradient(weighted(1), SETTINGS, z, 0)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(1), exact.flatten(1)).min() > 0.999
    torch.testing.assert_close(gradient[1].norm(), exact[1].norm(), rtol=0.01, atol=0)
    for other in (0, 2, 3):
        assert torch.equal(gradient[other], usual[other])


def test_a_pair_with_a_smaller_loss_scale_is_sampled_and_a_resumed_state_knows_the_scale(half: Engine) -> None:
    expected = last(half, weighted(None))
    states = half.sample(weighted(1), SETTINGS)
    state = next(states)
    inputs, progress = state.export_inputs(), state.export_progress()
    *_, state = states
    assert state.failures == expected.lowered_scales == {}
    assert state.lowered_scales == {1: 256.0}
    for other in (0, 2, 3):
        assert torch.equal(state.latents_of[other], expected.latents_of[other])
    facts = json.loads(json.dumps((inputs[1], progress[1])))
    restored = SampleState.restore(inputs[0], facts[0], progress[0], facts[1])
    assert restored.lowered_scales == {1: 256.0}
    *_, continued = half.sample([], SETTINGS, restored)
    assert torch.equal(continued.latents, state.latents)


def test_the_loss_scale_of_a_pair_is_the_smallest_of_its_windows(half: Engine) -> None:
    weights = [1e3] * len(half.layers)
    settings = SETTINGS.model_copy(update={"window": 8, "content_weight": 0.0, "layer_weights": weights})
    *_, state = half.sample([Pair((STYLE,), (128, 64)), Pair((STYLE,), (128, 64), seed=1)], settings)
    assert state.failures == {}
    assert sorted(state.lowered_scales) == [0, 1]


# --- a whole shard ----------------------------------------------------------------------------------------------------


def committed(run: Run, engine: Engine, stop_at: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """The rows of the data and failures files after an attempt, which is asked to stop at the step `stop_at`."""
    reports: list[Progress] = []

    def stopping() -> bool:
        return bool(reports) and reports[-1].step == stop_at

    process_shard(run, run.new_attempt(0, {}), engine, nullcontext(), reports.append, stopping)
    folders = {"data": run.paths.data_folder, "failures": run.paths.failures_folder}
    return {
        name: [row for path in sorted(folder.iterdir()) for row in pq.read_table(path).to_pylist()]
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("stop_at", [None, 1])
def test_the_failures_file_names_the_stage_also_after_a_resume(
    folder: Path, tmp_path: Path, stop_at: int | None
) -> None:
    """Row 2 overflows in the encoder, row 1 in the decoder."""
    runs = []
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
        runs.append(make_run(tmp_path / name, 4, 4, model=str(folder), sampling={"steps": 3}))
        Image.fromarray(WHITE.pixels).save(tmp_path / name / "2.png")
    whole, run = runs
    expected = committed(whole, load(folder))
    for at in [stop_at, None] if stop_at else [None]:
        engine = load(folder)
        overflow(engine.model.vae.encoder, "forward", white)
        overflow(engine.model.vae.decoder, "forward", every(1))
        found = committed(run, engine, at)
    assert found["data"] == [row for row in expected["data"] if row["row"] in (0, 3)]
    encode, decode = found["failures"][1], found["failures"][0]
    assert (encode["row"], encode["stage"], encode["error"]) == (2, "encode", "EncodingError")
    assert (decode["row"], decode["stage"], decode["error"]) == (1, "decode", "DecodingError")
    assert "2.png at 64×64: the VAE's encoder" in encode["message"]
    record = json.loads(run.paths.record(0).read_bytes())
    assert record["failed_by_class"] == {"EncodingError": 1, "DecodingError": 1}


@pytest.mark.parametrize("stop_at", [None, 2])
def test_the_record_names_the_rows_with_a_smaller_loss_scale(folder: Path, tmp_path: Path, stop_at: int | None) -> None:
    sampling = {"steps": 4, "content_weight": LARGE_WEIGHT}
    run = make_run(tmp_path, 2, 2, model={"name": str(folder), "dtype": "float16"}, sampling=sampling)
    for at in [stop_at, None] if stop_at else [None]:
        found = committed(run, load(folder, "float16"), at)
    assert [row["row"] for row in found["data"]] == [0, 1]
    assert json.loads(run.paths.record(0).read_bytes())["loss_scales"] == {"0": 256.0, "1": 256.0}
