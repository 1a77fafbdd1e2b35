"""Images a second: the lockstep engine over a tile against naive sampling, in one process.

    python benchmarks/throughput.py                                  # demo model, 8 × 8 tile, this CPU
    python benchmarks/throughput.py --model embedded --tile 4x4
    python benchmarks/throughput.py --model sd15 --size 512 --steps 4 --device cuda --micro-batch auto

Naive sampling is what the method's reference code does: one pair at a time, with style and content features computed
for every pair at every step. Here it uses the same engine with shards of one pair, so the kernels are the same and only
sharing and batching differ. Each round measures both; the result is the median of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from stylemill.bench.pass_cost import PASS_COST
from stylemill.bench.random_models import random_model
from stylemill.bench.tile import tile_pairs
from stylemill.config.sampling import Sampling
from stylemill.demo.untrained import write_demo_model
from stylemill.engine import Engine, Pair


def main() -> None:
    options = _parse()
    engine = _engine(options)
    micro_batch = engine.calibrate((options.size,) * 2) if options.micro_batch == "auto" else engine.micro_batch
    contents, styles = map(int, options.tile.split("x"))
    pairs = tile_pairs((contents, styles), options.size)
    naive_pairs = pairs[:: max(1, len(pairs) // options.naive_pairs)][: options.naive_pairs]
    settings = Sampling(steps=options.steps)
    print(f"{options.model}, {options.size}² pixels, {options.tile} tile, {options.steps} steps; {engine.numerics}")

    _seconds(engine, naive_pairs[:1], settings, 1)  # warm up
    ratios = []
    for number in range(options.rounds):
        naive = len(naive_pairs) / sum(_seconds(engine, [pair], settings, 1) for pair in naive_pairs)
        engine.passes.clear()
        if engine.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = _seconds(engine, pairs, settings, micro_batch)
        lockstep = len(pairs) / seconds
        ratios.append(lockstep / naive)
        print(
            f"round {number + 1}: lockstep {lockstep:.4g} img/s, naive {naive:.4g} img/s, ratio {ratios[-1]:.2f}"
            + _device_figures(engine, options, seconds)
        )
    print(f"median ratio {statistics.median(ratios):.2f}, of {options.rounds} rounds; passes {dict(engine.passes)}")


def _seconds(engine: Engine, pairs: list[Pair], settings: Sampling, micro_batch: int) -> float:
    """Time to encode, sample and decode `pairs` as one shard."""
    engine.micro_batch = micro_batch
    start = time.perf_counter()
    *_, last = engine.sample(pairs, settings)
    engine.decode(last)
    return time.perf_counter() - start


def _device_figures(engine: Engine, options: argparse.Namespace, seconds: float) -> str:
    if engine.model.device.type != "cuda":
        return ""
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    if options.model != "sd15" or options.size != 512:
        return memory
    return f"{memory}, {PASS_COST['sd15'].tflop(engine.passes) / seconds:.0f} TFLOP/s"


def _engine(options: argparse.Namespace) -> Engine:
    micro_batch = 1 if options.micro_batch == "auto" else int(options.micro_batch)
    if options.model == "sd15":
        model = random_model("sd15", options.device, torch.float16 if options.device == "cuda" else torch.float32)
        return Engine(model, threads=options.threads, micro_batch=micro_batch)
    if options.model == "embedded":
        return Engine.load("demo", device=options.device, threads=options.threads, micro_batch=micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        model_folder = write_demo_model(Path(folder) / "demo")
        return Engine.load(model_folder, device=options.device, threads=options.threads, micro_batch=micro_batch)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        choices=["demo", "embedded", "sd15"],
        default="demo",
        help="demo: untrained and small; embedded: the quickstart's; sd15: the dimensions of SD 1.5, random weights",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--tile", default="8x8", help="contents x styles")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro-batch", default="auto", help="pairs in a UNet call")
    parser.add_argument("--naive-pairs", type=int, default=8, help="pairs that are sampled naively in a round")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
