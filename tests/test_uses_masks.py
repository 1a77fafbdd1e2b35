"""Controllable synthesis: masks from their files to the attention, against the oracle and in whole runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import oracle
from stylemill.config.inputs import COLOUR_LABEL, Fit
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, InputImage, LabelImage, Noise, Pair, SampleState
from stylemill.engine.masks import nearest
from stylemill.errors import ImageError, ManifestError
from stylemill.images.masks import load_labels
from stylemill.manifest import open_manifest
from stylemill.manifest.validate import validate_manifest

SIZE = (64, 64)  # pixels; latents of 8 x 8
WIDE = (128, 64)


def image(number: int, size: tuple[int, int] = SIZE) -> InputImage:
    random, (width, height) = np.random.default_rng(number), size
    patches = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((height // 4, width // 4, 1)))
    return InputImage(f"image {number}", (patches + random.integers(-30, 30, patches.shape)).astype(np.uint8))


def labels(rows: Sequence[Sequence[int]], size: tuple[int, int] = SIZE) -> LabelImage:
    """A mask of rectangles: `rows` is a small label image, enlarged to `size`."""
    small = np.array(rows)
    tall, wide = size[1] // small.shape[0], size[0] // small.shape[1]
    return LabelImage(f"{rows} {size}", np.kron(small, np.ones((tall, wide), int)).astype(np.int32))


CONTENT, STYLE, OTHER, WIDE_STYLE = image(1), image(11), image(12), image(13, WIDE)
SPLIT = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[1, 2]]), style_masks=(labels([[2], [1]]),))
MANY = Pair(  # four labels and two styles of two shapes, each without some of the labels
    (OTHER, WIDE_STYLE),
    SIZE,
    CONTENT,
    content_weight=0.4,
    content_mask=labels([[0, 5], [COLOUR_LABEL + 0xFF0000, 7]]),
    style_masks=(labels([[5, 0], [5, 5]]), labels([[0, 7, COLOUR_LABEL + 0xFF0000, 7]], WIDE)),
)
LAYOUT = Pair(
    (STYLE, OTHER), WIDE, content_mask=labels([[3, 3, 4, 3]], WIDE), style_masks=(labels([[3]]), labels([[4]]))
)
PADDED = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[-1, 1, 1, -1]]), style_masks=(labels([[1], [-1]]),))
PLAIN = Pair((STYLE,), SIZE, CONTENT)
MIXED = [PLAIN, SPLIT, MANY, Pair((OTHER,), SIZE, CONTENT), PADDED]
MISSING_LABEL = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[1, 9]]), style_masks=(labels([[1]]),))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, dtype="float64", device="cpu", micro_batch=2)


def last(engine: Engine, pairs: Sequence[Pair], settings: Sampling) -> SampleState:
    *_, state = engine.sample(pairs, settings)
    return state


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


# --- the engine against the oracle ---------------------------------------------------------------------------------

RUNS = {
    "two labels": (SPLIT, Sampling(steps=3, iterations=2)),
    "several labels and styles": (MANY, Sampling(steps=2, guidance_scale=3.0, adain=True, query_scale=1.5)),
    "no content, not square": (LAYOUT, Sampling(steps=2, content_weight=0.0)),
    "padding": (PADDED, Sampling(steps=2)),
    "optimization": (MANY, Sampling(method="optimization", steps=2)),
    "plain gradient": (SPLIT, Sampling(method="gradient", steps=2, learning_rate=50.0)),
    "KV injection": (MANY, Sampling(method="kv_injection", steps=2, guidance_scale=2.0)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_with_masks_equals_the_oracle(engine: Engine, model: oracle.Model, run: str) -> None:
    pair, settings = RUNS[run]
    expected = oracle.naive_sample(model, pair, settings, Noise(settings.seed)).latents[-1]
    assert_equal(last(engine, [pair], settings).latents, expected)


def test_masks_change_the_result_unless_all_have_one_label(engine: Engine) -> None:
    settings = Sampling(steps=2)
    everywhere = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[4]]), style_masks=(labels([[4]]),))
    plain, same, split = (last(engine, [pair], settings).latents for pair in (PLAIN, everywhere, SPLIT))
    assert_equal(same, plain)
    assert (split - plain).abs().max() > 1e-3


def test_pairs_with_and_without_masks_can_be_in_one_shard(engine: Engine) -> None:
    settings = Sampling(steps=2)
    together = last(engine, MIXED, settings)
    for pair, latents in zip(MIXED, together.latents_of, strict=True):
        assert_equal(latents[None], last(engine, [pair], settings).latents)


def test_the_mask_of_an_output_larger_than_a_window_is_split_into_windows_too(engine: Engine) -> None:
    large, settings = (128, 128), Sampling(steps=1, content_weight=0.0, window=8, window_stride=4)
    drawn = Pair((STYLE,), large, seed=1, content_mask=labels([[1], [2]], large), style_masks=(labels([[2, 1]]),))
    one = replace(drawn, content_mask=labels([[1]], large), style_masks=(labels([[1]]),))
    two = replace(drawn, content_mask=labels([[2]], large))
    state = last(engine, [drawn, one, replace(one, content_mask=None, style_masks=())], settings)
    assert_equal(state.latents_of[1], state.latents_of[2])
    below, all_two = state.latents_of[0], last(engine, [two], settings).latents_of[0]
    assert state.failures == {}
    assert_equal(below[:, 12:], all_two[:, 12:])  # one step: only windows with both halves know the upper one
    assert (below - all_two)[:, :2].abs().max() > 1e-3


def test_a_label_that_no_style_has_fails_its_pair_and_no_other(engine: Engine) -> None:
    settings = Sampling(steps=2)
    expected = last(engine, [SPLIT, PADDED, PLAIN], settings)
    state = last(engine, [SPLIT, MISSING_LABEL, PLAIN], settings)
    assert list(state.failures) == [1]
    assert "label 9 of content_mask is in none of this pair's style masks" in state.failures[1].message
    assert torch.equal(state.latents_of[0], expected.latents_of[0])
    assert torch.equal(state.latents_of[2], expected.latents_of[2])
    assert all(latents.isfinite().all() for latents in state.latents_of)


def test_a_label_that_is_lost_on_a_coarse_grid_fails_with_that_reason(engine: Engine) -> None:
    thin = np.full((64, 64), 1, np.int32)
    thin[:, 8:16] = COLOUR_LABEL + 0xFF  # one latent wide, between the pixels that the 4 × 4 grid takes
    pair = Pair(
        (STYLE,), SIZE, content_mask=labels([[1, COLOUR_LABEL + 0xFF]]), style_masks=(LabelImage("thin", thin),)
    )
    reason = last(engine, [pair], Sampling(steps=1)).failures[0].message
    assert "label #0000ff" in reason
    assert "lost when the masks are resized to 4×4" in reason


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (Pair((STYLE,), SIZE, content_mask=labels([[1]])), "1 content mask and 0 style masks for 1 styles"),
        (Pair((STYLE,), SIZE, style_masks=(labels([[1]]),)), "0 content mask and 1 style masks for 1 styles"),
        (Pair((STYLE,), SIZE, content_mask=LabelImage("?", None), style_masks=(labels([[1]]),)), "could not be read"),
    ],
)
def test_incomplete_masks_fail_their_pair(engine: Engine, pair: Pair, reason: str) -> None:
    state = last(engine, [pair, PLAIN], Sampling(steps=1))
    assert list(state.failures) == [0]
    assert reason in state.failures[0].message


@pytest.mark.parametrize("method", ["guided", "optimization", "kv_injection"])
def test_a_restored_run_with_masks_continues_to_the_same_bits(engine: Engine, method: Any) -> None:
    settings = Sampling(method=method, steps=3)
    pairs = [SPLIT, MANY, MISSING_LABEL, PLAIN]
    states = engine.sample(pairs, settings)
    state = next(states)
    (inputs, facts), (arrays, progress) = state.export_inputs(), state.export_progress()
    *_, state = states
    assert inputs["mask.0"].dtype == np.int32
    restored = SampleState.restore(inputs, json.loads(json.dumps(facts)), arrays, json.loads(json.dumps(progress)))
    *_, continued = engine.sample([], settings, state=restored)
    for actual, expected in zip(continued.latents_of, state.latents_of, strict=True):
        assert torch.equal(actual, expected)
    assert continued.failures == state.failures


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (8, 8)), ((50, 37), (8, 4)), ((3, 5), (12, 10)), ((1, 1), (2, 3))]
)
def test_nearest_equals_nearest_neighbour_of_torch(size: tuple[int, int], grid: tuple[int, int]) -> None:
    random = torch.from_numpy(np.random.default_rng(0).integers(0, 2**25, size))
    expected = torch.nn.functional.interpolate(random[None, None].double(), grid, mode="nearest")[0, 0]
    assert torch.equal(nearest(random, grid).double(), expected)


# --- label images from files ---------------------------------------------------------------------------------------


def save(path: Path, pixels: Any, mode: str, **options: Any) -> str:
    picture = Image.fromarray(np.array(pixels, np.uint8), "L" if mode == "P" else mode)
    if mode == "P":
        picture = picture.convert("L")
        picture.putpalette([200] * 768)  # every index has the same colour, so only the index can be the label
    picture.save(path, **options)
    return path.name


def read(
    path: Path, size: tuple[int, int], fit: Fit = "stretch", image_size: tuple[int, int] | None = None
) -> list[Any]:
    labels: list[Any] = load_labels(path.name, None, path.parent, size, fit, image_size).tolist()
    return labels


def test_labels_are_palette_indices_grey_values_and_colours(tmp_path: Path) -> None:
    save(tmp_path / "p.png", [[0, 3], [7, 255]], "P")
    save(tmp_path / "l.png", [[0, 3], [7, 255]], "L")
    save(tmp_path / "c.png", [[[0, 0, 0], [3, 3, 3]], [[0, 0, 3], [255, 0, 16]]], "RGB")
    save(tmp_path / "a.png", [[[9, 9, 9, 255]]], "RGBA")
    Image.fromarray(np.array([[0, 1000]], np.uint16)).save(tmp_path / "i.png")
    assert read(tmp_path / "p.png", (2, 2)) == [[0, 3], [7, 255]]
    assert read(tmp_path / "l.png", (2, 2)) == [[0, 3], [7, 255]]
    assert read(tmp_path / "c.png", (2, 2)) == [[0, 3], [COLOUR_LABEL + 3, COLOUR_LABEL + 0xFF0010]]
    assert read(tmp_path / "a.png", (2, 1)) == [[9, 9]]
    assert read(tmp_path / "i.png", (2, 1)) == [[0, 1000]]


def test_a_mask_is_fitted_as_its_image_is(tmp_path: Path) -> None:
    save(tmp_path / "m.png", [[1, 2, 3, 4]] * 2, "L")  # a mask of 4 × 2 for an image of 400 × 200
    image_size = (400, 200)
    assert read(tmp_path / "m.png", (2, 2), "crop", image_size) == [[2, 3]] * 2
    assert read(tmp_path / "m.png", (4, 4), "pad", image_size) == [[-1] * 4, [1, 2, 3, 4], [1, 2, 3, 4], [-1] * 4]
    assert read(tmp_path / "m.png", (8, 1), "stretch", image_size) == [[1, 1, 2, 2, 3, 3, 4, 4]]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_mask_of_an_image_matches_the_fitted_image(tmp_path: Path, fit: Fit) -> None:
    from stylemill.images.read import load_image

    drawn = np.zeros((90, 160), np.uint8)
    drawn[20:60, 50:130] = 255
    save(tmp_path / "image.png", drawn, "L")
    save(tmp_path / "mask.png", drawn[::2, ::2], "L")  # half the resolution
    fitted = load_image("image.png", None, tmp_path, (64, 96), fit)
    mask = load_labels("mask.png", None, tmp_path, (64, 96), fit, fitted.source_size)
    bright = fitted.pixels[..., 0] > 127
    assert ((mask == 255) != bright)[mask >= 0].mean() < 0.02  # at the edges, images are blended and labels are not
    assert (mask < 0).any() == (fit == "pad")


@pytest.mark.parametrize(
    ("mode", "suffix", "message"),
    [("RGB", ".jpg", "does not keep labels"), ("RGBA", ".png", "transparent"), ("CMYK", ".tif", "mode CMYK")],
)
def test_image_files_without_exact_labels_are_refused(tmp_path: Path, mode: str, suffix: str, message: str) -> None:
    Image.new(mode, (16, 16)).save(tmp_path / f"mask{suffix}")
    with pytest.raises(ImageError, match=message):
        read(tmp_path / f"mask{suffix}", (8, 8))


def test_a_mask_with_another_aspect_ratio_than_its_image_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m.png", np.zeros((20, 30)), "L")
    read(tmp_path / "m.png", (8, 8), "crop", (301, 200))  # a difference by rounding is accepted
    with pytest.raises(ImageError, match="the mask is 30×20 and its image 300×300"):
        read(tmp_path / "m.png", (8, 8), "crop", (300, 300))


# --- manifest and whole runs ---------------------------------------------------------------------------------------


def manifest(folder: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def test_a_row_with_only_one_of_its_two_masks_is_refused(tmp_path: Path) -> None:
    columns = {"style": ["s.png"] * 3, "content_mask": ["m.png", None, None], "style_mask": [None, "m.png", None]}
    path = manifest(tmp_path, columns)
    problems = [str(problem) for problem in validate_manifest(path, check_files=False).problems]
    assert problems == [
        "row 0, column 'content_mask': is given without style_mask; a row has both or neither",
        "row 1, column 'style_mask': is given without content_mask; a row has both or neither",
    ]
    with pytest.raises(ManifestError, match="row 0, column 'content_mask'"):
        list(open_manifest(path).rows())


def test_validation_decodes_masks_by_the_rules_for_masks(tmp_path: Path) -> None:
    from stylemill.cli import main

    Image.new("RGB", (16, 16)).save(tmp_path / "s.png")
    Image.new("L", (16, 16)).save(tmp_path / "m.jpg")
    columns = {"style": ["s.png"], "content_mask": ["m.jpg"], "style_mask": ["m.jpg"]}
    path = manifest(tmp_path, columns)
    assert main(["manifest", "validate", str(path)]) == 0
    assert main(["manifest", "validate", str(path), "--decode"]) == 2


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_run_with_masks_from_files(tmp_path: Path, folder: Path, micro_batch: int) -> None:
    from stylemill.cli import main

    Image.fromarray(image(1, (96, 64)).pixels).save(tmp_path / "content.png")
    Image.fromarray(STYLE.pixels).save(tmp_path / "style.png")
    save(tmp_path / "left.png", np.kron([[1, 2]], np.ones((4, 3))), "L")
    save(tmp_path / "top.png", np.kron([[1], [2]], np.ones((4, 8))), "P")
    save(tmp_path / "one.png", np.ones((8, 8)), "L")
    save(tmp_path / "narrow.png", np.ones((16, 8)), "L")
    columns = {
        "pair_id": ["plain", "masked", "lacking", "aspect", "absent", "layout"],
        "content": ["content.png"] * 5 + [None],
        "style": ["style.png"] * 6,
        "content_mask": [None, "left.png", "left.png", "narrow.png", "nothing.png", "left.png"],
        "style_mask": [None, "top.png", "one.png", "one.png", "one.png", "top.png"],
    }
    job = {
        "manifest": str(manifest(tmp_path, columns)),
        "output": str(tmp_path / "run"),
        "model": str(folder),
        "sampling": {"steps": 2},
        "image": {"size": 64},
        "shards": {"pairs_per_shard": 4},  # pairs with and without masks, succeeding and failing, in one shard
        "cluster": {"micro_batch": micro_batch},
        "max_failed_fraction": 1.0,
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job), encoding="utf-8")
    assert main(["run", str(tmp_path / "job.yaml"), "--inline"]) == 3

    good = pq.read_table(tmp_path / "run" / "data")
    assert good["pair_id"].to_pylist() == ["plain", "masked", "layout"]
    settings = [json.loads(text) for text in good["settings"].to_pylist()]
    assert [one.get("content_mask") for one in settings] == [None, "left.png", "left.png"]
    lost = {row["pair_id"]: row for row in pq.read_table(tmp_path / "run" / "failures").to_pylist()}
    assert {name: row["stage"] for name, row in lost.items()} == {
        "lacking": "sample",
        "aspect": "read",
        "absent": "read",
    }
    assert "label 2 of content_mask" in lost["lacking"]["message"]
    assert "the mask is 8×16 and its image 96×64" in lost["aspect"]["message"]
    assert "nothing.png" in lost["absent"]["message"]
