"""Seamless tiling, and textures that are sampled in windows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import oracle
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.engine import Engine, InputImage, Noise, Pair, SampleState
from stylemill.engine.state import PairInputs, ShardInputs
from stylemill.engine.unet.tiling import circular_padding
from stylemill.engine.windows import Windows

SMALL, WIDE, TALL, LARGE = (64, 64), (128, 64), (64, 128), (128, 128)  # pixels; a latent is 8 pixels wide


def image(number: int, size: tuple[int, int] = SMALL) -> InputImage:
    random, (width, height) = np.random.default_rng(number), size
    patches = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((height // 4, width // 4, 1)))
    return InputImage(f"image {number} {size}", (patches + random.integers(-30, 30, patches.shape)).astype(np.uint8))


STYLES = [image(1), image(2)]


def last(engine: Engine, pairs: Sequence[Pair], settings: Sampling, noise: Any = None) -> SampleState:
    *_, state = engine.sample(pairs, settings, noise=noise)
    return state


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


# --- tiling --------------------------------------------------------------------------------------------------------


class RolledNoise(Noise):
    """The initial latents of Noise(0), rolled by `shift` (rows, columns)."""

    def __init__(self, shift: tuple[int, int]) -> None:
        super().__init__(0)
        self.shift = shift

    def initial_latents(self, pair: Pair, shape: tuple[int, ...]) -> Any:
        return np.roll(super().initial_latents(pair, shape), self.shift, (1, 2))


@pytest.mark.parametrize(
    ("tiling", "shift", "equal"),
    [("both", (8, 8), True), ("x", (0, 8), True), ("x", (8, 0), False), ("none", (8, 8), False)],
)
def test_a_seamless_output_does_not_depend_on_where_its_edge_is(
    engine: Engine, tiling: Any, shift: tuple[int, int], equal: bool
) -> None:
    """Latents rolled by the UNet's coarsest stride, 8 latents, give the same output, rolled."""
    settings = Sampling(steps=1, content_weight=0.0, tiling=tiling)
    plain, rolled = (last(engine, [Pair((STYLES[0],), LARGE)], settings, RolledNoise(by)) for by in ((0, 0), shift))
    difference = (torch.roll(plain.latents, shift, (2, 3)) - rolled.latents).abs().max()
    assert difference < 1e-8 if equal else difference > 1e-3
    if equal:
        plain_image, rolled_image = engine.decode(plain)[0], engine.decode(rolled)[0]
        assert plain_image is not None
        assert rolled_image is not None
        expected = np.roll(plain_image, (shift[0] * 8, shift[1] * 8), (0, 1))
        assert np.abs(expected.astype(int) - rolled_image).max() <= 1  # either neighbour of a half


@pytest.mark.parametrize("tiling", ["x", "y", "both"])
def test_a_seamless_output_equals_the_oracle_with_circular_padding(
    engine: Engine, model: oracle.Model, tiling: Any
) -> None:
    pair, settings = Pair((STYLES[0],), SMALL, image(3)), Sampling(steps=2, guidance_scale=2.0, tiling=tiling)
    wrapped = oracle.tiled(model, tiling)
    state = last(engine, [pair], settings)
    assert_equal(state.latents, oracle.naive_guided(wrapped, pair, settings, Noise(0)).latents[-1])
    pixels = engine.decode(state)[0]
    assert pixels is not None
    assert np.abs(pixels.astype(int) - wrapped.decode(state.latents)).max() <= 1


def test_a_restored_state_is_decoded_with_its_tiling(engine: Engine) -> None:
    settings = Sampling(steps=1, tiling="both", content_weight=0.0)
    state = last(engine, [Pair((STYLES[0],), SMALL)], settings)
    (inputs, facts), (arrays, progress) = state.export_inputs(), state.export_progress()
    restored = SampleState.restore(inputs, json.loads(json.dumps(facts)), arrays, progress)
    assert np.array_equal(engine.decode(restored)[0], engine.decode(state)[0])  # type: ignore[arg-type]
    plain = last(engine, [Pair((STYLES[0],), SMALL)], Sampling(steps=1, content_weight=0.0))
    plain.latents_of = state.latents_of
    assert not np.array_equal(engine.decode(plain)[0], engine.decode(state)[0])  # type: ignore[arg-type]


def test_circular_padding_is_removed_from_the_model_also_after_an_error(engine: Engine) -> None:
    def attributes(module: Any) -> list[set[str]]:
        return [set(vars(inner)) for inner in module.modules()]

    unet, vae = engine.model.unet, engine.model.vae
    before = attributes(unet), attributes(vae), str(unet), str(vae)
    sampling = engine.sample([Pair((STYLES[0],), SMALL)], Sampling(steps=2, tiling="both"))
    next(sampling)
    assert (
        attributes(unet),
        attributes(vae),
        str(unet),
        str(vae),
    ) == before  # the model is not patched between two steps

    def fails() -> None:
        with circular_padding("x", unet, vae):
            assert attributes(unet) != before[0]
            raise RuntimeError("an error in the block")

    with pytest.raises(RuntimeError, match="an error in the block"):
        fails()
    assert (attributes(unet), attributes(vae), str(unet), str(vae)) == before


@pytest.mark.parametrize("padding", [1, 0])
@pytest.mark.parametrize("tiling", ["x", "y", "both"])
def test_downsampling_is_padded_circularly(padding: int, tiling: Any) -> None:
    """diffusers' Downsample2D with padding 0 pads a column at the right and a row below before its convolution."""
    from diffusers.models.downsampling import Downsample2D

    layer = Downsample2D(2, use_conv=True, padding=padding).double()
    x, shift = torch.randn(1, 2, 8, 8, dtype=torch.float64), {"x": (0, 4), "y": (4, 0), "both": (4, 2)}[tiling]
    halved = shift[0] // 2, shift[1] // 2
    plain = layer(x)
    with circular_padding(tiling, layer):
        circular, rolled = layer(x), layer(torch.roll(x, shift, (2, 3)))
    assert_equal(torch.roll(circular, halved, (2, 3)), rolled)
    assert circular.shape == plain.shape
    assert not torch.equal(circular, plain)
    assert_equal(circular[..., 1:3, 1:3], plain[..., 1:3, 1:3])  # only the border differs
    assert torch.equal(layer(x), plain)


# --- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "window", "stride", "wraps", "expected"),
    [
        (64, 64, 8, False, [0]),
        (8, 64, 8, True, [0]),
        (128, 64, 8, False, [0, 8, 16, 24, 32, 40, 48, 56, 64]),
        (20, 8, 5, False, [0, 5, 10, 12]),  # the last window is moved inside
        (16, 8, 8, False, [0, 8]),
        (16, 8, 6, True, [0, 6, 12]),  # the last window wraps around
    ],
)
def test_windows_start_at_every_stride(size: int, window: int, stride: int, wraps: bool, expected: list[int]) -> None:
    settings = Sampling(window=window, window_stride=stride, tiling="x" if wraps else "y")
    assert settings.window_starts(size, "x") == expected


EXPANSION = Sampling(steps=2, iterations=2, content_weight=0.0, window=8, window_stride=5)
PAIRS = [
    Pair((STYLES[0],), WIDE),
    Pair((STYLES[1], STYLES[0]), WIDE, prompt="bricks"),
    Pair((STYLES[1],), TALL, seed=4),
    Pair((STYLES[0],), SMALL, image(3)),  # it fits into a window, so it may have a content
]


def test_each_expanded_texture_of_a_shard_equals_the_oracle(engine: Engine, model: oracle.Model) -> None:
    state = last(engine, PAIRS, EXPANSION)
    for latents, pair in zip(state.latents_of, PAIRS, strict=True):
        assert_equal(latents[None], oracle.naive_expansion(model, pair, EXPANSION, Noise(0)).latents[-1])
    assert [pixels.shape for pixels in engine.decode(state) if pixels is not None] == [
        (64, 128, 3),
        (64, 128, 3),
        (128, 64, 3),
        (64, 64, 3),
    ]


def test_guidance_and_adain_are_applied_in_each_window(engine: Engine, model: oracle.Model) -> None:
    settings = EXPANSION.model_copy(update={"guidance_scale": 3.0, "adain": True, "iterations": 1})
    actual = last(engine, PAIRS[1:2], settings).latents
    assert_equal(actual, oracle.naive_expansion(model, PAIRS[1], settings, Noise(0)).latents[-1])


@pytest.mark.parametrize(
    ("tiling", "size", "convolutions"), [("x", WIDE, "none"), ("both", WIDE, "y"), ("x", LARGE, "none")]
)
def test_windows_of_a_seamless_texture_wrap_around(
    engine: Engine, model: oracle.Model, tiling: Any, size: tuple[int, int], convolutions: str
) -> None:
    """Along an axis with several windows, the windows wrap around; along the other one, the convolutions do."""
    changes = {"tiling": tiling, "iterations": 1, "steps": 1, "window_stride": 6}
    pair, settings = Pair((STYLES[0],), size), EXPANSION.model_copy(update=changes)
    unet = model if convolutions == "none" else oracle.tiled(model, convolutions)
    actual = last(engine, [pair], settings).latents
    assert_equal(actual, oracle.naive_expansion(unet, pair, settings, Noise(0)).latents[-1])


def test_masks_and_control_images_are_cropped_to_each_window() -> None:
    mask = torch.arange(16 * 8, dtype=torch.int32).view(16, 8)
    control = torch.arange(3 * 32 * 16, dtype=torch.uint8).view(3, 32, 16)  # two pixels a latent
    pair = PairInputs(None, (0,), 0, 0, 0.0, (4, 16, 8), masks=(0, 1), controls=(0,))
    style_mask = torch.zeros(8, 8, dtype=torch.int32)
    inputs = ShardInputs([pair], [torch.zeros(4, 8, 8)], [""], [], masks=[mask, style_mask], controls=[control])
    windowed = Windows(inputs, Sampling(window=8, window_stride=6, tiling="y")).inputs
    tops = [0, 6, 12]
    assert len(windowed.pairs) == len(tops)
    for window, top in zip(windowed.pairs, tops, strict=True):
        assert window.shape == (4, 8, 8)
        assert torch.equal(windowed.masks[window.masks[0]], mask.roll(-top, 0)[:8])
        assert windowed.masks[window.masks[1]] is style_mask
        assert torch.equal(windowed.controls[window.controls[0]], control.roll(-2 * top, 1)[:, :16])


def test_tiling_outputs_smaller_and_larger_than_the_window_is_refused() -> None:
    pairs = [PairInputs(None, (0,), 0, 0, 0.0, (4, 8, width)) for width in (8, 16)]
    inputs = ShardInputs(pairs, [torch.zeros(4, 8, 8)], [""], [])
    with pytest.raises(ValueError, match="tiling x and window 8"):
        Windows(inputs, Sampling(window=8, tiling="x"))


def test_an_output_within_one_window_has_the_same_bits_as_without_windows(engine: Engine) -> None:
    pairs = [Pair((STYLES[0],), SMALL, image(3)), Pair((STYLES[1],), SMALL)]
    whole = last(engine, pairs, Sampling(steps=2))
    assert torch.equal(last(engine, pairs, Sampling(steps=2, window=8)).latents, whole.latents)
    assert torch.equal(last(engine, pairs, Sampling(steps=2, window=64)).latents, whole.latents)


def test_each_window_is_a_pass_and_styles_are_shared(engine: Engine) -> None:
    before = engine.passes.copy()
    last(engine, PAIRS[:2], EXPANSION)
    passes = engine.passes - before
    assert passes == {"denoise": 2 * 6, "gradient": 2 * 2 * 6, "feature": 2 * 2}  # 3 windows each


def test_nan_in_a_window_fails_its_pair_and_no_other(engine: Engine) -> None:
    class NoiseWithNaN(Noise):
        def initial_latents(self, pair: Pair, shape: tuple[int, ...]) -> Any:
            latents = super().initial_latents(pair, shape)
            if pair == PAIRS[0]:
                latents[0, 0, 0] = np.nan  # only in its first window
            return latents

    expected, state = last(engine, PAIRS[:3], EXPANSION), last(engine, PAIRS[:3], EXPANSION, NoiseWithNaN(0))
    assert list(state.failures) == [0]
    assert "step 0" in state.failures[0].message
    for place in (1, 2):
        assert torch.equal(state.latents_of[place], expected.latents_of[place])


def test_a_pair_with_a_content_that_needs_windows_fails(engine: Engine) -> None:
    pairs = [Pair((STYLES[0],), WIDE, image(3, WIDE), content_weight=0.3), PAIRS[0]]
    state = last(engine, pairs, EXPANSION)
    assert list(state.failures) == [0]
    assert "window 8" in state.failures[0].message
    assert "content_weight" in state.failures[0].message


def test_a_restored_run_in_windows_continues_to_the_same_bits(engine32: Engine) -> None:
    engine = Engine(engine32.model, micro_batch=2)
    whole: list[Tensor] = []
    for state in engine.sample(PAIRS[:1], EXPANSION):
        whole.append(state.latents.clone())
        if state.step == 1:
            (inputs, facts), (arrays, progress) = state.export_inputs(), state.export_progress()
            arrays = {name: array.copy() for name, array in arrays.items()}
    restored = SampleState.restore(inputs, json.loads(json.dumps(facts)), arrays, json.loads(json.dumps(progress)))
    *_, end = engine.sample(PAIRS[:1], EXPANSION, state=restored)
    assert torch.equal(end.latents, whole[-1])


@pytest.mark.parametrize(
    ("values", "both"),
    [
        ({"method": "optimization", "window": 64}, ("window 64", "optimization")),
        ({"window": 8, "window_stride": 9}, ("window_stride 9", "window")),
        ({"window_stride": 4}, ("window_stride 4", "window")),
    ],
)
def test_window_settings_that_do_not_fit_are_refused_with_both_names(
    values: dict[str, Any], both: tuple[str, str]
) -> None:
    with pytest.raises(ValidationError) as refused:
        Sampling(**values)
    assert all(word in str(refused.value) for word in both)


def test_the_preset_has_the_published_settings() -> None:
    made = Sampling(**PRESETS["texture-expansion"])
    assert (made.method, made.steps, made.iterations, made.learning_rate) == ("guided", 50, 2, 0.05)
    assert (made.content_weight, made.guidance_scale, made.window, made.window_stride) == (0.0, 1.0, 64, 8)
