"""`model: demo`, the trained model of the package: stylized images get nearer to their style and keep their content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stylemill
from appearance import Pixels
from stylemill.config.job import Job
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.engine import Engine, InputImage, Pair
from stylemill.models.resolve import resolve_model
from stylization import QUICKSTART, evaluate, read, stylize

FOLDER = Path(stylemill.__file__).parent / "demo"
SETTINGS = PRESETS["style-transfer"] | {"steps": 12, "learning_rate": 0.12}  # the quickstart's


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.load("demo", dtype="float32", device="cpu", micro_batch=6)


@pytest.fixture(scope="module")
def photos() -> list[InputImage]:
    return read([QUICKSTART / "content"], 128)[:4]


@pytest.fixture(scope="module")
def paintings() -> list[InputImage]:
    return read([QUICKSTART / "style"], 128)


def test_the_embedded_model_is_complete_small_and_needs_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = resolve_model("demo")
    assert model.folder == FOLDER
    assert model.label.startswith("demo@")
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 25e6
    assert (FOLDER / "MODEL_CARD.md").is_file()


def test_a_folder_named_demo_next_to_the_job_file_is_not_the_embedded_model(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "job.yaml").write_text("manifest: m.parquet\noutput: run\nmodel: demo\n")
    assert Job.load(tmp_path / "job.yaml").model.name == "demo"
    with_path = Job.load(tmp_path / "job.yaml", {"model": str(tmp_path / "demo")})
    assert with_path.model.name == str(tmp_path / "demo")


def test_it_has_the_layers_of_stable_diffusion_1(demo):
    names = [name for name, _ in demo.model.unet.named_modules() if name.endswith("attn1")]
    places = [name.split(".transformer_blocks")[0] for name in names]
    down = [f"down_blocks.{block}.attentions.{layer}" for block in range(3) for layer in range(2)]
    up = [f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in range(3)]
    assert sorted(places) == sorted([*down, "mid_block.attentions.0", *up])


def test_its_vae_reconstructs_photos_with_their_colours(demo):
    quality, shifts = [], []
    for photo in read([QUICKSTART / "content"], 256):
        reconstructed = demo.model.decode_image(demo.model.encode_image(photo.pixels))
        error = (reconstructed.astype(np.float64) - photo.pixels) / 255
        quality.append(-10 * np.log10(np.mean(error**2)))
        shifts.append(np.abs(error.mean((0, 1))).max())
    assert np.mean(quality) >= 28
    assert max(shifts) < 0.02


@pytest.fixture(scope="module")
def stylized(demo, photos, paintings) -> list[list[Pixels]]:
    return stylize(demo, photos, paintings, Sampling(**SETTINGS))


def test_images_get_nearer_to_their_styles_and_keep_their_contents(stylized, photos, paintings):
    scores = evaluate(photos, paintings, stylized)
    assert scores["colour_nearer"] >= 0.9
    assert scores["patch_nearer"] >= 0.9
    assert scores["kept"] >= 0.9
    assert scores["colour"] <= 0.7, "30% nearer in the median"
    assert scores["patch"] <= 0.7


def test_a_higher_content_weight_keeps_more_content_and_less_style(demo, stylized, photos, paintings):
    images = photos[:3], paintings[1:3]
    usual = evaluate(*images, [row[1:3] for row in stylized[:3]])
    low, high = (
        evaluate(*images, stylize(demo, *images, Sampling(**SETTINGS | {"content_weight": weight})))
        for weight in (0.0, 1.0)
    )
    assert low["edges"] < usual["edges"] < high["edges"]
    assert low["patch"] < usual["patch"] < high["patch"]
    assert max(low["colour"], usual["colour"]) < high["colour"], "colours are the style's with any small weight"


def test_the_distances_of_the_output_rows_say_which_images_are_nearer_to_style_or_content(demo, photos, paintings):
    """λ 0, 0.25 and 1 in one shard, so that only λ differs."""
    images = zip(photos[:2], paintings[1:3], strict=True)
    pairs = [
        Pair((style,), photo.size, photo, content_weight=weight)
        for photo, style in images
        for weight in (0.0, 0.25, 1.0)
    ]
    settings = Sampling(**SETTINGS)
    *_, state = demo.sample(pairs, settings)
    rows = demo.distances(state, settings)
    for first in range(0, len(rows), 3):
        without, usual, high = rows[first : first + 3]
        assert without.style_before == usual.style_before == high.style_before
        assert max(without.style, usual.style) < high.style < high.style_before
        assert without.content > usual.content > high.content > 0
