"""A driver's life in the chaos run: started, watched, sent signals, and cleaned up after."""

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
    from chaos import Life

GRACE = 30  # seconds that a driver has to leave after SIGTERM, as schedulers give them
PATIENCE = 30  # times that pace without a step, and a driver's life is no life
SIZE = 64
warm = multiprocessing.get_context("forkserver")  # what it forks has torch imported already
warm.set_forkserver_preload(["chaos_engine", "stylemill.execution.driver", "stylemill.execution.local"])


@dataclass(frozen=True)
class Setting:
    """The job that is disturbed, and where all files of the chaos run are."""

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
    """Model, images, manifest and job file; of some rows, the content is not there.

    Returns the seconds in which this machine imports torch and makes the small model, as it is loaded now.
    """
    begun = time.monotonic()
    maker = warm.Process(target=chaos_engine.write_model, args=(setting.folder / "model",))
    maker.start()
    maker.join()
    pace = time.monotonic() - begun
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
    # A worker that is killed for being slow, on a busy machine, makes the run longer and shows nothing.
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
    """The command for one run folder, which may be started again and again."""

    def __init__(self, setting: Setting, name: str, pace: float) -> None:
        self.setting = setting
        self.patience = PATIENCE * pace
        self.run = setting.folder / name
        self.log = setting.folder / f"{name}.log"
        self.noted = setting.folder / f"{name}.steps"
        self.noted.touch()
        self.left = setting.folder / f"{name}.left"
        self.befell: list[str] = []  # in the last life
        self.may_repeat = 0

    @property
    def taken(self) -> int:
        """Steps, over all lives."""
        return self.noted.stat().st_size // chaos_engine.LINE_BYTES

    def live(self, life: Life, number: int) -> int | None:
        """One start of the driver, until it ends; returns its exit code, None where it had to be given up."""
        hits = self.setting.folder / f"hits-{self.run.name}-{number}"
        hits.mkdir()
        environment = {
            "CHAOS_ENGINE": self.setting.engine,
            "CHAOS_SECONDS": "0.1" if life.on_ray else "0",
            "CHAOS_STEPS": str(self.noted),
            "CHAOS_LEFT": str(self.left),
            "STYLEMILL_FAILPOINTS": ";".join(life.rules),
            "STYLEMILL_FAILPOINTS_STATE": str(hits),
        }
        self.befell = []
        pid, ended = (self._on_ray if life.on_ray else self._inline)(environment)
        rules = {hits / hit_file(place, rule): rule for place, rule in enumerate(life.rules)}
        hangs = [hit for hit, rule in rules.items() if ":hang:" in rule and not life.on_ray]
        try:
            code = self._watch(life, pid, ended, hangs)
        finally:
            if ended() is None:  # Ctrl-C, or nobody waits for it any more
                self._send(pid, signal.SIGKILL)
        self.befell += [rule.rpartition(":")[0].replace(":", " ", 1) for hit, rule in rules.items() if hit.exists()]
        self._clean_up()
        shutil.rmtree(hits, ignore_errors=True)  # workers of a killed driver may still be at it
        return code

    def _arguments(self) -> list[str]:
        return ["run", str(self.setting.job), "--output", str(self.run)]

    def _inline(self, environment: dict[str, str]) -> tuple[int, Callable[[], int | None]]:
        arguments = [*self._arguments(), "--inline"]
        process = warm.Process(target=chaos_engine.drive, args=(arguments, str(self.log), environment))
        process.start()
        assert process.pid
        return process.pid, lambda: process.exitcode

    def _on_ray(self, environment: dict[str, str]) -> tuple[int, Callable[[], int | None]]:
        here = os.environ | environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        here["RAY_worker_niceness"] = "0"  # Ray's own is 15: on a busy machine, no worker would ever be ready
        command = [sys.executable, str(Path(__file__).with_name("chaos_ray.py")), *self._arguments()]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, env=here, stdout=log, stderr=log, start_new_session=True)
        return process.pid, process.poll

    def _watch(self, life: Life, pid: int, ended: Callable[[], int | None], hangs: list[Path]) -> int | None:
        before = seen = self.taken
        signals, heard, leave_by = [*life.signals], time.monotonic(), float("inf")
        while (code := ended()) is None:
            time.sleep(0.02)
            now, taken = time.monotonic(), self.taken
            if taken > seen:
                seen, heard = taken, now
            if signals and taken - before >= signals[0][0]:
                _, who, what = signals[0]
                if self._send(pid if who == "driver" or not life.on_ray else self._last_worker(), what):
                    self.befell.append(f"{who} {what.name}")
                    del signals[0]
                    leave_by = min(leave_by, now + GRACE) if who == "driver" else leave_by
            # Only an operator misses a driver that stands still, or one inline that hangs.
            if now > leave_by:
                self.befell.append("driver SIGKILL")
            if now > leave_by or _is_stopped(pid) or any(hang.exists() for hang in hangs):
                self._send(pid, signal.SIGKILL)
                leave_by = float("inf")
            if now > heard + self.patience:
                return None
        return code

    def _last_worker(self) -> int:
        """The pid of the worker that took the last step; 0 where it is no worker any more."""
        with self.noted.open("rb") as file:
            file.seek(max(self.taken - 1, 0) * chaos_engine.LINE_BYTES)
            words = file.readline().split()
        return int(words[0]) if words and _is_worker(int(words[0])) else 0

    @staticmethod
    def _send(pid: int, what: signal.Signals) -> bool:
        with suppress(ProcessLookupError):
            if pid:
                os.kill(pid, what)
                return True
        return False

    def _clean_up(self) -> None:
        """What Ray leaves behind a killed driver: a folder, and workers that stand still and so do not notice."""
        lines = self.left.read_text().splitlines() if self.left.exists() else []
        for kind, what in (line.split(" ", 1) for line in lines):
            if kind == "folder":
                shutil.rmtree(what, ignore_errors=True)
            elif _is_worker(int(what)):
                self._send(int(what), signal.SIGKILL)
        self.left.unlink(missing_ok=True)


def hit_file(place: int, rule: str) -> str:
    """The name of the file that `faults` makes where the rule at this place of its list acts."""
    point, *_, hit = rule.split(":")
    return f"{place}-{point}-{hit.removeprefix('hit=')}"


def _is_worker(pid: int) -> bool:
    with suppress(OSError):
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
