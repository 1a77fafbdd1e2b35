"""Outputs and styles of any size: not square, each of its content's size (`fit: keep`), styles of another size."""

from __future__ import annotations

import json
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
import stylemill
from stylemill.config.job import Job
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, InputImage, Noise, Pair
from stylemill.errors import JobError
from stylemill.images.fit import kept_size
from stylemill.manifest import ImageRef, Row
from stylemill.planning.cost import count_cost
from stylemill.planning.model_shape import read_shape
from stylemill.planning.plan import plan

SIZES = {"square": (150, 150), "wide": (260, 130), "tall": (100, 210), "small": (70, 60), "huge": (2000, 900)}


def pixels(number: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    random, (width, height) = np.random.default_rng(number), size
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write_images(folder: Path) -> None:
    for number, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(pixels(number, size)).save(folder / f"{name}.png")
    Image.fromarray(pixels(11, (128, 128))).save(folder / "style.png")


def run(
    tmp_path: Path, folder: Path, rows: dict[str, list[Any]], output: str, **values: Any
) -> dict[str, dict[str, Any]]:
    """Run a job and return its output rows by pair_id; rows that failed are not among them."""
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    base = {
        "name": "sizes",
        "manifest": str(tmp_path / "pairs.parquet"),
        "output": str(tmp_path / output),
        "model": str(folder),
        "sampling": {"steps": 1},
        "image": {"size": 128, "fit": "keep"},
        "shards": {"pairs_per_shard": 16},
        "cluster": {"micro_batch": 2, "workers": 1},
        "max_failed_fraction": 1.0,
    }
    stylemill.run(Job.parse(base | values), inline=True, quiet=True)
    assert stylemill.verify(tmp_path / output, deep=True).ok
    files = sorted((tmp_path / output / "data").glob("*.parquet"))
    return {row["pair_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


@pytest.mark.parametrize(
    ("own", "maximum", "grid", "kept"),
    [
        ((512, 512), (512, 512), 64, (512, 512)),
        ((4000, 3000), (512, 512), 64, (512, 384)),
        ((3000, 4000), (512, 512), 64, (384, 512)),
        ((300, 200), (512, 512), 64, (320, 192)),  # enlarged only to the nearest multiple of the grid
        ((20, 5000), (512, 512), 64, (64, 512)),
        ((20, 20), (512, 512), 64, (64, 64)),
        ((511, 300), (512, 256), 64, (448, 256)),
        ((130, 130), (100, 100), 64, (64, 64)),  # the largest multiple of the grid within the maximum
    ],
)
def test_a_kept_size_is_the_nearest_size_on_the_grid_within_the_maximum(
    own: Any, maximum: Any, grid: int, kept: tuple[int, int]
) -> None:
    assert kept_size(own, maximum, grid) == kept


def test_each_output_has_the_size_of_its_content(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path)
    names = [*SIZES, "none"]
    rows = {
        "pair_id": names,
        "content": [f"{name}.png" for name in SIZES] + [None],
        "style": ["style.png"] * 5 + ["wide.png"],
        "note": list(range(6)),
    }
    found = run(tmp_path, folder, rows, "out")
    expected = {"square": (128, 128), "wide": (128, 64), "tall": (64, 128), "small": (64, 64), "huge": (128, 64)}
    expected["none"] = (128, 128)  # without a content, the job's size
    assert {name: (row["width"], row["height"]) for name, row in found.items()} == expected
    for row in found.values():
        path = tmp_path / "one.png"
        path.write_bytes(row["image"]["bytes"])
        assert Image.open(path).size == (row["width"], row["height"])
    assert [row["note"] for row in found.values()] == list(range(6))


def test_an_unreadable_image_of_unknown_size_does_not_change_other_rows(folder: Path, tmp_path: Path) -> None:
    """Its pair has no slot: the other rows come out as if it were not in the manifest."""
    write_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    contents = ["wide.png", "broken.png", "huge.png", "tall.png", "huge.png", "square.png"]
    styles = ["style.png", "style.png", "style.png", "style.png", "broken.png", "style.png"]
    rows = {"pair_id": [f"p{i}" for i in range(6)], "content": contents, "style": styles}
    readable = [0, 2, 3, 5]
    for start in ("auto", "content"):
        sampling = {"steps": 1, "init": start}
        with_unreadable = run(tmp_path, folder, rows, f"with {start}", sampling=sampling)
        without = run(
            tmp_path,
            folder,
            {key: [values[i] for i in readable] for key, values in rows.items()},
            f"without {start}",
            sampling=sampling,
        )
        assert list(with_unreadable) == list(without) == [f"p{i}" for i in readable]
        for name in without:
            assert with_unreadable[name]["image"] == without[name]["image"]


def test_an_unreadable_image_of_known_size_keeps_its_slot(folder: Path, tmp_path: Path) -> None:
    """With other fits than `keep`, the micro-batches are those of a run in which the image is readable."""
    write_images(tmp_path)
    (tmp_path / "later.png").write_bytes(b"not an image")
    rows = {
        "pair_id": [f"p{i}" for i in range(4)],
        "content": ["wide.png", "tall.png", "huge.png", "square.png"],
        "style": ["style.png", "later.png", "style.png", "style.png"],
    }
    image = {"size": [128, 64], "style_size": 64, "fit": "crop"}
    before = run(tmp_path, folder, rows, "before", image=image)
    Image.fromarray(pixels(12, (90, 90))).save(tmp_path / "later.png")
    after = run(tmp_path, folder, rows, "after", image=image)
    assert list(before) == ["p0", "p2", "p3"]
    assert list(after) == ["p0", "p1", "p2", "p3"]
    for name, row in before.items():
        assert row["image"] == after[name]["image"]
    assert (after["p1"]["width"], after["p1"]["height"]) == (128, 64)
    assert json.loads(after["p1"]["settings"])["style_size"] == [64, 64]


def test_pairs_with_styles_of_another_size_equal_the_oracle(engine: Engine, model: oracle.Model) -> None:
    pairs = [
        Pair((InputImage("s", pixels(1, (64, 64))),), (128, 64), InputImage("c", pixels(2, (128, 64)))),
        Pair((InputImage("t", pixels(3, (64, 128))),), (64, 64), InputImage("d", pixels(4, (64, 64)))),
        Pair((InputImage("s", pixels(1, (64, 64))),), (192, 64)),
    ]
    settings = Sampling(steps=2, adain=True)
    *_, state = engine.sample(pairs, settings)
    for latents, pair in zip(state.latents_of, pairs, strict=True):
        expected: Tensor = oracle.naive_guided(model, pair, settings, Noise(0)).latents[-1]
        torch.testing.assert_close(latents[None], expected, rtol=0, atol=1e-8)


def test_a_pair_of_unknown_size_has_no_slot_in_the_engine(engine32: Engine) -> None:
    engine = Engine(engine32.model)
    good = Pair((InputImage("s", pixels(1, (64, 64))),), (64, 64))
    bad = Pair((InputImage("x", None),), (64, 64), InputImage("c", pixels(2, (64, 64))), size_known=False)
    *_, state = engine.sample([bad, good], Sampling(steps=1, iterations=1))
    assert engine.passes == {"denoise": 1, "gradient": 1, "feature": 1}
    assert list(state.failures) == [0]
    (nothing, image), (_, facts) = engine.decode(state), state.export_inputs()
    assert nothing is None
    assert image is not None
    assert not json.loads(json.dumps(facts))["pairs"][0]["slot"]


# --- plans -----------------------------------------------------------------------------------------------------------


def job(tmp_path: Path, folder: Path, **values: Any) -> Job:
    pq.write_table(pa.table({"style": ["a.png", "b.png"]}), tmp_path / "pairs.parquet")
    base = {
        "name": "sizes",
        "manifest": str(tmp_path / "pairs.parquet"),
        "output": str(tmp_path / "out"),
        "model": str(folder),
        "preset": "texture-expansion",
        "cluster": {"micro_batch": 4, "workers": 1},
    }
    return Job.parse(base | values)


EXPANDED = {"size": [256, 128], "style_size": 128}


def test_a_plan_counts_windows_as_the_engine_does(folder: Path, engine32: Engine, tmp_path: Path) -> None:
    planned = job(tmp_path, folder, image=EXPANDED, sampling={"steps": 1, "window": 16, "iterations": 2})
    rows = [Row(i, i, f"p{i}", None, (ImageRef(f"{i % 2}.png"),)) for i in range(2)]
    cost = count_cost(planned, [rows], read_shape(folder))
    engine = Engine(engine32.model, micro_batch=4)
    pairs = [Pair((InputImage(str(i), pixels(i, (128, 128))),), (256, 128)) for i in range(2)]
    for _ in engine.sample(pairs, planned.sampling):
        pass
    assert engine.passes == {
        "denoise": cost.denoise,
        "gradient": cost.gradient,
        "feature": cost.shared_features,
    }
    assert cost.denoise == 2 * 3
    assert cost.memory is not None
    whole = count_cost(
        job(tmp_path, folder, image={"size": [256, 128]}, sampling={"window": None}), [rows], read_shape(folder)
    ).memory
    assert whole is not None
    assert cost.memory.activations * 2 == whole.activations
    assert cost.memory.features * 2 == whole.features


@pytest.mark.parametrize(
    ("image", "sampling", "words"),
    [
        ({"size": [256, 128]}, {"window": 16}, ("sampling.window 16", "image.style_size: 128")),
        (EXPANDED, {"window": 12}, ("sampling.window 12", "multiple of 8")),
        (EXPANDED, {"window": 16, "content_weight": 0.5}, ("sampling.window 16", "sampling.content_weight 0.5")),
        ({"size": 128, "style_size": 100}, {}, ("image.style_size 100×100", "multiples of 64")),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_the_plan(
    folder: Path, tmp_path: Path, image: Any, sampling: Any, words: tuple[str, str]
) -> None:
    with pytest.raises(JobError) as refused:
        plan(job(tmp_path, folder, image=image, sampling=sampling))
    assert all(word in str(refused.value) for word in words)


def test_keep_with_tiled_windows_is_refused_by_the_job(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"image\.fit keep.*sampling\.tiling x.*sampling\.window 64"):
        job(tmp_path, folder, image={"fit": "keep"}, sampling={"tiling": "x"})


def test_a_plan_of_kept_sizes_says_that_it_is_an_upper_bound(folder: Path, tmp_path: Path) -> None:
    assert "upper bound" in plan(job(tmp_path, folder, image={"size": 128, "fit": "keep"}, preset="texture")).describe()


def test_style_size_is_part_of_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    plans = [plan(job(tmp_path, folder, image=image)) for image in ({"size": 128}, {"size": 128, "style_size": 64})]
    assert plans[0].fingerprint_sha256 != plans[1].fingerprint_sha256
    assert plans[1].fingerprint["image.style_size"] == "64x64"
