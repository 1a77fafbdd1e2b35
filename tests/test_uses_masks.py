"""Controllable synthesis: label images from file to attention, against the naive oracle and through whole shards."""

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


def picture(number: int, size: tuple[int, int] = SIZE) -> InputImage:
    random, (width, height) = np.random.default_rng(number), size
    patches = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((height // 4, width // 4, 1)))
    return InputImage(f"picture {number}", (patches + random.integers(-30, 30, patches.shape)).astype(np.uint8))


def labels(rows: Sequence[Sequence[int]], size: tuple[int, int] = SIZE) -> LabelImage:
    """Rectangles of labels, as a drawing of `rows` shows them."""
    drawing = np.array(rows)
    tall, wide = size[1] // drawing.shape[0], size[0] // drawing.shape[1]
    return LabelImage(f"{rows} {size}", np.kron(drawing, np.ones((tall, wide), int)).astype(np.int32))


CONTENT, STYLE, OTHER, WIDE_STYLE = picture(1), picture(11), picture(12), picture(13, WIDE)
SPLIT = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[1, 2]]), style_masks=(labels([[2], [1]]),))
MANY = Pair(  # four labels over two styles of two shapes; each style lacks some
    (OTHER, WIDE_STYLE),
    SIZE,
    CONTENT,
    content_weight=0.4,
    content_mask=labels([[0, 5], [COLOUR_LABEL + 0xFF0000, 7]]),
    style_masks=(labels([[5, 0], [5, 5]]), labels([[0, 7, COLOUR_LABEL + 0xFF0000, 7]], WIDE)),
)
LAID_OUT = Pair(
    (STYLE, OTHER), WIDE, content_mask=labels([[3, 3, 4, 3]], WIDE), style_masks=(labels([[3]]), labels([[4]]))
)
PADDED = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[-1, 1, 1, -1]]), style_masks=(labels([[1], [-1]]),))
PLAIN = Pair((STYLE,), SIZE, CONTENT)
MIXED = [PLAIN, SPLIT, MANY, Pair((OTHER,), SIZE, CONTENT), PADDED]
LACKING = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[1, 9]]), style_masks=(labels([[1]]),))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, dtype="float64", device="cpu", micro_batch=2)


def last(engine: Engine, pairs: Sequence[Pair], settings: Sampling) -> SampleState:
    *_, state = engine.sample(pairs, settings)
    return state


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


# --- the engine against the oracle ---------------------------------------------------------------------------------

RUNS = {
    "two labels": (SPLIT, Sampling(steps=3, iterations=2)),
    "several labels and styles": (MANY, Sampling(steps=2, guidance_scale=3.0, adain=True, query_scale=1.5)),
    "no content, not square": (LAID_OUT, Sampling(steps=2, content_weight=0.0)),
    "padding": (PADDED, Sampling(steps=2)),
    "optimization": (MANY, Sampling(method="optimization", steps=2)),
    "plain gradient": (SPLIT, Sampling(method="gradient", steps=2, learning_rate=50.0)),
    "KV injection": (MANY, Sampling(method="kv_injection", steps=2, guidance_scale=2.0)),
}


@pytest.mark.parametrize("run", RUNS)
def test_masked_run_equals_the_oracle(engine: Engine, model: oracle.Model, run: str) -> None:
    pair, settings = RUNS[run]
    expected = oracle.naive_sample(model, pair, settings, Noise(settings.seed)).latents[-1]
    assert_equal(last(engine, [pair], settings).latents, expected)


def test_masks_change_the_result_and_one_label_for_all_does_not(engine: Engine) -> None:
    settings = Sampling(steps=2)
    everywhere = Pair((STYLE,), SIZE, CONTENT, content_mask=labels([[4]]), style_masks=(labels([[4]]),))
    plain, same, split = (last(engine, [pair], settings).latents for pair in (PLAIN, everywhere, SPLIT))
    assert_equal(same, plain)
    assert (split - plain).abs().max() > 1e-3


def test_pairs_with_and_without_masks_in_one_shard(engine: Engine) -> None:
    settings = Sampling(steps=2)
    together = last(engine, MIXED, settings)
    for pair, latents in zip(MIXED, together.latents_of, strict=True):
        assert_equal(latents[None], last(engine, [pair], settings).latents)


def test_a_layout_larger_than_a_window_is_cut_with_the_latents(engine: Engine) -> None:
    large, settings = (128, 128), Sampling(steps=1, content_weight=0.0, window=8, window_stride=4)
    drawn = Pair((STYLE,), large, seed=1, content_mask=labels([[1], [2]], large), style_masks=(labels([[2, 1]]),))
    one = replace(drawn, content_mask=labels([[1]], large), style_masks=(labels([[1]]),))
    two = replace(drawn, content_mask=labels([[2]], large))
    state = last(engine, [drawn, one, replace(one, content_mask=None, style_masks=())], settings)
    assert_equal(state.latents_of[1], state.latents_of[2])
    below, all_two = state.latents_of[0], last(engine, [two], settings).latents_of[0]
    assert state.failures == {}
    assert_equal(below[:, 12:], all_two[:, 12:])  # in one step, only windows over both halves know of the upper one
    assert (below - all_two)[:, :2].abs().max() > 1e-3


def test_a_label_that_no_style_bears_fails_its_pair_alone(engine: Engine) -> None:
    settings = Sampling(steps=2)
    whole = last(engine, [SPLIT, PADDED, PLAIN], settings)
    state = last(engine, [SPLIT, LACKING, PLAIN], settings)
    assert list(state.failures) == [1]
    assert "label 9 of content_mask is in none of this pair's style masks" in state.failures[1]
    assert torch.equal(state.latents_of[0], whole.latents_of[0])
    assert torch.equal(state.latents_of[2], whole.latents_of[2])
    assert all(latents.isfinite().all() for latents in state.latents_of)


def test_a_label_that_is_lost_on_a_coarse_grid_is_a_failure_that_says_so(engine: Engine) -> None:
    thin = np.full((64, 64), 1, np.int32)
    thin[:, 8:16] = COLOUR_LABEL + 0xFF  # one latent wide, between the pixels that the 4 × 4 grid takes
    pair = Pair(
        (STYLE,), SIZE, content_mask=labels([[1, COLOUR_LABEL + 0xFF]]), style_masks=(LabelImage("thin", thin),)
    )
    reason = last(engine, [pair], Sampling(steps=1)).failures[0]
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
    assert reason in state.failures[0]


@pytest.mark.parametrize("method", ["guided", "optimization", "kv_injection"])
def test_restored_run_with_masks_continues_to_the_same_bits(engine: Engine, method: Any) -> None:
    settings = Sampling(method=method, steps=3)
    pairs = [SPLIT, MANY, LACKING, PLAIN]
    states = engine.sample(pairs, settings)
    state = next(states)
    (inputs, facts), (arrays, progress) = state.export_inputs(), state.export_progress()
    *_, state = states
    assert inputs["mask.0"].dtype == np.int32
    restored = SampleState.restore(inputs, json.loads(json.dumps(facts)), arrays, json.loads(json.dumps(progress)))
    *_, continued = engine.sample([], settings, state=restored)
    for ours, theirs in zip(continued.latents_of, state.latents_of, strict=True):
        assert torch.equal(ours, theirs)
    assert continued.failures == state.failures


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (8, 8)), ((50, 37), (8, 4)), ((3, 5), (12, 10)), ((1, 1), (2, 3))]
)
def test_nearest_is_that_of_torch(size: tuple[int, int], grid: tuple[int, int]) -> None:
    random = torch.from_numpy(np.random.default_rng(0).integers(0, 2**25, size))
    expected = torch.nn.functional.interpolate(random[None, None].double(), grid, mode="nearest")[0, 0]
    assert torch.equal(nearest(random, grid).double(), expected)


# --- label images from files ---------------------------------------------------------------------------------------


def save(path: Path, pixels: Any, mode: str, **options: Any) -> str:
    image = Image.fromarray(np.array(pixels, np.uint8), "L" if mode == "P" else mode)
    if mode == "P":
        image = image.convert("L")
        image.putpalette([200] * 768)  # every index has the same colour: only the index tells
        image.save(path, **options)
        return path.name
    image.save(path, **options)
    return path.name


def read(path: Path, size: tuple[int, int], fit: Fit = "stretch", image: tuple[int, int] | None = None) -> list[Any]:
    found: list[Any] = load_labels(path.name, None, path.parent, size, fit, image).tolist()
    return found


def test_labels_are_indices_greys_and_colours(tmp_path: Path) -> None:
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


def test_labels_move_as_their_image(tmp_path: Path) -> None:
    save(tmp_path / "m.png", [[1, 2, 3, 4]] * 2, "L")  # a mask of 4 × 2 for an image of 400 × 200
    image = (400, 200)
    assert read(tmp_path / "m.png", (2, 2), "crop", image) == [[2, 3]] * 2
    assert read(tmp_path / "m.png", (4, 4), "pad", image) == [[-1] * 4, [1, 2, 3, 4], [1, 2, 3, 4], [-1] * 4]
    assert read(tmp_path / "m.png", (8, 1), "stretch", image) == [[1, 1, 2, 2, 3, 3, 4, 4]]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_mask_drawn_on_the_image_lies_on_the_fitted_image(tmp_path: Path, fit: Fit) -> None:
    from stylemill.images.read import load_image

    drawn = np.zeros((90, 160), np.uint8)
    drawn[20:60, 50:130] = 255
    save(tmp_path / "image.png", drawn, "L")
    save(tmp_path / "mask.png", drawn[::2, ::2], "L")  # half the resolution
    image = load_image("image.png", None, tmp_path, (64, 96), fit)
    found = load_labels("mask.png", None, tmp_path, (64, 96), fit, image.source_size)
    bright = image.pixels[..., 0] > 127
    assert ((found == 255) != bright)[found >= 0].mean() < 0.02  # but for the edges, which one blends and one rounds
    assert (found < 0).any() == (fit == "pad")


@pytest.mark.parametrize(
    ("mode", "suffix", "message"),
    [("RGB", ".jpg", "does not keep labels"), ("RGBA", ".png", "transparent"), ("CMYK", ".tif", "mode CMYK")],
)
def test_masks_that_cannot_be_exact_are_refused(tmp_path: Path, mode: str, suffix: str, message: str) -> None:
    Image.new(mode, (16, 16)).save(tmp_path / f"mask{suffix}")
    with pytest.raises(ImageError, match=message):
        read(tmp_path / f"mask{suffix}", (8, 8))


def test_a_mask_of_another_aspect_than_its_image_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m.png", np.zeros((20, 30)), "L")
    read(tmp_path / "m.png", (8, 8), "crop", (301, 200))  # rounding is no other aspect
    with pytest.raises(ImageError, match="the mask is 30×20 and its image 300×300"):
        read(tmp_path / "m.png", (8, 8), "crop", (300, 300))


# --- manifest and whole runs ---------------------------------------------------------------------------------------


def manifest(folder: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def test_masks_on_one_side_only_are_refused(tmp_path: Path) -> None:
    columns = {"style": ["s.png"] * 3, "content_mask": ["m.png", None, None], "style_mask": [None, "m.png", None]}
    path = manifest(tmp_path, columns)
    problems = [str(problem) for problem in validate_manifest(path, check_files=False).problems]
    assert problems == [
        "row 0, column 'content_mask': stands without a style_mask; a row has both or neither",
        "row 1, column 'style_mask': stands without a content_mask; a row has both or neither",
    ]
    with pytest.raises(ManifestError, match="row 0, column 'content_mask'"):
        list(open_manifest(path).rows())


def test_validating_opens_masks_as_masks(tmp_path: Path) -> None:
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

    Image.fromarray(picture(1, (96, 64)).pixels).save(tmp_path / "content.png")
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
        "shards": {"pairs_per_shard": 4},  # with and without masks, sound and failed side by side
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
