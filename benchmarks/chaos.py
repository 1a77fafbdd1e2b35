"""The chaos run: a job disturbed by seeded random faults, and the same command again until it is finished.

    make chaos                                               200 faults with a fake engine, 20 with the demo model
    python benchmarks/chaos.py --seed 7                      the faults of that seed
    python benchmarks/chaos.py --engine demo --faults 20 --pairs 48

Each start of the driver, inline or on Ray, is one life. It has faults of its own: at the points of `faults.py`, told to
all its processes by their environment, and signals from outside once so many steps were taken. Each comes at a count,
none at a time. A seed draws the same faults again, at distances by how much of the job is left; which of several
workers meets one differs on Ray all the same.
A job that is finished before all faults have come is run anew with the rest.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from chaos_check import check, steps_repeated, tracebacks
from chaos_driver import Driver, Setting, write_job
from stylemill.testing.failpoints import POINTS

FAULTS_A_LIFE = {"ray": 12, "inline": 3}  # drawn; inline, the first that kills ends it
FINISHED = (0, 3)
# The other codes that a driver may end with after a fault: its own, and those of the signals that kill it. SIGTERM and
# SIGINT may come before it has learned to leave gently.
SIGNALLED = (signal.SIGINT, signal.SIGTERM)
CUT_SHORT = (1, 2, *(128 + one for one in SIGNALLED), *(-one for one in (*SIGNALLED, signal.SIGKILL, signal.SIGSEGV)))

# How often they are drawn.
ACTIONS = {
    "kill": 8,
    "raise:error=ENOSPC": 3,
    "raise:error=EIO": 3,
    "raise:error=RuntimeError": 2,
    "raise:error=DeviceMemoryError": 1,
    "segfault": 2,
    "exit": 2,
    "stop": 1,
    "hang": 1,
    "delay:seconds=0.3": 2,
}
SIGNALS = {("worker", signal.SIGKILL): 6, ("driver", signal.SIGTERM): 1, ("driver", signal.SIGINT): 1}
FROM_OUTSIDE = 0.2  # share of them
# How often a shard passes a point, where that is not once.
PASSES = {"mid-sample": 10, "read-image": 3, "before-checkpoint": 4, "after-checkpoint": 4}
PASSES |= {"mid-write": 7, "mid-publish": 7}
DRIVERS_TOO = ("mid-write", "mid-publish", "mid-clean")  # also passed by a driver on Ray, whom nobody would miss there
LOSES_NOTHING = ("delay", "SIGTERM", "SIGINT")  # these leave with a checkpoint


@dataclass
class Life:
    """What shall befall one driver and its workers."""

    on_ray: bool
    rules: list[str] = field(default_factory=list)
    signals: list[tuple[int, str, signal.Signals]] = field(default_factory=list)  # after so many steps, to whom, which


def draw(seed: int, number: int, on_ray: bool, faults: int, gap: float, steps: int) -> Life:
    """The life `number` of a chaos run: `faults` of them, some `gap` steps apart, in shards that take `steps`."""
    chance, life, step = random.Random(f"{seed}/{number}"), Life(on_ray), 0.0
    for _ in range(faults):
        step += chance.uniform(0, 2 * gap)
        point, action = chance.choice(POINTS), chance.choices([*ACTIONS], [*ACTIONS.values()])[0]
        who, what = chance.choices([*SIGNALS], [*SIGNALS.values()])[0]
        if chance.random() < FROM_OUTSIDE:
            life.signals.append((int(step), who, what))
        elif not (on_ray and action == "hang" and point in DRIVERS_TOO):
            life.rules.append(f"{point}:{action}:hit={1 + int(step / steps * PASSES.get(point, 1))}")
    # No driver outlives its faults by much, or the first that none of them kills would finish the job in peace.
    life.signals.append((int(step + gap), "driver", signal.SIGKILL))
    life.signals.sort(key=lambda one: one[0])
    return life


class Chaos:
    """A job, its undisturbed run, and the runs that faults befall."""

    def __init__(self, setting: Setting, seed: int, faults: int, ray_share: float) -> None:
        self.setting, self.seed, self.faults, self.ray_share = setting, seed, faults, ray_share
        self.happened: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()
        self.lives = self.on_ray = 0
        self.seconds = {"ray": 0.0, "inline": 0.0}
        self.steps: list[str] = []

    @property
    def left(self) -> int:
        return max(self.faults - self.happened.total(), 0)

    def problems(self) -> list[str]:
        """Run the job undisturbed, then under faults until all have come; returns what is wrong in the end."""
        pace = write_job(self.setting)
        whole = Driver(self.setting, "undisturbed", pace)
        self.undisturbed_end = whole.live(Life(on_ray=False), 0)
        if self.undisturbed_end not in FINISHED:
            return [f"the undisturbed run ended with {self.undisturbed_end}: {whole.log}"]
        found: list[str] = []
        while self.left and not found:
            driver = Driver(self.setting, f"run-{len(self.steps)}", pace)
            found = self.disturb(driver, whole.taken) or [
                *check(driver.run, whole.run, self.setting.pairs),
                *tracebacks(driver.log.read_text(errors="replace")),
                *steps_repeated(driver.taken, whole.taken, driver.may_repeat),
            ]
            self.steps.append(f"{driver.taken - whole.taken} of {whole.taken}, {driver.may_repeat} at most")
            found = [f"{driver.run}: {problem}" for problem in found]
        return found

    def disturb(self, driver: Driver, needed: int) -> list[str]:
        """The same command again and again, until the run is finished."""
        calm = 0  # lives without any fault
        while calm < 2:
            to_go = max(needed - self.setting.steps * len(list(driver.run.glob("records/*.json"))), 1)
            gap = min(0.8 * to_go / max(self.left, 1), self.setting.steps)
            on_ray = self.left > 0 and self.on_ray < self.ray_share * (self.happened.total() + 1)
            kind = "ray" if on_ray else "inline"
            faults = min(self.left, FAULTS_A_LIFE[kind])
            life = draw(self.seed, self.lives, on_ray, faults, gap, self.setting.steps) if faults else Life(False)
            calm += not faults
            begun, self.lives = time.monotonic(), self.lives + 1
            ended = driver.live(life, self.lives)
            self.seconds[kind] += time.monotonic() - begun
            self.note(driver, life, ended)
            if ended == self.undisturbed_end:
                return []
            if ended not in CUT_SHORT:
                return [f"life {self.lives} ended with {ended}: {driver.log}"]
        return [f"not finished by a life without faults: {driver.log}"]

    def note(self, driver: Driver, life: Life, ended: int | None) -> None:
        self.ends[ended or 0] += 1
        self.happened.update(driver.befell)
        self.on_ray += len(driver.befell) * life.on_ray
        harmful = sum(not any(word in fault for word in LOSES_NOTHING) for fault in driver.befell)
        driver.may_repeat += harmful * self.setting.every * (self.setting.workers if life.on_ray else 1)
        where = "on Ray" if life.on_ray else "inline"
        print(f"{self.happened.total():4} life {self.lives} {where} ended {ended}: {', '.join(driver.befell)}")
        sys.stdout.flush()

    def describe(self) -> str:
        kinds = Counter(fault.partition(" ")[2] for fault in self.happened.elements())
        points = {fault.partition(" ")[0] for fault in self.happened}
        spent = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in self.seconds.items())
        return "\n".join(
            [
                f"{self.happened.total()} faults, {self.on_ray} of them on Ray, in {self.lives} lives; {spent}",
                f"  what: {', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}",
                f"  where: {', '.join(sorted(points))}",
                f"  ends: {', '.join(f'{code} {count}' for code, count in self.ends.most_common())}",
                f"  steps repeated: {'; '.join(self.steps)}",
            ]
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--engine", choices=["fake", "demo"], default="fake")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--workers", type=int, default=3, help="on Ray")
    parser.add_argument("--ray-share", type=float, default=0.5, help="of the faults that come to drivers on Ray")
    parser.add_argument("--folder", type=Path, help="for all files; kept. Without it, kept only if something is wrong")
    given = parser.parse_args(arguments)
    again = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(given).items() if value is not None)
    print(f"python benchmarks/chaos.py {again}", flush=True)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(Setting(folder, given.engine, given.pairs, given.workers), given.seed, given.faults, given.ray_share)
    problems = chaos.problems()
    print(chaos.describe())
    if problems:
        print(*problems, f"all files are in {folder}", sep="\n")
        return 1
    print("  data files as undisturbed, 0 rows lost, 0 twice, 0 stray files, verify --deep clean")
    if not given.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
