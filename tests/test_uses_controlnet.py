"""ControlNets, from the job file to the latents: they act while denoising, not on features and gradients."""

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
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

import oracle
from stylemill.config.job import Job
from stylemill.config.model import ControlNet
from stylemill.config.sampling import Sampling
from stylemill.demo.untrained_controlnet import write_demo_controlnet
from stylemill.engine import Engine, InputImage, Noise, Pair, SampleState
from stylemill.errors import JobError, ModelError
from stylemill.planning.plan import plan

SIZE = (64, 64)  # pixels; latents of 8 x 8
Acting = tuple[float, float, float]  # scale, start, end


def image(number: int) -> InputImage:
    random = np.random.default_rng(number)
    patches = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((16, 16, 1)))
    return InputImage(f"image {number}", (patches + random.integers(-30, 30, patches.shape)).astype(np.uint8))


CONTENT, STYLE, EDGES, DEPTH = image(1), image(11), image(21), image(22)
PAIR = Pair((STYLE,), SIZE, CONTENT, prompt="a lighthouse", negative_prompt="blurry", controls=(EDGES,))
OTHER = Pair((STYLE,), SIZE, controls=(DEPTH,), seed=3)


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    (models / "demo").symlink_to(folder)
    write_demo_controlnet(models / "edges", seed=1)
    write_demo_controlnet(models / "depth", seed=2)
    return models


@pytest.fixture(scope="module")
def engine(models: Path) -> Engine:
    return load(models, {"edges": (1.0, 0.0, 1.0)})


def load(models: Path, acting: dict[str, Acting], micro_batch: int = 2) -> Engine:
    nets = [
        ControlNet(name=str(models / name), scale=scale, start=start, end=end)
        for name, (scale, start, end) in acting.items()
    ]
    return Engine.load(models / "demo", dtype="float64", device="cpu", controlnets=nets, micro_batch=micro_batch)


def naive(models: Path, model: oracle.Model, acting: dict[str, Acting]) -> oracle.Model:
    nets = [ControlNetModel.from_pretrained(models / name).double().eval().requires_grad_(False) for name in acting]
    return replace(model, controlnets=tuple((net, *how) for net, how in zip(nets, acting.values(), strict=True)))


def last(engine: Engine, pairs: Sequence[Pair], settings: Sampling) -> SampleState:
    *_, state = engine.sample(pairs, settings)
    return state


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


ONE: dict[str, Acting] = {"edges": (1.0, 0.0, 1.0)}
TWO: dict[str, Acting] = {"edges": (0.7, 0.0, 0.5), "depth": (1.5, 0.25, 1.0)}
BOTH = replace(PAIR, controls=(EDGES, DEPTH))
RUNS = {
    "one, guidance and AdaIN": (ONE, PAIR, Sampling(steps=2, guidance_scale=5.0, adain=True, iterations=2)),
    "two, each for a part of the steps": (TWO, BOTH, Sampling(steps=4)),
    "plain gradient": (ONE, PAIR, Sampling(method="gradient", steps=2, learning_rate=50.0)),
    "KV injection": (TWO, BOTH, Sampling(method="kv_injection", steps=3, guidance_scale=2.0)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_with_controlnets_equals_the_oracle(models: Path, model: oracle.Model, run: str) -> None:
    acting, pair, settings = RUNS[run]
    expected = oracle.naive_sample(naive(models, model, acting), pair, settings, Noise(0)).latents[-1]
    assert_equal(last(load(models, acting), [pair], settings).latents, expected)


def test_features_and_gradients_do_not_depend_on_the_controlnet(engine: Engine, models: Path) -> None:
    without, settings = load(models, {}), Sampling(steps=2, guidance_scale=2.0)
    z = torch.from_numpy(Noise(0).initial_latents(PAIR, (1, 4, 8, 8)))
    assert torch.equal(engine.gradient([PAIR], settings, z, 0), without.gradient([PAIR], settings, z, 0))
    assert (last(engine, [PAIR], settings).latents - last(without, [PAIR], settings).latents).abs().max() > 1e-2


def test_each_pair_is_denoised_with_its_own_control_image(engine: Engine) -> None:
    settings = Sampling(steps=2, guidance_scale=2.0)
    pairs = [PAIR, replace(PAIR, controls=(DEPTH,)), OTHER, replace(OTHER, controls=(EDGES,))]
    together = last(engine, pairs, settings)
    for pair, latents in zip(pairs, together.latents_of, strict=True):
        assert_equal(latents[None], last(engine, [pair], settings).latents)
    assert (together.latents_of[0] - together.latents_of[1]).abs().max() > 1e-3


def test_a_pair_without_its_control_image_fails_and_no_other(engine: Engine) -> None:
    settings = Sampling(steps=2)
    pairs = [PAIR, replace(PAIR, controls=()), replace(PAIR, controls=(InputImage("?", None),)), PAIR]
    state, expected = last(engine, pairs, settings), last(engine, [PAIR] * 4, settings)
    assert {pair: failure.message for pair, failure in state.failures.items()} == {
        1: "model.controlnet needs 1 control image (column 'control', one for each), and this pair has none",
        2: "a control image of this pair could not be read",
    }
    for other in (0, 3):
        assert torch.equal(state.latents_of[other], expected.latents_of[other])


def test_a_restored_run_continues_to_the_same_bits(engine: Engine) -> None:
    settings = Sampling(steps=3)
    states = engine.sample([PAIR, OTHER], settings)
    state = next(states)
    (inputs, facts), (arrays, progress) = state.export_inputs(), state.export_progress()
    *_, state = states
    restored = SampleState.restore(inputs, json.loads(json.dumps(facts)), arrays, json.loads(json.dumps(progress)))
    assert restored.inputs.controls[0].dtype == torch.uint8
    *_, continued = engine.sample([], settings, state=restored)
    for actual, expected in zip(continued.latents_of, state.latents_of, strict=True):
        assert torch.equal(actual, expected)


def test_a_run_with_a_controlnet_of_sdxl_equals_the_oracle(sdxl_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(sdxl_folder)
    write_demo_controlnet(tmp_path / "edges", kind="sdxl")
    expected = naive(tmp_path, oracle.Model.load(tmp_path / "demo"), ONE)
    settings = Sampling(steps=2, guidance_scale=2.0)
    trace = oracle.naive_sample(expected, PAIR, settings, Noise(0))
    assert_equal(last(load(tmp_path, ONE), [PAIR], settings).latents, trace.latents[-1])


# --- job files -----------------------------------------------------------------------------------------------------


def job(folder: Path, models: Path, columns: dict[str, list[Any]], **changes: Any) -> Path:
    columns = {"style": ["style.png"] * len(next(iter(columns.values()))), **columns}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    values = {
        "manifest": "pairs.parquet",
        "output": "run",
        "model": {"name": str(models / "demo"), "controlnet": str(models / "edges")},
        "sampling": {"steps": 2},
        "image": {"size": 64},
        "shards": {"pairs_per_shard": 4},
        **changes,
    }
    (folder / "job.yaml").write_text(json.dumps(values), encoding="utf-8")
    return folder / "job.yaml"


def test_the_controlnets_of_a_job_file_are_parsed(tmp_path: Path, models: Path) -> None:
    (tmp_path / "net").mkdir()
    given = [{"name": "net", "scale": 0.5}, "some/hub-id"]
    path = job(tmp_path, models, {"control": ["c.png"]}, model={"name": str(models / "demo"), "controlnet": given})
    nets = Job.load(path).model.controlnet
    assert nets == (ControlNet(name=str(tmp_path / "net"), scale=0.5), ControlNet(name="some/hub-id"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"controlnet": {"name": "net", "strength": 1}}, "unknown key 'model.controlnet.strength'"),
        ({"controlnet": {"name": "net", "start": 0.5, "end": 0.5}}, "start 0.5 is not before its end 0.5"),
        ({"controlnet": {"name": "net", "scale": -1}}, "model.controlnet.scale"),
    ],
)
def test_mistakes_in_the_settings_of_a_controlnet_are_named(
    tmp_path: Path, models: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        Job.load(job(tmp_path, models, {"control": ["c.png"]}, model={"name": "demo", **model}))


def test_optimization_is_refused_since_it_does_not_denoise(tmp_path: Path, models: Path) -> None:
    sampling = {"method": "optimization", "steps": 2}
    with pytest.raises(JobError, match=r"model\.controlnet acts while denoising, and sampling\.method optimization"):
        Job.load(job(tmp_path, models, {"control": ["c.png"]}, preset=None, sampling=sampling))


def test_a_controlnet_of_another_architecture_is_refused(tmp_path: Path, models: Path) -> None:
    write_demo_controlnet(tmp_path / "other", kind="sdxl")
    model = {"name": str(models / "demo"), "controlnet": str(tmp_path / "other")}
    path = job(tmp_path, models, {"control": ["c.png"]}, model=model)
    with pytest.raises(ModelError, match=r"controlnet '.*other'.*another architecture: its cross_attention_dim is"):
        plan(path)
    with pytest.raises(ModelError, match="another architecture"):
        Engine.load(models / "demo", controlnets=[ControlNet(name=str(tmp_path / "other"))])
    model["controlnet"] = str(models / "demo" / "unet")
    with pytest.raises(ModelError, match="is a UNet2DConditionModel, not a ControlNetModel"):
        plan(job(tmp_path, models, {"control": ["c.png"]}, model=model))


def test_a_manifest_without_control_images_is_refused_by_the_plan(tmp_path: Path, models: Path) -> None:
    with pytest.raises(JobError, match=r"model\.controlnet needs a column 'control'"):
        plan(job(tmp_path, models, {"prompt": ["a lighthouse"]}))


def test_the_fingerprint_depends_on_controlnets_and_their_scales(tmp_path: Path, models: Path) -> None:
    def fingerprint(**net: Any) -> str:
        model = {"name": str(models / "demo"), "controlnet": net}
        return plan(job(tmp_path, models, {"control": ["c.png"]}, model=model)).fingerprint_sha256

    one = fingerprint(name=str(models / "edges"))
    assert one == fingerprint(name=str(models / "edges"), scale=1.0)
    others = [fingerprint(name=str(models / "depth")), fingerprint(name=str(models / "edges"), scale=0.5)]
    assert len({one, *others}) == 3


@pytest.mark.parametrize("listed", [False, True])
def test_a_run_with_control_images_from_files(tmp_path: Path, models: Path, listed: bool) -> None:
    from stylemill.cli import main

    Image.fromarray(np.asarray(CONTENT.pixels)).resize((96, 64)).save(tmp_path / "content.png")
    Image.fromarray(np.asarray(STYLE.pixels)).save(tmp_path / "style.png")
    Image.fromarray(np.asarray(EDGES.pixels)).convert("L").resize((96, 64)).save(tmp_path / "edges.png")
    controls = ["edges.png", "content.png", None, "nothing.png"]
    columns = {
        "pair_id": ["edges", "itself", "none", "absent"],
        "content": ["content.png"] * 4,
        "control": [[control] if control else [] for control in controls] if listed else controls,
    }
    assert main(["run", str(job(tmp_path, models, columns)), "--inline"]) == 3
    good = pq.read_table(tmp_path / "run" / "data").to_pylist()
    assert [row["pair_id"] for row in good] == ["edges", "itself"]
    assert good[0]["sha256"] != good[1]["sha256"]
    settings = json.loads(good[0]["settings"])
    assert settings["control"] == ["edges.png"]
    assert settings["controlnet"] == [{"name": "edges", "scale": 1.0, "start": 0.0, "end": 1.0}]
    lost = {row["pair_id"]: row for row in pq.read_table(tmp_path / "run" / "failures").to_pylist()}
    assert lost.keys() == {"none", "absent"}
    assert "needs 1 control image" in lost["none"]["message"]
    assert (lost["absent"]["stage"], "nothing.png" in lost["absent"]["message"]) == ("read", True)
