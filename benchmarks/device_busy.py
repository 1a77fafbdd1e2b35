"""The share of a run's wall time in which the device works, and what it waits for in the rest.

    PYTHONPATH=benchmarks python benchmarks/device_busy.py                  # the local executor
    PYTHONPATH=benchmarks python benchmarks/device_busy.py --ray            # Ray with one worker
    PYTHONPATH=benchmarks python benchmarks/device_busy.py --pairs 64 --shards 4    # a shard as on a GPU; minutes

The run is a real one: it reads, decodes and fits JPEG photos, encodes PNG images, writes checkpoints and commits. Only
the device is fake. Its step sleeps for as long as a GPU would work, because a GPU leaves the CPU free meanwhile. The
wall time counts from the first step to the end of the last decoding.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import fake_engine
from fake_engine import FakeEngine

if TYPE_CHECKING:
    from stylemill.engine import Pixels, SampleState

# Where the run's own work on the CPU is measured: module, and the function or method. In the order in which a wait of
# the device is put down to them where several go on at the same time.
HOST_WORK = {
    "checkpoint": ("stylemill.execution.checkpointing", "ShardCheckpoints.save"),
    "read": ("stylemill.execution.shard", "read_pairs"),
    "encode image files": ("stylemill.execution.shard", "with_encoded_image"),
    "write": ("stylemill.execution.shard", "write_tables"),
    "commit": ("stylemill.execution.shard", "commit"),
}
DEVICE_WORK = ("step", "measure", "decode")


class Event(NamedTuple):
    """Work of the device or of the CPU. `nominal`: seconds that the device works for; the rest is a late wake-up."""

    what: str
    thread: int
    start: float
    end: float
    nominal: float | None = None


@contextmanager
def logged(what: str, nominal: float | None = None) -> Iterator[None]:
    """Append an event to the file $DEVICE_LOG. Work of the device is stretched to `nominal` seconds."""
    start = time.monotonic()
    yield
    if nominal is not None:
        time.sleep(max(start + nominal - time.monotonic(), 0))
    event = Event(what, threading.get_ident(), start, time.monotonic(), nominal)
    with open(os.environ["DEVICE_LOG"], "a") as log:
        log.write(json.dumps(event) + "\n")


class DeviceEngine(FakeEngine):
    """The fake engine on a device that takes $STEP_SECONDS a pair and step, and $DECODE_SECONDS an image."""

    grain = np.random.default_rng(0).normal(0, 6, (512, 512, 3))  # smooth images are encoded faster than photos

    def sample(self, *arguments: Any, **options: Any) -> Iterator[SampleState]:
        states, pairs = super().sample(*arguments, **options), len(arguments[0])
        while True:
            with logged("step", pairs * float(os.environ["STEP_SECONDS"])):
                state = next(states, None)
            if state is None:
                return
            yield state

    def distances(self, *arguments: Any) -> list[Any]:
        with logged("measure", 0.0):
            return super().distances(*arguments)

    def decode(self, state: SampleState, decoders: object = None) -> list[Pixels | None]:
        with logged("decode", len(state.latents_of) * float(os.environ["DECODE_SECONDS"])):
            return [image if image is None else self._grainy(image) for image in super().decode(state, decoders)]

    def _grainy(self, image: Pixels) -> Pixels:
        height, width, _ = image.shape
        pixels: Pixels = np.clip(image + self.grain[:height, :width], 0, 255).astype(np.uint8)
        return pixels


def install() -> None:
    """Make workers of this process load the engine above, and log what they do on the CPU."""
    from importlib import import_module

    fake_engine.install(DeviceEngine)
    for what, (module, name) in HOST_WORK.items():
        *path, last = name.split(".")
        owner = functools.reduce(getattr, path, import_module(module))
        setattr(owner, last, _logging(what, getattr(owner, last)))


def _logging(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with logged(what):
            return function(*arguments, **options)

    return call


def write_job(folder: Path, shards: int, pairs: int, steps: int, size: int = 512) -> dict[str, Any]:
    """Photos, a manifest of `shards` × `pairs` rows, and the values of a job. A shard has √pairs contents and styles.

    Styles are shared by all shards, contents by the pairs of one.
    """
    side = math.isqrt(pairs)
    styles, contents = [f"style-{number}.jpg" for number in range(side)], []
    rng = np.random.default_rng(0)
    for shard in range(shards):
        contents += [f"content-{shard}-{number}.jpg" for number in range(-(-pairs // side))]
    for name in (*styles, *contents):
        _photo(rng, size).save(folder / name, quality=92)
    per_shard = len(contents) // shards
    rows = [
        (contents[shard * per_shard + pair // side], styles[pair % side])
        for shard in range(shards)
        for pair in range(pairs)
    ]
    columns = {"content": [content for content, _ in rows], "style": [style for _, style in rows]}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return {
        "name": "device-busy",
        "manifest": str(folder / "pairs.parquet"),
        "output": str(folder / "run"),
        "model": "demo",
        "image": {"size": size},
        "sampling": {"steps": steps},
        "shards": {"pairs_per_shard": pairs},
        "cluster": {"workers": 1, "gpus_per_worker": 0, "micro_batch": 2},
    }


def _photo(rng: np.random.Generator, size: int) -> Image.Image:
    """An image with large forms and grain, 4:3 and larger than it is used."""
    width, height = size * 5 // 2, size * 15 // 8
    forms = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(forms) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def read_log(path: Path) -> list[Event]:
    return sorted((Event(*json.loads(line)) for line in path.read_text().splitlines()), key=lambda event: event.start)


def busy_and_idle(events: Sequence[Event]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Wall time, seconds of the device's work by kind, and of its waits by cause."""
    device = [event for event in events if event.what in DEVICE_WORK]
    host = [event for event in events if event.what not in DEVICE_WORK]
    busy, idle = Counter[str](), Counter[str]()
    for event in device:
        worked = min(event.end - event.start, event.nominal or math.inf)
        busy[event.what] += worked
        idle["late wake-up"] += event.end - event.start - worked
    for before, after in itertools.pairwise(device):
        threads = {before.thread, after.thread}  # another thread does not keep the device waiting
        waits = [(before.end, after.start)]
        for what in HOST_WORK:
            unexplained = _total(waits)
            for event in host:
                if event.what == what and event.thread in threads:
                    waits = [part for wait in waits for part in _without(wait, event)]
            idle[what] += unexplained - _total(waits)
        idle["other"] += _total(waits)
    return device[-1].end - device[0].start, dict(busy), dict(idle)


def _without(wait: tuple[float, float], event: Event) -> list[tuple[float, float]]:
    """The parts of a wait before and after an event."""
    start, end = wait
    parts = ((start, min(end, event.start)), (max(start, event.end), end))
    return [part for part in parts if part[0] < part[1]]


def _total(waits: Sequence[tuple[float, float]]) -> float:
    return sum(end - start for start, end in waits)


def main() -> None:
    options = _parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        values = write_job(Path(folder), options.shards, options.pairs, options.steps)
        values["cluster"]["threads"] = options.threads
        os.environ |= {
            "DEVICE_LOG": str(Path(folder) / "device.log"),
            "STEP_SECONDS": str(options.step_ms / 1000),
            "DECODE_SECONDS": str(options.decode_ms / 1000),
        }
        run(values, options.ray)
        wall, busy, idle = busy_and_idle(read_log(Path(os.environ["DEVICE_LOG"])))
    step = options.pairs * options.step_ms / 1000
    print(
        f"{'Ray' if options.ray else 'local'}: {options.shards} shards of {options.pairs} pairs, "
        f"{options.steps} steps of {step:.2f} s, {options.decode_ms:g} ms to decode an image"
    )
    print(f"device busy {sum(busy.values()) / wall:.1%} of {wall:.1f} s: {_shares(busy, wall)}")
    print(f"idle: {_shares(idle, wall)}")


def run(values: dict[str, Any], on_ray: bool = False) -> None:
    """Run a job with the fake device."""
    from stylemill.config.job import Job
    from stylemill.execution import driver

    if on_ray:
        from device_busy_ray import install_worker

        install_worker()
    else:
        install()
    result = driver.run(Job.parse(values), inline=not on_ray, quiet=True)
    if result.exit_code:
        raise SystemExit(result.describe())


def _shares(seconds: dict[str, float], wall: float) -> str:
    return ", ".join(f"{what} {spent / wall:.2%}" for what, spent in seconds.items())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true", help="Ray with one worker in place of the local executor")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16, help="of a shard")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--step-ms", type=float, default=12, help="of the device, a pair and step")
    parser.add_argument("--decode-ms", type=float, default=30, help="of the device, an image")
    parser.add_argument("--threads", type=int, default=1, help="cluster.threads")
    parser.add_argument("--folder", help="where the run is made and removed; default: $TMPDIR")
    return parser.parse_args()


if __name__ == "__main__":
    main()
