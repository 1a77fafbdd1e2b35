"""What the engine does on this GPU: right gradients, seconds and memory of each UNet call, whole runs, determinism.

    make gpu                                                           # all stages, some 8 minutes on an H100 or H200
    make gpu ARGS="--stages smoke eager --json gpu.json"
    python benchmarks/gpu.py --rehearse runs/rehearsal --device cpu    # toy sizes, to find mistakes without a GPU

Needs no Ray and no download, and stylemill need not be installed: torch, transformers, diffusers, pyarrow, pydantic and
cachetools are enough. Stable Diffusion 1.5 and SDXL have their real dimensions and random weights. A stage that fails
does not stop the others. Lines are printed as they are measured, and `--json` writes all. A rate counts only what the
method needs. `stylemill.bench` measures, as in `stylemill bench`; the rates of a rehearsal mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))  # on a machine where stylemill is not installed

import diffusers
import numpy as np
import torch
import transformers

from attention_kernels import measure_attention
from precision import HALVES, Agreement, agreements, content_style_pairs, in_precision, latent_shape
from stylemill.bench.measure import CallInputs, device_rates, matrix_rate, measure_calls, measure_run, wait
from stylemill.bench.pass_cost import PASS_COST
from stylemill.bench.random_models import SIZE, random_model
from stylemill.bench.tile import tile_pairs
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.demo.untrained import write_demo_model
from stylemill.engine import Engine, Noise, Pair, SampleState
from stylemill.engine import calls as unet_calls
from stylemill.engine.kernels import prepare_cuda, repeatable
from stylemill.engine.memory import translate_out_of_memory
from stylemill.errors import DeviceMemoryError


@dataclass
class Bench:
    """What the stages share: the options, the models that are loaded, and what was measured."""

    options: argparse.Namespace
    device: str
    results: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)
    matrix_rate: float = float("nan")  # TFLOP/s in half precision
    best: dict[str, Any] = field(default_factory=dict)  # options of the fastest engine so far
    started: float = field(default_factory=time.perf_counter)

    def note(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def toy(self) -> bool:
        return bool(self.options.rehearse)

    @property
    def micro_batch(self) -> int:
        """Of whole runs, and of compiled engines, where each size would be compiled anew."""
        return 2 if self.toy else int(self.options.micro_batch)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.on_cuda else torch.float32

    def size(self, family: str) -> int:
        """The side of the images in pixels."""
        return 64 if self.toy else SIZE[family]

    def engine(self, family: str, **options: Any) -> Engine:
        """An engine with the dimensions of `family`. Those of one family share their weights, if not compiled."""
        key = f"{family} {sorted(options.items())}"
        if key not in self.engines:
            if family not in self.engines:
                self.engines[family] = Engine(self._model(family), threads=1)
            model = self.engines[family].model
            if options.get("compiled"):  # it changes the memory format of its UNet
                model = replace(model, unet=copy.deepcopy(model.unet))
            self.engines[key] = Engine(model, **options)
        return self.engines[key]

    def _model(self, family: str) -> Any:
        if not self.toy:
            return random_model(family, self.device, self.dtype)
        kind = "sd" if family == "sd15" else "sdxl"
        folder = write_demo_model(Path(self.options.rehearse) / kind, kind=kind)
        return Engine.load(folder, device=self.device, dtype=str(self.dtype).removeprefix("torch.")).model

    def forget(self, family: str) -> None:
        """Free the memory of a family's models."""
        for key in [key for key in self.engines if key.startswith(family)]:
            del self.engines[key]
        if self.on_cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        wait(torch.device(self.device))


# --- stages -----------------------------------------------------------------------------------------------------------


def rates(bench: Bench) -> dict[str, Any]:
    """The card's own rates: a product of matrices in half precision, and a copy."""
    found = device_rates(torch.device(bench.device))
    bench.matrix_rate = matrix_rate(found)
    return found


def smoke(bench: Bench) -> dict[str, Any]:
    """The embedded model's gradients in each precision against the CPU in float32, and a short run."""
    side, settings = (64 if bench.toy else 256), Sampling(steps=10)
    pairs = content_style_pairs(2, side)
    exact = Engine.load("demo", device="cpu", dtype="float32", threads=os.cpu_count() or 1)
    latents = torch.randn(2, *latent_shape(exact, pairs[0]), generator=torch.Generator().manual_seed(0))
    expected = exact.gradient(pairs, settings, latents, 3)
    found = {}
    for dtype in ("float32", "float16", "bfloat16"):
        engine = Engine.load("demo", device=bench.device, dtype=dtype, micro_batch=2)
        agreement = Agreement.between(engine.gradient(pairs, settings, latents, 3).cpu(), expected)
        *_, state = engine.sample(pairs, settings.model_copy(update={"steps": 3}))
        images = engine.decode(state)
        assert agreement.cosine > 0.99, agreement
        assert all(image is not None for image in images), state.failures
        found[dtype] = {"cosine": agreement.cosine, "zeros over float32": agreement.zeros, "broken": agreement.broken}
    return found


def calls(bench: Bench, family: str = "sd15", **options: Any) -> dict[str, Any]:
    """Seconds, rate and memory of each call of the UNet, at several micro-batches."""
    engine, found = bench.engine(family, **options), {}
    sizes = [1, 2] if bench.toy else [1, 2, 4, 8] if family == "sdxl" else bench.options.sizes
    for size in [bench.micro_batch] if engine.compiled else sizes:
        found[str(size)] = _fitting(partial(_calls_at, bench, engine, family, size))
        bench.note(f"{family} {options} micro-batch {size}: {_short(found[str(size)])}")
    return found


def _calls_at(bench: Bench, engine: Engine, family: str, size: int) -> dict[str, float]:
    cost, found = PASS_COST[family], dict[str, float]()
    measured = measure_calls(engine, bench.size(family), size)
    for name, call in measured.items():
        found |= {f"{name} ms": 1000 * call.seconds, f"{name} GiB": call.peak_gib}
        found[f"{name} TFLOP/s"] = cost.tflop({name: 1}) / call.seconds
    step = measured["denoise"].seconds + measured["gradient"].seconds
    rate = cost.tflop({"denoise": 1, "gradient": 1}) / step
    return found | {"step ms": 1000 * step, "TFLOP/s": rate, "utilisation": rate / bench.matrix_rate}


def _fitting(measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """What `measure` finds, or "out of memory"."""
    try:
        return translate_out_of_memory(measure)
    except DeviceMemoryError:
        return "out of memory"


def runs(bench: Bench) -> dict[str, Any]:
    """Whole runs of SD 1.5, compiled if that stage ran before, against one pair at a time."""
    guided = PRESETS["guided-transfer"]
    ways = {
        "guided 50 × 1": (Sampling(**guided), [(2, 2)] if bench.toy else bench.options.tiles),
        "guided 50 × 1, CFG 7.5": (Sampling(**{**guided, "guidance_scale": 7.5}), bench.options.tiles[:1]),
        "optimization 200 × 1": (Sampling(**PRESETS["style-transfer"]), bench.options.tiles[:1]),
    }
    return {
        name: _against_naive(bench, "sd15", name, settings, tiles, bench.micro_batch)
        for name, (settings, tiles) in ways.items()
    }


def opt_ins(bench: Bench) -> dict[str, Any]:
    """What saves UNet passes of guided sampling and changes its results, against the default."""
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        "reuse_prediction": {"reuse_prediction": True},
        "guided_every 2": {"guided_every": 2},
        "both": {"reuse_prediction": True, "guided_every": 2},
    }
    found, engine = dict[str, Any](), bench.engine("sd15")  # without compiling: `reuse_prediction` has another graph
    for name, change in changes.items():
        settings, tile = Sampling(**PRESETS["guided-transfer"] | change), (2, 2) if bench.toy else (8, 8)
        found[name] = _run(bench, engine, "sd15", settings, tile, bench.micro_batch)
        found[name]["times default"] = found[name]["images/s"] / found["default"]["images/s"]
        bench.note(f"{name}: {_short(found[name])}")
    return found


def _against_naive(
    bench: Bench, family: str, name: str, settings: Sampling, tiles: Sequence[tuple[int, int]], micro_batch: int
) -> dict[str, Any]:
    """Lockstep runs of `tiles` against what the reference code does: one pair, whose features every step computes.

    The naive way has the fastest kernels, and the same engine: batching and sharing are all that differs.
    """
    naive = _run(bench, bench.engine(family, deterministic=False), family, settings, (1, 1), 1)
    found: dict[str, Any] = {"naive": naive}
    bench.note(f"{family} {name} naive: {_short(naive)}")
    engine = bench.engine(family, **bench.best) if family == "sd15" else bench.engine(family)
    for tile in tiles:
        one = _fitting(partial(_run, bench, engine, family, settings, tile, micro_batch))
        found["×".join(map(str, tile))] = one
        if isinstance(one, dict):
            one["times naive"] = one["images/s"] / naive["images/s"]
        bench.note(f"{family} {name} {tile}: {_short(one)}")
    return found


def _run(
    bench: Bench, engine: Engine, family: str, settings: Sampling, tile: tuple[int, int], micro_batch: int
) -> dict[str, Any]:
    """Some steps of `tile` (contents × styles); from their median, without the first, the seconds of a whole run."""
    timed_steps = 3 if math.prod(tile) < 100 else 1
    run = measure_run(engine, settings, tile, bench.size(family), micro_batch, timed_steps)
    rate = run.tflops(PASS_COST[family])
    return {
        "images/s": run.images_per_second,
        "s/image": 1 / run.images_per_second,
        "ms a pair and step": 1000 * run.step_seconds / run.pairs,
        "encoding and decoding, share": run.other_seconds / run.seconds,
        "TFLOP/s": rate,
        "utilisation": rate / bench.matrix_rate,
        "images lost": run.images_lost,
        "peak_gib": run.peak_gib,
    }


def compiled(bench: Bench) -> dict[str, Any]:
    """Compile the calls, and measure them at the micro-batch that they are compiled for."""
    options = {"compiled": True}
    engine = bench.engine("sd15", **options)
    inputs = CallInputs(engine, bench.size("sd15"), bench.micro_batch)
    found: dict[str, Any] = {}
    with repeatable(1):
        start = time.perf_counter()
        targets = inputs.targets()
        bench.wait()
        found["denoise and features: s to compile"] = time.perf_counter() - start
        bench.note(_short(found))
        start = time.perf_counter()
        gradient = inputs.gradient(targets)
        bench.wait()
        found["gradient: s to compile"] = time.perf_counter() - start
        eager = CallInputs(bench.engine("sd15"), bench.size("sd15"), bench.micro_batch).gradient(targets)
    found["cosine to eager"] = torch.nn.functional.cosine_similarity(eager.flatten(1), gradient.flatten(1)).min().item()
    bench.note(_short(found))
    bench.best = options
    found["calls"] = calls(bench, "sd15", **options)
    return found


def no_waiting(bench: Bench) -> dict[str, Any]:
    """No operation of a step waits for the device: torch raises an error if one does."""
    engine, settings = bench.engine("sd15", **bench.best), Sampling(steps=4)
    engine.micro_batch = bench.micro_batch
    states = engine.sample(tile_pairs((2, 2), bench.size("sd15")), settings)
    state = next(states)
    sampler = engine._sampler(state, settings, Noise(0))
    with repeatable(1):
        sampler.take_step(state)  # its constants are on the device from now on
        if bench.on_cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            sampler.queue_step(state)
        finally:
            if bench.on_cuda:
                torch.cuda.set_sync_debug_mode("default")
    return {"operations that wait": 0}


def determinism(bench: Bench) -> dict[str, Any]:
    """The same latents twice, and after stop and resume; and what deterministic gradients cost."""
    settings, found = Sampling(steps=4), {}
    for deterministic in (True, False):
        engine = bench.engine("sd15", **(bench.best if deterministic else {"deterministic": False}))
        engine.micro_batch, pairs = bench.micro_batch, tile_pairs((2, bench.micro_batch // 2), bench.size("sd15"))
        first, again = (_last(engine, pairs, settings) for _ in range(2))
        name = "deterministic" if deterministic else "fastest"
        found[f"{name}: same bits twice"] = torch.equal(first.latents, again.latents)
        if deterministic:
            states = engine.sample(pairs, settings)
            next(states)
            state = next(states)
            inputs, progress = state.export_inputs(), state.export_progress()
            facts = json.loads(json.dumps((inputs[1], progress[1])))
            resumed = SampleState.restore(inputs[0], facts[0], progress[0], facts[1])
            *_, resumed = engine.sample([], settings, resumed)
            found["same bits after resume"] = torch.equal(first.latents, resumed.latents)
    assert found["deterministic: same bits twice"], found
    assert found["same bits after resume"], found
    return found


def _last(engine: Engine, pairs: Sequence[Pair], settings: Sampling) -> SampleState:
    *_, state = engine.sample(pairs, settings)
    return state


def half_precision(bench: Bench) -> dict[str, Any]:
    """Gradients in half precision against float32 over a run."""
    steps = 2 if bench.toy else bench.options.precision_steps
    exact = in_precision(bench.engine("sd15"), torch.float32)
    halves = {name: in_precision(exact, dtype) for name, dtype in HALVES.items()}
    rows = list(
        agreements(exact, list(halves.values()), content_style_pairs(1, bench.size("sd15")), Sampling(steps=steps))
    )
    return {
        name: {
            "least cosine": min(one.cosine for one in column),
            "most zeros over float32": max(one.zeros for one in column),
            "broken": sum(one.broken for one in column),
            "steps": steps,
        }
        for name, column in zip(halves, zip(*rows, strict=True), strict=True)
    }


def calibration(bench: Bench) -> dict[str, Any]:
    """The micro-batch that the engine chooses for itself."""
    engine = bench.engine("sd15", **bench.best)
    start = time.perf_counter()
    chosen = engine.calibrate((bench.size("sd15"),) * 2)
    return {"micro-batch": chosen, "seconds": time.perf_counter() - start}


def sdxl(bench: Bench) -> dict[str, Any]:
    """SDXL's dimensions, without compiling: its calls, and a run against one pair at a time."""
    bench.forget("sd15")
    settings, tile = Sampling(**PRESETS["guided-transfer"]), (2, 2) if bench.toy else (4, 4)
    try:
        run = _against_naive(bench, "sdxl", "guided 50 × 1", settings, [tile], 2 if bench.toy else 8)
        return {"guided 50 × 1": run, "calls": calls(bench, "sdxl")}
    finally:
        bench.forget("sdxl")


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of a gradient and of a denoising call goes: by kind of kernel, by kernel, and what copies."""
    engine = bench.engine("sd15", **bench.best)
    inputs, found = CallInputs(engine, bench.size("sd15"), bench.micro_batch), dict[str, Any]()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with repeatable(1):
        targets = inputs.targets()
        for name, work in {"denoise": inputs.denoise, "gradient": lambda: inputs.gradient(targets)}.items():
            work()
            bench.wait()
            with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
                work()
                bench.wait()
            found[name] = _kernels(profiler, bench.on_cuda)
            bench.note(f"{name}\n" + "\n".join(found[name]))
    return found


# Kinds of kernels, by a part of their names. The first that fits counts.
KERNELS = {
    "attention": "flash|sdpa|fmha",
    "compiled": "triton",
    "convolutions and matrix products": "nvjet|xmma|gemm|cutlass|conv|mm",
    "copies": "copy|memcpy",
    "indexing": "index|sort",
    "others": "",
}


def _kernels(profiler: Any, on_cuda: bool, most: int = 28) -> list[str]:
    device = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU

    def duration(event: Any) -> float:
        return float(event.self_device_time_total if on_cuda else event.self_cpu_time_total)

    def line(event: Any, text: str) -> str:
        return f"{duration(event) / total:6.1%} {event.count:4d} {text[:110]}"

    kernels = sorted((one for one in profiler.key_averages() if one.device_type == device), key=duration, reverse=True)
    total, kinds = sum(map(duration, kernels)), dict.fromkeys(KERNELS, 0.0)
    for kernel in kernels:
        kinds[next(kind for kind, part in KERNELS.items() if re.search(part, kernel.key.lower()))] += duration(kernel)
    copies = [one for one in profiler.key_averages(group_by_input_shape=True) if one.key == "aten::copy_"]
    copies.sort(key=duration, reverse=True)
    return [
        f"{total / 1000:.1f} ms in all: " + ", ".join(f"{kind} {time / total:.1%}" for kind, time in kinds.items()),
        *(line(kernel, kernel.key) for kernel in kernels[:most]),
        *(line(copy, f"{copy.key} {copy.input_shapes[:1]}") for copy in copies[: most // 4]),
    ]


def attention(bench: Bench) -> dict[str, Any]:
    """Ways to compute self-attention and its gradient."""
    found = measure_attention(torch.device(bench.device), bench.micro_batch)
    for name, one in found.items():
        bench.note(f"attention {name}: {_short(one)}")
    return found


def eager(bench: Bench) -> dict[str, Any]:
    """Calls without compiling: deterministic gradients, and the fastest ones."""
    return {"deterministic": calls(bench), "fastest": calls(bench, "sd15", deterministic=False)}


STAGES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "rates": rates,
    "smoke": smoke,
    "eager": eager,
    "compiled": compiled,
    "determinism": determinism,
    "no_waiting": no_waiting,
    "runs": runs,
    "opt_ins": opt_ins,
    "profile": profile,
    "attention": attention,
    "half_precision": half_precision,
    "calibration": calibration,
    "sdxl": sdxl,
}


def main() -> None:
    options = _parse()
    prepare_cuda()
    if options.rehearse:
        unet_calls.COMPILER = {"backend": "aot_eager"}  # the compiler of a CPU takes minutes
    bench = Bench(options, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    name = torch.cuda.get_device_name() if bench.on_cuda else "cpu"
    bench.results["machine"] = {
        "device": name,
        "date": time.strftime("%Y-%m-%d"),
        **{module.__name__: module.__version__ for module in (torch, diffusers, transformers, np)},
    }
    bench.note(json.dumps(bench.results["machine"]))
    for stage in options.stages:
        if time.perf_counter() - bench.started > options.seconds:
            bench.results[stage] = "not started: out of time"
            continue
        bench.note(f"stage {stage}")
        try:
            bench.results[stage] = STAGES[stage](bench)
            bench.note(f"{stage}: {_short(bench.results[stage])}" if stage != "profile" else "profile: done")
        except Exception:
            bench.results[stage] = traceback.format_exc()
            bench.note(f"{stage} failed\n{bench.results[stage]}")
        if options.json:
            options.json.write_text(json.dumps(bench.results, indent=1) + "\n")
    failed = [stage for stage, found in bench.results.items() if isinstance(found, str)]
    bench.note(f"failed or not started: {', '.join(failed)}" if failed else "all stages done")
    sys.exit(bool(failed))


def _sides(text: str) -> tuple[int, int]:
    contents, styles = map(int, text.split("x"))
    return contents, styles


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--json", type=Path, help="file for the results, written after each stage")
    parser.add_argument("--seconds", type=float, default=600, help="no stage is started after this time")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="micro-batches of `eager`")
    parser.add_argument("--micro-batch", type=int, default=32, help="of whole runs and of compiled calls")
    parser.add_argument("--tiles", type=_sides, nargs="+", default=[(8, 8), (16, 16)], help="contents × styles: 8x8")
    parser.add_argument("--precision-steps", type=int, default=50, help="steps of the stage half_precision")
    parser.add_argument("--rehearse", metavar="FOLDER", help="toy sizes; the folder gets small untrained models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
