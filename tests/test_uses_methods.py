"""Methods and settings of sampling against the oracle: KV injection, plain gradients, start at the content, and more.

Whole runs in float64, with pairs in a mixed shard, alone, and continued from a checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

import oracle
from stylemill.config.job import Job
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, InputImage, Noise, Pair, SampleState
from stylemill.execution.attempt import AutoSettings, Progress, Run
from stylemill.execution.driver import run
from stylemill.execution.shard import process_shard
from stylemill.execution.worker_engine import load_engine
from stylemill.planning.plan import plan
from stylemill.store.paths import RunPaths
from stylemill.store.run_file import create_run_folder

SIZE = (64, 64)  # pixels; latents of 8 x 8


def image(number: int) -> InputImage:
    random = np.random.default_rng(number)
    pixels = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((16, 16, 1))) + random.integers(-30, 30, (64, 64, 3))
    return InputImage(f"image {number}", pixels.astype(np.uint8))


CONTENTS, STYLES = [image(1), image(2)], [image(11), image(12)]
BARE = Pair((STYLES[0],), SIZE, prompt="a horse")
FULL = Pair((STYLES[0],), SIZE, CONTENTS[0], prompt="a lighthouse", negative_prompt="blurry", seed=5)
MANY = Pair((STYLES[1], STYLES[0]), SIZE, CONTENTS[1], content_weight=0.5)
NO_WEIGHT = Pair((STYLES[1],), SIZE, CONTENTS[1], content_weight=0.0)
SHARD = [FULL, MANY, NO_WEIGHT, Pair((STYLES[1],), SIZE, CONTENTS[0]), BARE]
WITH_CONTENT = SHARD[:4]

# Plain gradient steps need a rate of about 1 / |gradient|; the gradient of a mean over all tokens is about 1e-3 here.
PLAIN: dict[str, Any] = {"method": "gradient", "learning_rate": 20.0}
INJECT: dict[str, Any] = {"method": "kv_injection"}
OPTIMIZE: dict[str, Any] = {"method": "optimization"}
AT_CONTENT: dict[str, Any] = {"init": "content"}
WEIGHTS = (0.5, 1.0, 2.0, 0.0, 1.5, 1.0)
RUNS: dict[str, dict[str, Any]] = {
    "KV injection": {**INJECT, "steps": 3},
    "KV injection, guidance and AdaIN": {**INJECT, "steps": 2, "guidance_scale": 5.0, "adain": True},
    "KV injection, sharper, in between": {**INJECT, "steps": 4, "query_scale": 1.5, "start_step": 1, "end_step": 3},
    "KV injection, iterations ignored": {**INJECT, "steps": 2, "iterations": 0},
    "gradient": {**PLAIN, "steps": 3},
    "gradient, guidance and AdaIN": {**PLAIN, "steps": 2, "iterations": 2, "guidance_scale": 5.0, "adain": True},
    "gradient, all settings": {**PLAIN, "steps": 3, "query_scale": 1.5, "layer_weights": WEIGHTS, "end_step": 2},
    "guided, sharper": {"steps": 2, "query_scale": 1.5},
    "guided, layer weights": {"steps": 2, "layer_weights": WEIGHTS},
    "guided, schedule": {"steps": 4, "content_schedule": (2.0, 0.0)},
    "guided, schedule of one step": {"steps": 1, "content_schedule": (2.0, 0.5)},
    "guided, in between": {"steps": 4, "start_step": 1, "end_step": 3, "adain": True},
    "guided, guidance and all settings": {
        "steps": 3,
        "iterations": 2,
        "guidance_scale": 4.0,
        "query_scale": 0.8,
        "end_step": 2,
        "layer_weights": WEIGHTS,
        "content_schedule": (0.5, 1.5),
    },
    "guided, every second step": {"steps": 5, "guided_every": 2},
    "guided, every third step in between": {"steps": 7, "start_step": 1, "end_step": 6, "guided_every": 3},
    "gradient, every second step, guidance and AdaIN": {
        **PLAIN,
        "steps": 4,
        "start_step": 1,
        "guided_every": 2,
        "guidance_scale": 5.0,
        "adain": True,
    },
    "KV injection, every second step": {**INJECT, "steps": 4, "start_step": 1, "guided_every": 2},
    "optimization, sharper": {**OPTIMIZE, "steps": 2, "query_scale": 1.5},
    "optimization, schedule and weights": {
        **OPTIMIZE,
        "steps": 3,
        "content_schedule": (0.0, 2.0),
        "layer_weights": WEIGHTS,
    },
    "optimization, in between": {**OPTIMIZE, "steps": 4, "iterations": 2, "start_step": 1, "end_step": 3},
    "optimization from noise": {**OPTIMIZE, "steps": 2, "init": "noise"},
}
AT_CONTENT_RUNS: dict[str, dict[str, Any]] = {
    "guided": {**AT_CONTENT, "steps": 3},
    "guided, strength 0.5": {**AT_CONTENT, "steps": 4, "strength": 0.5, "guidance_scale": 3.0, "adain": True},
    "guided, strength 0.1": {**AT_CONTENT, "steps": 4, "strength": 0.1},
    "guided, strength 0.5, every second step": {**AT_CONTENT, "steps": 6, "strength": 0.5, "guided_every": 2},
    "guided, strength 0.8, late start, schedule": {
        **AT_CONTENT,
        "steps": 5,
        "strength": 0.8,
        "start_step": 2,
        "content_schedule": (2.0, 0.0),
    },
    "gradient, strength 0.5": {**AT_CONTENT, **PLAIN, "steps": 4, "strength": 0.5},
    "KV injection": {**AT_CONTENT, **INJECT, "steps": 3},
    "KV injection, strength 0.5": {**AT_CONTENT, **INJECT, "steps": 4, "strength": 0.5, "guidance_scale": 3.0},
    "optimization": {**AT_CONTENT, **OPTIMIZE, "steps": 2},
}


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


def sample_to_end(engine: Engine, pairs: Sequence[Pair], settings: Sampling) -> tuple[list[Tensor], SampleState]:
    """The latents after every step, each (P, C, h, w), and the last state."""
    latents = []
    for state in engine.sample(pairs, settings):
        latents.append(state.latents.clone())
    return latents, state


def assert_equals_the_oracle(engine: Engine, model: oracle.Model, pairs: Sequence[Pair], settings: Sampling) -> None:
    """Compares, for every pair of one shard, the latents after each step."""
    actual, state = sample_to_end(engine, pairs, settings)
    assert not state.failures
    for place, pair in enumerate(pairs):
        trace = oracle.naive_sample(model, pair, settings, Noise(settings.seed))
        assert len(actual) == len(trace.latents)
        for latents, expected in zip(actual, trace.latents, strict=True):
            assert_equal(latents[place : place + 1], expected)


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_each_pair_of_a_mixed_shard_equals_the_oracle(engine: Engine, model: oracle.Model, run: str) -> None:
    assert_equals_the_oracle(engine, model, SHARD, Sampling(**RUNS[run]))


@pytest.mark.parametrize("run", AT_CONTENT_RUNS)
def test_sampling_that_starts_at_the_content_equals_the_oracle(engine: Engine, model: oracle.Model, run: str) -> None:
    assert_equals_the_oracle(engine, model, WITH_CONTENT, Sampling(**AT_CONTENT_RUNS[run]))


@pytest.mark.parametrize("run", ["KV injection, guidance and AdaIN", "gradient", "guided, guidance and all settings"])
def test_a_pair_alone_equals_itself_in_a_mixed_shard(engine: Engine, run: str) -> None:
    settings = Sampling(**RUNS[run])
    (*_, together), _ = sample_to_end(engine, SHARD, settings)
    single = Engine(engine.model, micro_batch=1)
    for place, pair in enumerate(SHARD):
        (*_, alone), _ = sample_to_end(single, [pair], settings)
        assert_equal(together[place : place + 1], alone)


def test_a_pair_without_the_content_to_start_from_fails_and_no_other(engine: Engine) -> None:
    settings = Sampling(steps=4, strength=0.5, init="content")
    (*_, expected), _ = sample_to_end(engine, [FULL, MANY], settings)
    (*_, latents), state = sample_to_end(engine, [FULL, BARE, MANY], settings)
    assert list(state.failures) == [1]
    assert "content" in state.failures[1].message
    assert torch.equal(latents[[0, 2]], expected)


def test_every_setting_has_an_effect(engine: Engine) -> None:
    pair = replace(FULL, prompt="")  # `reuse_prediction` takes no other
    plain = {"guided": {}, "gradient": PLAIN, "optimization": OPTIMIZE, "kv_injection": INJECT}
    settings: list[dict[str, Any]] = [
        {"query_scale": 1.5},
        {"layer_weights": WEIGHTS},
        {"content_schedule": (1.0, 2.0)},
        {"end_step": 1},
        {"start_step": 1},
        {"content_weight": 0.6},
        {"guided_every": 2},
        {"reuse_prediction": True},
    ]
    for method, base in plain.items():
        (*_, without), _ = sample_to_end(engine, [pair], Sampling(steps=2, **base))
        for setting in settings:
            if method == "kv_injection" and {"layer_weights", "content_schedule", "content_weight"} & setting.keys():
                continue
            if method in ("optimization", "kv_injection") and "reuse_prediction" in setting:
                continue
            if method == "optimization" and "guided_every" in setting:
                continue
            (*_, changed), _ = sample_to_end(engine, [pair], Sampling(steps=2, **base, **setting))
            assert (changed - without).abs().max() > 1e-5, (method, setting)


def test_injection_restores_the_attention_processors(engine: Engine) -> None:
    before = {name: type(processor) for name, processor in engine.model.unet.attn_processors.items()}
    run = engine.sample([FULL], Sampling(**INJECT, steps=3))
    next(run)
    run.close()
    broken = engine.sample([FULL], Sampling(**INJECT, steps=3))
    next(broken).latents_of[0] = torch.zeros(4, 3, 3)
    with pytest.raises(RuntimeError):  # also after an error within a step
        next(broken)
    assert {name: type(processor) for name, processor in engine.model.unet.attn_processors.items()} == before


# --- passes --------------------------------------------------------------------------------------------------------

P, IMAGES = len(SHARD), len(CONTENTS) + len(STYLES)
PASSES: list[tuple[dict[str, Any], Counter[str]]] = [
    ({**INJECT, "steps": 3}, Counter(denoise=3 * P, feature=3 * IMAGES)),
    ({**INJECT, "steps": 3, "guidance_scale": 3.0, "end_step": 1}, Counter(denoise=6 * P, feature=IMAGES)),
    ({**PLAIN, "steps": 3, "iterations": 2}, Counter(denoise=3 * P, feature=3 * IMAGES, gradient=6 * P)),
    ({**PLAIN, "steps": 3, "iterations": 0}, Counter(denoise=3 * P)),
    ({"steps": 4, "start_step": 1, "end_step": 3}, Counter(denoise=4 * P, feature=2 * IMAGES, gradient=2 * P)),
    ({"steps": 4, **AT_CONTENT, "strength": 0.5}, Counter(denoise=2 * P, feature=2 * IMAGES, gradient=2 * P)),
    (
        {"steps": 4, **AT_CONTENT, "strength": 0.5, "start_step": 3, **INJECT},
        Counter(denoise=2 * P, feature=IMAGES),
    ),
    ({**OPTIMIZE, "steps": 4, "start_step": 1, "end_step": 3}, Counter(feature=2 * IMAGES, gradient=2 * P)),
    ({"steps": 5, "guided_every": 2}, Counter(denoise=5 * P, feature=3 * IMAGES, gradient=3 * P)),
    (
        {**AT_CONTENT, "steps": 6, "strength": 0.5, "start_step": 4, "guided_every": 2},
        Counter(denoise=3 * P, feature=IMAGES, gradient=P),
    ),
]


@pytest.mark.parametrize(("settings", "expected"), PASSES, ids=[str(i) for i in range(len(PASSES))])
def test_the_number_of_unet_passes(engine: Engine, settings: dict[str, Any], expected: Counter[str]) -> None:
    before = engine.passes.copy()
    sample_to_end(engine, SHARD, Sampling(**settings))
    assert engine.passes - before == expected


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {**INJECT, "steps": 3, "guidance_scale": 2.0, "adain": True},
        {**PLAIN, "steps": 3, "content_schedule": (2.0, 0.0)},
        {"steps": 5, **AT_CONTENT, "strength": 0.6, "end_step": 4},
        {**OPTIMIZE, "steps": 4, "start_step": 1, "content_schedule": (2.0, 0.0)},
    ],
    ids=["KV injection", "gradient", "start at the content", "optimization"],
)
def test_a_restored_run_continues_to_the_same_bits(engine32: Engine, settings: dict[str, Any]) -> None:
    made = Sampling(**settings)
    engine = Engine(engine32.model, micro_batch=2)
    exported = []
    for state in engine.sample(WITH_CONTENT, made):
        exported.append((state.export_inputs(), state.export_progress()))
    again = Engine(engine32.model, micro_batch=2)
    for inputs, progress in exported[:-1]:
        facts, progress_facts = (json.loads(json.dumps(given[1])) for given in (inputs, progress))
        restored = SampleState.restore(
            {name: array.copy() for name, array in inputs[0].items()},
            facts,
            {name: array.copy() for name, array in progress[0].items()},
            progress_facts,
        )
        *_, continued = again.sample(WITH_CONTENT, made, state=restored)
        assert continued.step == made.steps
        assert torch.equal(continued.latents, state.latents)


# --- settings that are refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({**OPTIMIZE, "adain": True}, ("adain", "optimization")),
        ({**OPTIMIZE, "guidance_scale": 3.0}, ("guidance_scale", "optimization")),
        ({**OPTIMIZE, "iterations": 0}, ("iterations", "optimization")),
        ({**OPTIMIZE, "guided_every": 2}, ("guided_every 2", "optimization", "lower steps")),
        ({"guided_every": 0}, ("guided_every", "greater than or equal to 1")),
        ({**OPTIMIZE, **AT_CONTENT, "strength": 0.5}, ("strength", "optimization")),
        ({"strength": 0.5}, ("strength", "init")),
        ({"strength": 0.5, "init": "noise"}, ("strength", "init: noise")),
        ({**AT_CONTENT, "steps": 10, "strength": 0.5, "end_step": 5}, ("strength", "end_step")),
        ({"start_step": 3, "end_step": 3}, ("start_step", "end_step")),
        ({"start_step": 50}, ("start_step", "steps")),
        ({**INJECT, "layer_weights": WEIGHTS}, ("layer_weights", "kv_injection")),
        ({**INJECT, "content_schedule": (1.0, 0.0)}, ("content_schedule", "kv_injection")),
        ({"layer_weights": (0.0, 0.0)}, ("layer_weights", "above 0")),
        ({"layer_weights": ()}, ("layer_weights", "above 0")),
        ({"layer_weights": (1.0, -1.0)}, ("layer_weights", "0 or more")),
        ({"content_schedule": (0.0, 0.0)}, ("content_schedule", "content_weight")),
        ({"content_schedule": (-1.0, 0.0)}, ("content_schedule", "0 or more")),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        Sampling(**settings)
    for name in named:
        assert name in str(caught.value).split("[type=")[0]


def test_all_methods_accept_the_same_common_settings() -> None:
    for method in ("guided", "gradient", "optimization", "kv_injection"):
        settings: dict[str, Any] = {"method": method, "steps": 10, "iterations": 2, "learning_rate": 0.02}
        assert Sampling(**settings).iterations == 2


def test_layer_weights_of_another_number_than_the_layers_are_refused(engine: Engine) -> None:
    from stylemill.errors import ModelError

    with pytest.raises(ModelError, match="layer_weights has 2 numbers for 6 layers"):
        next(engine.sample([FULL], Sampling(layer_weights=(1.0, 2.0))))


# --- distances in the output ---------------------------------------------------------------------------------------


@pytest.fixture
def run_job(folder: Path, tmp_path: Path) -> Any:
    """A function that runs a job of three rows and returns its data rows; with `stop`, interrupted after that step."""
    for name, given in (("c", CONTENTS[0]), ("s", STYLES[0])):
        Image.fromarray(given.pixels).save(tmp_path / f"{name}.png")
    table = pa.table({"content": ["c.png", "c.png", None], "style": ["s.png"] * 3, "content_weight": [None, 0.0, None]})
    pq.write_table(table, tmp_path / "pairs.parquet")

    def run_and_read(output: str, stop: int | None = None, **sampling: Any) -> list[dict[str, Any]]:
        job = Job.parse(
            {
                "name": "t",
                "manifest": str(tmp_path / "pairs.parquet"),
                "output": str(tmp_path / output),
                "model": str(folder),
                "image": {"size": 64},
                "shards": {"pairs_per_shard": 3},
                "sampling": {"steps": 3, **sampling},
            }
        )
        if stop is not None:
            made = plan(job)
            paths = RunPaths(Path(job.output), made.shards)
            create_run_folder(paths)
            base = str(made.manifest.base)
            interrupted = Run(
                job, paths, made.manifest, made.fingerprint_sha256, made.pairs_per_shard, made.model.label, base
            )
            reports: list[Progress] = []
            engine = load_engine(interrupted, AutoSettings())
            record = process_shard(
                interrupted,
                interrupted.new_attempt(0, {}),
                engine,
                nullcontext(),
                reports.append,
                lambda: bool(reports) and reports[-1].step >= stop,
            )
            assert record is None
            assert list(paths.checkpoints(0).iterdir())
            attempt = interrupted.new_attempt(0, {})
            record = process_shard(interrupted, attempt, engine, nullcontext(), reports.append, lambda: False)
            assert record is not None
            assert [report.step for report in reports if report.stage == "sample"] == [1, 2, 3]
        else:
            assert run(job, inline=True, quiet=True).exit_code == 0
        (data,) = (tmp_path / output / "data").iterdir()
        return pq.read_table(data).to_pylist()  # type: ignore[no-any-return]

    return run_and_read


DISTANCES = ("style_distance_before", "style_distance", "content_distance")


@pytest.mark.parametrize("settings", [{}, OPTIMIZE, INJECT, {"iterations": 0}], ids=str)
def test_the_distances_of_each_row_are_in_its_columns_for_every_method(run_job: Any, settings: dict[str, Any]) -> None:
    rows = run_job("run", **settings)
    assert [[row[name] is None for name in DISTANCES] for row in rows] == [
        [False, False, False],
        [False, False, False],  # λ = 0
        [False, False, True],  # no content
    ]
    assert min(row[name] for row in rows for name in DISTANCES if row[name] is not None) > 0
    first, no_weight, _ = rows
    assert first["style_distance_before"] == no_weight["style_distance_before"], "one photo, one style"


@pytest.mark.parametrize("settings", [{}, {"reuse_prediction": True}], ids=str)
def test_a_restarted_run_has_the_same_rows(run_job: Any, settings: dict[str, Any]) -> None:
    assert run_job("restarted", stop=2, **settings) == run_job("whole", **settings)
