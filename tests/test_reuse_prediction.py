"""`reuse_prediction`: denoising with the ε that the last gradient pass computed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

import oracle
from precision import content_style_pairs
from stylemill.config.job import Job
from stylemill.config.sampling import Sampling
from stylemill.config.schedulers import SCHEDULERS
from stylemill.engine import Engine, Pair, SampleState
from stylemill.engine import calls as unet_calls
from stylemill.errors import JobError
from stylemill.execution import stages
from stylemill.execution.attempt import Attempt, Progress
from stylemill.planning.plan import plan
from test_calls import GRAPHS, no_graphs_left, small_engine
from test_overflow import half, weighted
from test_uses_methods import (
    AT_CONTENT,
    CONTENTS,
    PLAIN,
    SIZE,
    STYLES,
    WEIGHTS,
    assert_equal,
    assert_equals_the_oracle,
    sample_to_end,
)

__all__ = ["half", "no_graphs_left"]  # fixtures

REUSE: dict[str, Any] = {"reuse_prediction": True}
# A negative prompt has no effect without guidance, here as elsewhere.
BARE = Pair((STYLES[0],), SIZE, negative_prompt="blurry", seed=5)
WITH_CONTENT = [
    Pair((STYLES[0],), SIZE, CONTENTS[0]),
    Pair((STYLES[1], STYLES[0]), SIZE, CONTENTS[1], content_weight=0.5),
    Pair((STYLES[1],), SIZE, CONTENTS[1], content_weight=0.0),
]
SHARD = [*WITH_CONTENT, BARE]
RUNS: dict[str, dict[str, Any]] = {
    "every step": {"steps": 4},
    "iterations and AdaIN": {"steps": 3, "iterations": 3, "adain": True},
    "some steps": {"steps": 6, "start_step": 1, "end_step": 4},
    "every second step": {"steps": 5, "guided_every": 2},
    "every third step": {"steps": 7, "guided_every": 3, "start_step": 1},
    "gradient": {**PLAIN, "steps": 3, "layer_weights": WEIGHTS},
    "one step": {"steps": 1},
}


def restored(inputs: tuple[Any, Any], progress: tuple[Any, Any]) -> SampleState:
    """The state of exported inputs and progress, which went through JSON and copies as in a checkpoint."""
    facts = [json.loads(json.dumps(exported[1])) for exported in (inputs, progress)]
    arrays = [{name: array.copy() for name, array in exported[0].items()} for exported in (inputs, progress)]
    return SampleState.restore(arrays[0], facts[0], arrays[1], facts[1])


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_each_pair_of_a_mixed_shard_equals_the_oracle(engine: Engine, model: oracle.Model, run: str) -> None:
    assert_equals_the_oracle(engine, model, SHARD, Sampling(**REUSE, **RUNS[run]))


def test_sampling_that_starts_at_the_content_equals_the_oracle(engine: Engine, model: oracle.Model) -> None:
    settings = Sampling(**REUSE, **AT_CONTENT, steps=8, strength=0.6, guided_every=2)
    assert_equals_the_oracle(engine, model, WITH_CONTENT, settings)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_with_every_scheduler_the_prediction_is_that_of_the_next_step(engine: Engine, scheduler: str) -> None:
    """Where gradient steps change nothing, the reused prediction is the one that the step would compute itself."""
    common: dict[str, Any] = {"scheduler": scheduler, "steps": 7}
    idle = [Sampling(**common, learning_rate=1e-14, reuse_prediction=reuse) for reuse in (False, True)]
    own, reused = (sample_to_end(engine, SHARD[:2], settings)[0] for settings in idle)
    for expected, latents in zip(own, reused, strict=True):
        assert_equal(latents, expected)


@pytest.mark.parametrize("scheduler", ["lcm", "euler_ancestral", "dpmpp"])
def test_schedulers_with_noise_scales_or_history_equal_the_oracle(
    engine: Engine, model: oracle.Model, scheduler: str
) -> None:
    assert_equals_the_oracle(engine, model, SHARD[:1], Sampling(**REUSE, scheduler=scheduler, steps=4))


def test_sdxl_equals_the_oracle(sdxl_folder: Path) -> None:
    engine = Engine.load(sdxl_folder, dtype="float64", device="cpu", micro_batch=2)
    assert_equals_the_oracle(engine, oracle.Model.load(sdxl_folder), SHARD[:1], Sampling(**REUSE, steps=3))


def test_circular_padding_is_that_of_the_pass(engine: Engine) -> None:
    common: dict[str, Any] = {"steps": 3, "tiling": "both", "learning_rate": 1e-14}
    runs = [Sampling(**common, reuse_prediction=reuse) for reuse in (False, True)]
    own, reused = (sample_to_end(engine, SHARD[:1], settings)[0] for settings in runs)
    assert_equal(reused[-1], own[-1])


def test_a_pair_alone_equals_itself_in_a_mixed_shard(engine: Engine) -> None:
    settings = Sampling(**REUSE, steps=3)
    (*_, together), _ = sample_to_end(engine, SHARD, settings)
    single = Engine(engine.model, micro_batch=1, feature_budget_mb=0)
    for place, pair in enumerate(SHARD):
        (*_, alone), _ = sample_to_end(single, [pair], settings)
        assert_equal(together[place : place + 1], alone)


def test_a_state_without_the_option_has_no_predictions(engine: Engine) -> None:
    for reuse in (False, True):
        state = next(engine.sample(SHARD, Sampling(steps=2, reuse_prediction=reuse)))
        assert len(state.predictions_of) == len(SHARD) * reuse


# --- passes -----------------------------------------------------------------------------------------------------------

P, IMAGES = len(SHARD), 4
PASSES: list[tuple[dict[str, Any], Counter[str]]] = [
    ({"steps": 4}, Counter(denoise=P, feature=4 * IMAGES, gradient=4 * P)),
    ({"steps": 4, "iterations": 2}, Counter(denoise=P, feature=4 * IMAGES, gradient=8 * P)),
    ({"steps": 5, "guided_every": 2}, Counter(denoise=3 * P, feature=3 * IMAGES, gradient=3 * P)),
    ({"steps": 7, "guided_every": 3}, Counter(denoise=5 * P, feature=3 * IMAGES, gradient=3 * P)),
    ({"steps": 6, "start_step": 2, "end_step": 4}, Counter(denoise=4 * P, feature=2 * IMAGES, gradient=2 * P)),
]


@pytest.mark.parametrize(("settings", "expected"), PASSES, ids=str)
def test_the_number_of_unet_passes(engine: Engine, settings: dict[str, Any], expected: Counter[str]) -> None:
    before = engine.passes.copy()
    sample_to_end(engine, SHARD, Sampling(**REUSE, **settings))
    assert engine.passes - before == expected


def test_only_gradient_passes_with_a_prediction_run_the_unet_to_its_end(engine32: Engine) -> None:
    engine, ended = small_engine(engine32), []
    handle = engine.model.unet.conv_out.register_forward_hook(lambda *_: ended.append(True))
    sample_to_end(engine, SHARD[:1], Sampling(steps=1))
    assert len(ended) == 1, "denoising"
    sample_to_end(engine, SHARD[:1], Sampling(**REUSE, steps=1))
    assert len(ended) == 3, "denoising, and the gradient"
    handle.remove()


# --- resume, failures, overflows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["iterations and AdaIN", "some steps", "every second step"])
def test_a_run_restored_after_any_step_continues_to_the_same_bits(engine32: Engine, run: str) -> None:
    settings, engine = Sampling(**REUSE, **RUNS[run]), Engine(engine32.model, micro_batch=2)
    exported = []
    for state in engine.sample(SHARD, settings):
        exported.append((state.export_inputs(), state.export_progress()))
    again = Engine(engine32.model, micro_batch=2)
    for inputs, progress in exported[:-1]:
        *_, continued = again.sample(SHARD, settings, state=restored(inputs, progress))
        assert continued.step == settings.steps
        assert torch.equal(continued.latents, state.latents)


def test_excluded_pairs_do_not_change_the_others(engine: Engine) -> None:
    settings = Sampling(**REUSE, steps=3)
    (*_, expected), _ = sample_to_end(engine, SHARD, settings)
    states = engine.sample(SHARD, settings)
    state = next(states)
    copy = restored(state.export_inputs(), state.export_progress())
    *_, state = engine.sample(SHARD, settings, state=copy, excluded={1: "kills its worker"})
    assert list(state.failures) == [1]
    assert not state.predictions_of[1].any()
    assert torch.equal(state.latents[[0, 2, 3]], expected[[0, 2, 3]])
    *_, state = engine.sample(SHARD, settings, excluded={1: "kills its worker"})
    assert torch.equal(state.latents[[0, 2, 3]], expected[[0, 2, 3]])


def test_a_pair_that_is_lost_does_not_change_the_others(engine: Engine) -> None:
    settings = Sampling(**REUSE, steps=3)
    (*_, expected), _ = sample_to_end(engine, SHARD, settings)
    states = engine.sample(SHARD, settings)
    next(states).predictions_of[1].view(-1)[3] = torch.nan
    *_, state = states
    assert list(state.failures) == [1]
    assert torch.equal(state.latents[[0, 2, 3]], expected[[0, 2, 3]])


def test_a_step_that_is_taken_again_for_an_overflow_uses_the_same_prediction(half: Engine) -> None:
    settings = Sampling(**REUSE, steps=3)
    expected = [state.latents.clone() for state in half.sample(weighted(None), settings)]
    states, found = half.sample(weighted(1), settings), []
    state = next(states)
    exported = state.export_inputs(), state.export_progress()
    found = [state.latents.clone(), *(state.latents.clone() for state in states)]
    assert state.lowered_scales == {1: 256.0}
    assert not state.failures
    for latents, others in zip(found, expected, strict=True):
        assert torch.equal(latents[[0, 2, 3]], others[[0, 2, 3]])
    *_, continued = half.sample([], settings, restored(*exported))
    assert torch.equal(continued.latents, found[-1])


def test_a_step_that_is_taken_again_equals_one_whose_overflow_is_looked_for_at_once(half: Engine) -> None:
    """The gradient overflows in the second step, which begins with the prediction of the first."""
    settings = Sampling(**REUSE, steps=3, content_schedule=(0.0, 1.0))
    states = half.sample(weighted(1), settings)
    state = next(states)
    assert state.lowered_scales == {}
    copy = restored(state.export_inputs(), state.export_progress())
    copy.lowered_scales = {1: 2.0**16}  # of a pair for which no step is taken again
    *_, state = states
    *_, expected = half.sample([], settings, copy)
    assert state.lowered_scales == expected.lowered_scales == {1: 256.0}
    assert torch.equal(state.latents, expected.latents)


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_graphs_left")
def test_losses_and_noise_are_one_graph_that_is_made_when_it_is_needed(
    engine32: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet_calls, "COMPILER", GRAPHS)
    pairs, counters = content_style_pairs(5, 64), torch._dynamo.utils.counters
    eager, compiled = small_engine(engine32), small_engine(engine32, compiled=True)
    settings = Sampling(**REUSE, steps=3)
    states = compiled.sample(pairs, settings)
    next(states)
    assert counters["stats"]["unique_graphs"] == 2, "noise and activations; losses and noise"
    assert compiled.calls.unchecked == {False}
    with torch._dynamo.config.patch(error_on_recompile=True):
        *_, state = states
        sample_to_end(compiled, pairs[:1], settings)
    torch.testing.assert_close(state.latents, sample_to_end(eager, pairs, settings)[0][-1], rtol=0, atol=1e-3)
    sample_to_end(compiled, pairs, Sampling(steps=1))
    assert counters["stats"]["unique_graphs"] == 3
    assert not compiled.calls.unchecked
    assert not counters["graph_break"]


# --- settings that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "optimization"}, "for methods guided and gradient, not for method optimization"),
        ({"method": "kv_injection"}, "for methods guided and gradient, not for method kv_injection"),
        ({"iterations": 0}, "iterations 0 takes none"),
        ({"guidance_scale": 2.0}, r"guidance_scale 2\.0 needs two"),
        ({"window": 8}, "window 8 predicts in windows"),
    ],
    ids=str,
)
def test_settings_that_contradict_it_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=f"reuse_prediction .*{named}"):
        Sampling(**REUSE, **settings)


def test_a_controlnet_is_refused(engine: Engine) -> None:
    controlled = Engine(replace(engine.model, controlnets=(object(),)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="made without ControlNets"):
        next(controlled.sample(SHARD, Sampling(**REUSE)))
    model = {"name": "demo", "controlnet": "edges"}
    with pytest.raises(JobError, match=r"model\.controlnet .* sampling\.reuse_prediction"):
        Job.parse({"name": "t", "manifest": "m", "output": "o", "model": model, "sampling": REUSE})


def test_a_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="pair 1 has the prompt 'a horse'"):
        next(engine.sample([BARE, replace(BARE, prompt="a horse")], Sampling(**REUSE)))


@pytest.fixture
def planned(tmp_path: Path, folder: Path) -> Callable[..., Any]:
    """Plans a job of three rows with some column in the manifest."""

    def plan_job(column: dict[str, Sequence[Any]], **sampling: Any) -> Any:
        table = pa.table({"content": [f"{i}.png" for i in range(3)], "style": ["s.png"] * 3, **column})
        pq.write_table(table, tmp_path / "pairs.parquet")
        values = {"name": "t", "manifest": str(tmp_path / "pairs.parquet"), "output": str(tmp_path / "out")}
        return plan(Job.parse({**values, "model": str(folder), "sampling": {"steps": 6, **sampling}}))

    return plan_job


def test_the_plan_refuses_a_row_with_a_prompt(planned: Callable[..., Any]) -> None:
    prompts = {"prompt": [None, "", "a horse"]}
    with pytest.raises(JobError, match=r"reuse_prediction .* row 2 of .*pairs\.parquet has the prompt 'a horse'; set"):
        planned(prompts, **REUSE)
    planned(prompts)
    for column in ({"prompt": pa.nulls(3, pa.string())}, {"negative_prompt": ["blurry"] * 3}, {}):
        planned(column, **REUSE)


@pytest.mark.parametrize(
    ("sampling", "denoise", "gradient"),
    [
        ({}, 3 * 1, 3 * 6),
        ({"guided_every": 2}, 3 * 3, 3 * 3),
        ({"guided_every": 3}, 3 * 4, 3 * 2),
        ({"end_step": 2, "iterations": 2}, 3 * 4, 3 * 4),
        ({"init": "content", "strength": 0.5}, 3 * 1, 3 * 3),
    ],
    ids=str,
)
def test_the_plan_counts_the_passes(
    planned: Callable[..., Any], sampling: dict[str, Any], denoise: int, gradient: int
) -> None:
    cost = planned({}, **REUSE, **sampling).cost()
    assert (cost.denoise, cost.gradient) == (denoise, gradient)


# --- progress ---------------------------------------------------------------------------------------------------------


def test_a_step_without_a_pass_does_not_limit_the_time_of_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 and 3 are guided. Of the others, step 1 and 4 reuse a prediction, and step 2 has one of its own."""
    seconds = iter([0.0, 100.0, 100.1, 140.1, 240.1])
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(seconds))
    sent: list[Progress] = []
    values: dict[str, Any] = {"name": "t", "manifest": "m", "output": "o", "model": "demo"}
    cluster = {"step_timeout": 1, "stage_timeout": 3600}
    job = Job.parse({**values, "cluster": cluster, "sampling": {**REUSE, "steps": 6, "guided_every": 3}})
    report = stages.ProgressReporter(job, Attempt(0, "a", {}), 1, sent.append)
    report("sample", None)
    state = next(engine.sample(SHARD[:1], job.sampling))
    for step in (1, 2, 3, 4):
        state.step = step
        report("sample", state)
    assert [progress.limit for progress in sent] == [3600, 3600, 3600, 20 * 100, pytest.approx(20 * 0.1)]
