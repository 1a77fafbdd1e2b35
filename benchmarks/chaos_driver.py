"""Start the driver of a chaos run, watch it, send it signals, and clean up after it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import chaos_engine

if TYPE_CHECKING:
    from chaos import FaultPlan

GRACE_PERIOD = 30  # seconds between SIGTERM and SIGKILL, as schedulers give them
STEP_TIMEOUT = 30  # a driver that takes no step for so many times the pace is given up
SIZE = 64
forkserver = multiprocessing.get_context("forkserver")  # the processes that it forks have imported torch already
forkserver.set_forkserver_preload(
    ["chaos_engine", "stylemill.execution.driver", "stylemill.execution.local", "stylemill.engine.engine"]
)


@dataclass(frozen=True)
class Setting:
    """The job of a chaos run, and the folder for all files."""

    folder: Path
    engine: str
    pairs: int
    workers: int
    pairs_per_shard: int = 4

    @property
    def steps(self) -> int:
        return 10 if self.engine == "fake" else 5

    @property
    def every(self) -> int:
        return 3 if self.engine == "fake" else 2

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"


def write_job(setting: Setting) -> float:
    """Write the model, images, manifest and job file. Some rows name a content image that does not exist.

    Returns the pace of this machine under its present load: the seconds to import torch and write the model.
    """
    started = time.monotonic()
    # A new process, and not a forked one, which may have imported torch already.
    command = "import sys, pathlib, chaos_engine; chaos_engine.write_model(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", command, setting.folder / "model"], env=environment, check=True)
    pace = time.monotonic() - started
    noise = np.random.default_rng(0)
    for number in range(8):
        pixels = noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(setting.folder / f"{number}.png")
    rows = range(setting.pairs)
    columns = {
        "content": ["absent.png" if row % 40 == 7 else f"{row % 8}.png" for row in rows],
        "style": [f"{row // 8 % 8}.png" for row in rows],
        "seed": list(rows),
        "caption": [f"picture {row}" for row in rows],
    }
    pq.write_table(pa.table(columns), setting.folder / "pairs.parquet")
    # The timeouts depend on the pace: to kill slow workers on a busy machine would only make the run longer.
    cluster = {"workers": setting.workers, "micro_batch": 2, "step_timeout": max(5, pace), "stage_timeout": 8 * pace}
    job = {
        "manifest": "pairs.parquet",
        "output": "run",
        "model": "./model",
        "image": {"size": SIZE},
        "sampling": {"steps": setting.steps},
        "checkpoint": {"every_steps": setting.every},
        "shards": {"pairs_per_shard": setting.pairs_per_shard},
        "cluster": cluster,
    }
    setting.job.write_text(json.dumps(job))
    return pace


class Driver:
    """The driver of one run folder, which can be started many times."""

    def __init__(self, setting: Setting, name: str, pace: float) -> None:
        self.setting = setting
        self.step_timeout = STEP_TIMEOUT * pace
        self.run = setting.folder / name
        self.log = setting.folder / f"{name}.log"
        self.step_log = setting.folder / f"{name}.steps"
        self.step_log.touch()
        self.leftovers = setting.folder / f"{name}.leftovers"
        self.injected: list[str] = []  # the faults of the last start
        self.may_repeat = 0  # steps

    @property
    def steps_taken(self) -> int:
        """The steps of all starts."""
        return self.step_log.stat().st_size // chaos_engine.LINE_BYTES

    def start(self, plan: FaultPlan, number: int) -> int | None:
        """Start the driver and wait for its end; returns the exit code, None if it was given up."""
        hits = self.setting.folder / f"hits-{self.run.name}-{number}"
        hits.mkdir()
        environment = {
            "CHAOS_ENGINE": self.setting.engine,
            "FAKE_STEP_SECONDS": "0.1" if plan.on_ray else "0",
            "CHAOS_STEPS": str(self.step_log),
            "CHAOS_LEFTOVERS": str(self.leftovers),
            "STYLEMILL_FAILPOINTS": ";".join(plan.rules),
            "STYLEMILL_FAILPOINTS_STATE": str(hits),
        }
        self.injected = []
        pid, ended = (self._on_ray if plan.on_ray else self._inline)(environment)
        rules = {hits / hit_file(position, rule): rule for position, rule in enumerate(plan.rules)}
        hangs = [hit for hit, rule in rules.items() if ":hang:" in rule and not plan.on_ray]
        try:
            code = self._watch(plan, pid, ended, hangs)
        finally:
            if ended() is None:  # given up, or this process was interrupted
                self._send(pid, signal.SIGKILL)
        self.injected += [rule.rpartition(":")[0].replace(":", " ", 1) for hit, rule in rules.items() if hit.exists()]
        self._clean_up()
        shutil.rmtree(hits, ignore_errors=True)  # workers of a killed driver may still write there
        return code

    def _arguments(self) -> list[str]:
        return ["run", str(self.setting.job), "--output", str(self.run)]

    def _inline(self, environment: dict[str, str]) -> tuple[int, Callable[[], int | None]]:
        arguments = [*self._arguments(), "--inline"]
        process = forkserver.Process(target=chaos_engine.drive, args=(arguments, str(self.log), environment))
        process.start()
        assert process.pid
        return process.pid, lambda: process.exitcode

    def _on_ray(self, environment: dict[str, str]) -> tuple[int, Callable[[], int | None]]:
        variables = os.environ | environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, str(Path(__file__).with_name("chaos_ray.py")), *self._arguments()]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        return process.pid, process.poll

    def _watch(self, plan: FaultPlan, pid: int, ended: Callable[[], int | None], hangs: list[Path]) -> int | None:
        first = latest = self.steps_taken
        signals, last_step_at, kill_at = [*plan.signals], time.monotonic(), float("inf")
        while (code := ended()) is None:
            time.sleep(0.02)
            now, taken = time.monotonic(), self.steps_taken
            if taken > latest:
                latest, last_step_at = taken, now
            if signals and taken - first >= signals[0][0]:
                _, target, number = signals[0]
                if self._send(pid if target == "driver" or not plan.on_ray else self._last_worker(), number):
                    self.injected.append(f"{target} {number.name}")
                    del signals[0]
                    kill_at = min(kill_at, now + GRACE_PERIOD) if target == "driver" else kill_at
            # A stopped driver, or an inline driver that hangs, is killed as an operator would do.
            if now > kill_at:
                self.injected.append("driver SIGKILL")
            if now > kill_at or _is_stopped(pid) or any(hang.exists() for hang in hangs):
                self._send(pid, signal.SIGKILL)
                kill_at = float("inf")
            if now > last_step_at + self.step_timeout:
                return None
        return code

    def _last_worker(self) -> int:
        """The pid of the worker that took the last step; 0 if it has ended."""
        with self.step_log.open("rb") as file:
            file.seek(max(self.steps_taken - 1, 0) * chaos_engine.LINE_BYTES)
            fields = file.readline().split()
        return int(fields[0]) if fields and _is_worker(int(fields[0])) else 0

    @staticmethod
    def _send(pid: int, number: signal.Signals) -> bool:
        with suppress(ProcessLookupError):
            if pid:
                os.kill(pid, number)
                return True
        return False

    def _clean_up(self) -> None:
        """Remove what a killed driver on Ray leaves: the folder of Ray, and workers that are stopped."""
        lines = self.leftovers.read_text().splitlines() if self.leftovers.exists() else []
        for kind, name in (line.split(" ", 1) for line in lines):
            if kind == "folder":
                shutil.rmtree(name, ignore_errors=True)
            elif _is_worker(int(name)):
                self._send(int(name), signal.SIGKILL)
        self.leftovers.unlink(missing_ok=True)


def hit_file(position: int, rule: str) -> str:
    """The name of the file that `failpoints` creates when the rule at this position of the list acts."""
    point, *_, hit = rule.split(":")
    return f"{position}-{point}-{hit.removeprefix('hit=')}"


def _is_worker(pid: int) -> bool:
    with suppress(OSError):
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
