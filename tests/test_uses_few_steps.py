"""Sampling in few steps: schedulers, each against diffusers' own run of one pair, and LoRAs fused into the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

import oracle
from stylemill.config.job import Job
from stylemill.config.model import Lora
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.config.schedulers import REFUSED, SCHEDULERS
from stylemill.engine import Engine, InputImage, Noise, Pair, SampleState
from stylemill.engine.schedulers import Scheduler
from stylemill.errors import JobError, ModelError
from stylemill.planning.plan import plan

SIZE = (64, 64)  # pixels; latents of 8 x 8


def image(number: int) -> InputImage:
    random = np.random.default_rng(number)
    pixels = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((16, 16, 1))) + random.integers(-30, 30, (64, 64, 3))
    return InputImage(f"image {number}", pixels.astype(np.uint8))


CONTENT, STYLES = image(1), [image(11), image(12)]
SHARD = [
    Pair((STYLES[0],), SIZE, CONTENT, prompt="a lighthouse", negative_prompt="blurry", seed=5),
    Pair((STYLES[1],), SIZE, CONTENT),
    Pair((STYLES[0],), SIZE, prompt="a horse"),  # in a micro-batch of its own: no content
]
# Tolerances: these schedulers compute in float32 whatever the input is, so values can be rounded to either side.
TOLERANCES = dict.fromkeys(("dpmpp", "dpmpp_sde", "euler", "euler_ancestral"), 1e-05)
STOCHASTIC = [name for name, kind in SCHEDULERS.items() if kind.draws]


def sampled(engine: Engine, pairs: list[Pair], settings: Sampling) -> list[Tensor]:
    return [state.latents.clone() for state in engine.sample(pairs, settings)]


# --- schedulers ----------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    **{name: {"scheduler": name, "steps": 3} for name in SCHEDULERS},
    "ddim with noise": {"steps": 2, "eta": 0.7},
    "tcd without noise": {"scheduler": "tcd", "steps": 2, "eta": 0.0},
    "lcm, guidance and AdaIN": {"scheduler": "lcm", "steps": 2, "guidance_scale": 3.0, "adain": True, "iterations": 2},
    "lcm, one step": {"scheduler": "lcm", "steps": 1},
    "euler, KV injection": {"scheduler": "euler", "steps": 2, "method": "kv_injection"},
    "lcm, optimization": {"scheduler": "lcm", "steps": 2, "method": "optimization"},
}


@pytest.mark.parametrize("run", RUNS)
def test_each_pair_equals_diffusers_own_run_of_that_pair(engine: Engine, model: oracle.Model, run: str) -> None:
    settings = Sampling(**RUNS[run])
    naive = {"optimization": oracle.naive_optimization, "kv_injection": oracle.naive_kv_injection}
    steps = sampled(engine, SHARD, settings)
    for place, pair in enumerate(SHARD):
        trace = naive.get(settings.method, oracle.naive_guided)(model, pair, settings, Noise(settings.seed))
        tolerance = TOLERANCES.get(settings.scheduler, 1e-8)
        for actual, expected in zip(steps, trace.latents, strict=True):
            torch.testing.assert_close(actual[place : place + 1], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["dpmpp", "euler", "lcm"])
def test_sampling_from_the_content_starts_within_the_schedule(engine: Engine, model: oracle.Model, name: str) -> None:
    settings = Sampling(scheduler=name, steps=4, init="content", strength=0.75)
    trace = oracle.naive_guided(model, SHARD[0], settings, Noise(0))
    *_, last = sampled(engine, SHARD[:2], settings)
    torch.testing.assert_close(last[:1], trace.latents[-1], rtol=0, atol=TOLERANCES.get(name, 1e-8))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ddim"])
def test_images_are_noised_to_the_noise_level_of_the_scheduler(model: oracle.Model, name: str) -> None:
    scheduler, original = Scheduler(model.scheduler(4), Sampling(scheduler=name, steps=4)), model.sampler(name, 4)
    clean, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for step in range(3):
        timestep = original.timesteps[step + 1 : step + 2]
        expected = original.add_noise(clean[None], noise[None], timestep)[0]
        if SCHEDULERS[name].sigmas:
            expected = expected / (original.sigmas[step + 1] ** 2 + 1) ** 0.5
        noised = scheduler.add_noise(clean, noise, scheduler.next_timestep(step))
        torch.testing.assert_close(noised, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dpmpp_sde", "euler_ancestral", "tcd"])
def test_a_restored_run_continues_to_the_same_bits(engine32: Engine, name: str) -> None:
    settings = Sampling(scheduler=name, steps=4)
    engine = Engine(engine32.model, micro_batch=1)
    exported = [(state, state.export_inputs(), state.export_progress()) for state in engine.sample(SHARD, settings)]
    state, inputs, progress = exported[-1][0], exported[1][1], exported[1][2]
    facts, progress_facts = (json.loads(json.dumps(given[1])) for given in (inputs, progress))
    copies = {name: array.copy() for name, array in progress[0].items()}
    restored = SampleState.restore(inputs[0], facts, copies, progress_facts)
    again = Engine(engine32.model, micro_batch=1)
    *_, continued = again.sample([], settings, state=restored)
    assert torch.equal(continued.latents, state.latents)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_noise_of_a_step_depends_on_the_pair_and_the_seed(engine: Engine, name: str) -> None:
    settings = Sampling(scheduler=name, steps=2, iterations=0)
    (_, both) = sampled(engine, SHARD[:2], settings)
    (_, swapped) = sampled(engine, SHARD[1::-1], settings)
    torch.testing.assert_close(both, swapped.flip(0), rtol=0, atol=TOLERANCES.get(name, 1e-8))
    (_, other) = sampled(engine, SHARD[:2], settings.model_copy(update={"seed": 1}))
    assert (other - both).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_unipc_undoes_guidance_as_its_refusal_says(model: oracle.Model) -> None:
    def end(change: float) -> Tensor:
        scheduler = UniPCMultistepScheduler.from_config(model.scheduler_config)
        scheduler.set_timesteps(3)
        z, epsilon = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 0.1)
        z = scheduler.step(epsilon, scheduler.timesteps[0], z).prev_sample + change
        # Only the prediction could depend on the change, and here it does not.
        x = scheduler.convert_model_output(epsilon, sample=z - change)
        scheduler.convert_model_output = lambda *_, **__: x
        return scheduler.step(epsilon, scheduler.timesteps[1], z).prev_sample  # type: ignore[no-any-return]

    assert torch.equal(end(0.0), end(0.5))


def test_the_patch_of_diffusers_is_removed(engine: Engine) -> None:
    import diffusers.schedulers.scheduling_lcm as module

    before = module.randn_tensor
    next(engine.sample(SHARD[:1], Sampling(scheduler="lcm", steps=2, iterations=0)))
    assert module.randn_tensor is before


def test_the_job_does_not_use_the_models_own_sampling_parameters() -> None:
    noise_schedule = DDIMScheduler.from_config(
        {"beta_schedule": "scaled_linear", "use_karras_sigmas": True, "timestep_spacing": "trailing"}
    )
    made = Scheduler(noise_schedule, Sampling(scheduler="dpmpp", steps=4)).scheduler
    assert (made.config.use_karras_sigmas, made.config.timestep_spacing) == (False, "leading")
    assert made.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(({"scheduler": name}, (name, "refused")) for name in REFUSED),
        ({"scheduler": "ddmi"}, ("ddmi", "ddim, lcm")),
        ({"scheduler": "lcm", "steps": 51}, ("scheduler lcm", "steps 51")),
        ({"scheduler": "lcm", "steps": 5, "eta": 0.5}, ("eta", "scheduler lcm")),
        ({"eta": 0.5, "method": "optimization"}, ("eta", "optimization")),
        ({"scheduler": "dpmpp", "window": 16}, ("window", "scheduler dpmpp")),
        ({"eta": 0.5, "window": 16}, ("window", "eta 0.5")),
    ],
    ids=str,
)
def test_schedulers_that_do_not_fit_are_refused_with_their_name(
    settings: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        Sampling(**settings)
    for name in named:
        assert name in str(caught.value).split("[type=")[0]


def test_a_job_with_a_refused_scheduler_is_refused() -> None:
    job = {"name": "t", "manifest": "m", "output": "o", "model": "m", "sampling": {"scheduler": "heun"}}
    with pytest.raises(JobError, match="scheduler heun is refused"):
        Job.parse(job)


def test_the_preset_has_the_documented_settings() -> None:
    made = Sampling(**PRESETS["few-steps"])
    assert (made.steps, made.iterations, made.learning_rate, made.content_weight) == (28, 3, 0.25, 0.33)
    assert made.scheduler == "lcm"


# --- LoRAs ---------------------------------------------------------------------------------------------------------

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"


def factors(module: Any, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    random, weight = torch.Generator().manual_seed(seed), module.weight
    down = torch.randn(rank, *weight.shape[1:], generator=random) * 0.1
    up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2), generator=random) * 0.1
    return down, up


def changed(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    down, up = down.double(), up.double()
    if weight.dim() == 4:
        return weight + scale * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    return weight + scale * up @ down


@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
def test_a_fused_lora_adds_scale_times_b_a_to_the_weight(
    engine: Engine, folder: Path, tmp_path: Path, layout: str
) -> None:
    unet, encoder = engine.model.unet, engine.model.text_encoders[0]
    text = next(name for name, _ in encoder.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    text_key = text if text.startswith("text_model.") else f"text_model.{text}"
    targets = [("unet", name, unet.get_submodule(name)) for name in (TO_Q, CONV)]
    targets.append(("text_encoder", text_key, encoder.get_submodule(text)))
    tensors: dict[str, Tensor] = {}
    made = {}
    for seed, (part, name, module) in enumerate(targets):
        down, up = factors(module, 3, seed)
        made[name] = down, up
        prefix, ends = {
            "peft": (f"{part}.{name}.", ("lora_A.weight", "lora_B.weight")),
            "diffusers": (f"{part}.{name}.", ("lora.down.weight", "lora.up.weight")),
            "kohya": (
                f"lora_{'te' if part == 'text_encoder' else part}_{name.replace('.', '_')}.",
                ("lora_down.weight", "lora_up.weight"),
            ),
        }[layout]
        if part == "text_encoder" and layout == "diffusers":
            ends = "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
        tensors |= dict(zip((prefix + end for end in ends), (down, up), strict=True))
        if layout == "kohya":
            tensors[f"{prefix}alpha"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "style.safetensors")
    fused = Engine.load(folder, dtype="float64", loras=[Lora(name=str(tmp_path), scale=0.8)]).model
    scale = 0.8 * (0.5 if layout == "kohya" else 1.0)
    updated = [fused.unet.get_submodule(name) for name in (TO_Q, CONV)]
    updated.append(fused.text_encoders[0].get_submodule(text))
    for module, (_, name, before) in zip(updated, targets, strict=True):
        expected = changed(before.weight, *made[name], scale)
        torch.testing.assert_close(module.weight, expected, rtol=0, atol=1e-12)
        assert (module.weight - before.weight).abs().max() > 1e-4
    unchanged = [name for name, _ in unet.named_parameters() if not name.startswith((TO_Q, CONV))]
    assert all(torch.equal(fused.unet.get_parameter(name), unet.get_parameter(name)) for name in unchanged)
    assert not any(parameter.requires_grad for parameter in fused.unet.parameters())


def test_a_fused_lora_equals_that_of_diffusers_and_peft(engine: Engine, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    down, up = factors(engine.model.unet.get_submodule(TO_Q), 4, 7)
    save_file({f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up}, tmp_path / "style.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    fused = Engine.load(folder, dtype="float32", loras=[Lora(name=str(tmp_path / "style.safetensors"), scale=0.5)])
    expected = pipeline.unet.get_submodule(TO_Q).weight
    torch.testing.assert_close(fused.model.unet.get_submodule(TO_Q).weight, expected, rtol=0, atol=1e-6)


def test_alpha_is_read_from_the_metadata_of_peft(engine: Engine, folder: Path, tmp_path: Path) -> None:
    module = engine.model.unet.get_submodule(TO_Q)
    down, up = factors(module, 4, 7)
    tensors = {f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up}
    for facts, scale in (({"unet.lora_alpha": 8, "unet.r": 4}, 2.0), ({"unet.use_rslora": True}, None)):
        save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(facts)})
        loras = [Lora(name=str(tmp_path / "a.safetensors"))]
        if scale is None:
            with pytest.raises(ModelError, match="use_rslora"):
                Engine.load(folder, dtype="float64", loras=loras)
        else:
            weight = Engine.load(folder, dtype="float64", loras=loras).model.unet.get_submodule(TO_Q).weight
            torch.testing.assert_close(weight, changed(module.weight, down, up, scale), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({f"unet.{TO_Q}.lora_A.weight": (4, 7), f"unet.{TO_Q}.lora_B.weight": (9, 4)}, ("9×7", TO_Q)),
        ({"unet.x.to_q.lora_A.weight": (4, 8), "unet.x.to_q.lora_B.weight": (8, 4)}, ("architecture", "unet.x.to_q")),
        ({f"unet.{TO_Q}.lora_A.weight": (4, 32)}, ("two factors", TO_Q)),
        ({"some.weight": (4, 4)}, ("lora",)),
        ({f"unet.{TO_Q}.hada_w1_a": (4, 4)}, ("LoHa",)),
    ],
    ids=["shape", "no such layer", "one factor", "no LoRA", "LoHa"],
)
def test_a_lora_of_another_architecture_or_kind_is_refused(
    folder: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], named: tuple[str, ...]
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        Engine.load(folder, loras=[Lora(name=str(tmp_path / "other.safetensors"))])
    for word in (*named, "other.safetensors"):
        assert word in str(caught.value)


def test_the_loras_of_a_job_are_part_of_its_fingerprint(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"style": ["s.png"]}), tmp_path / "m.parquet")
    for number in (0, 1):
        save_file({"unet.x.lora_A.weight": torch.full((1, 1), float(number))}, tmp_path / f"{number}.safetensors")
    (tmp_path / "weights.bin").touch()

    def made(*loras: Any) -> dict[str, Any]:
        model = {"name": str(folder), "loras": list(loras)}
        values = {"name": "t", "manifest": str(tmp_path / "m.parquet"), "output": str(tmp_path / "out"), "model": model}
        return dict(plan(Job.parse(values)).fingerprint)

    first = made({"name": str(tmp_path / "0.safetensors"), "scale": 0.5})
    assert first["model.loras.0.scale"] == 0.5
    assert len(str(first["model.loras.0.0.safetensors"])) == 64
    assert made(str(tmp_path / "1.safetensors")) != made({"name": str(tmp_path), "file": "0.safetensors"})
    for lora, message in (
        ({"name": str(tmp_path)}, "name one of its .safetensors files as 'file'; it has: 0.safetensors, 1.saf"),
        ({"name": str(tmp_path), "file": "2.safetensors"}, "has no file 2.safetensors"),
        ({"name": str(tmp_path / "none.safetensors")}, "no such file or folder"),
        ({"name": str(tmp_path / "weights.bin")}, "not a .safetensors file"),
    ):
        with pytest.raises(ModelError, match=message):
            made(lora)
    with pytest.raises(JobError, match=r"model\.loras\.weight"):
        made({"name": "x", "weight": 1.0})
