"""The chaos run: inject seeded random faults into a job, and start the same command again until it is finished.

    make chaos                                               200 faults with a fake engine, 20 with the demo model
    python benchmarks/chaos.py --seed 7                      the faults of that seed
    python benchmarks/chaos.py --engine demo --faults 20 --pairs 48

Each start of the driver, inline or on Ray, gets faults of its own: actions at failpoints, which all its processes read
from the environment, and signals that are sent after a number of steps. Every fault is triggered by a count, never by
a time. The distances between faults depend on how much of the job is left. A seed draws the same faults again, but on
Ray, which worker meets a fault can differ. If the job is finished before all faults were injected, it is run again in a
new folder with the remaining ones.
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

FAULTS_PER_START = {"ray": 12, "inline": 3}  # drawn; inline, the first one that kills ends the start
FINISHED = (0, 3)
# The other exit codes that a driver may have after a fault: its own, and those of signals, as SIGTERM and SIGINT can
# arrive before their handlers are installed.
HANDLED = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = (1, 2, *(128 + one for one in HANDLED), *(-one for one in (*HANDLED, signal.SIGKILL, signal.SIGSEGV)))

# With the weights with which they are drawn.
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
SIGNAL_SHARE = 0.2  # of all faults
# How often a shard passes a failpoint, if not once.
PASSES = {"mid-sample": 10, "read-image": 3, "before-checkpoint": 4, "after-checkpoint": 4}
PASSES |= {"mid-write": 7, "mid-publish": 7}
IN_DRIVER = ("mid-write", "mid-publish", "mid-clean")  # a driver on Ray passes them too, and nothing ends its hang
HARMLESS = ("delay", "SIGTERM", "SIGINT")  # no step is lost: the driver and its workers write checkpoints


@dataclass
class FaultPlan:
    """The faults of one start of the driver and its workers."""

    on_ray: bool
    rules: list[str] = field(default_factory=list)
    signals: list[tuple[int, str, signal.Signals]] = field(default_factory=list)  # number of steps, target, signal


def draw(seed: int, number: int, on_ray: bool, faults: int, gap: float, steps: int) -> FaultPlan:
    """The faults of start `number`: so many, about `gap` steps apart, for shards of `steps` steps."""
    chance, plan, step = random.Random(f"{seed}/{number}"), FaultPlan(on_ray), 0.0
    for _ in range(faults):
        step += chance.uniform(0, 2 * gap)
        point, action = chance.choice(POINTS), chance.choices([*ACTIONS], [*ACTIONS.values()])[0]
        target, signal_number = chance.choices([*SIGNALS], [*SIGNALS.values()])[0]
        if chance.random() < SIGNAL_SHARE:
            plan.signals.append((int(step), target, signal_number))
        elif not (on_ray and action == "hang" and point in IN_DRIVER):
            plan.rules.append(f"{point}:{action}:hit={1 + int(step / steps * PASSES.get(point, 1))}")
    # Otherwise a driver that survives its faults would finish the job without the remaining ones.
    plan.signals.append((int(step + gap), "driver", signal.SIGKILL))
    plan.signals.sort(key=lambda planned: planned[0])
    return plan


class ChaosRun:
    """A job, its undisturbed run, and its runs with faults."""

    def __init__(self, setting: Setting, seed: int, faults: int, ray_share: float) -> None:
        self.setting, self.seed, self.faults, self.ray_share = setting, seed, faults, ray_share
        self.injected: Counter[str] = Counter()
        self.exit_codes: Counter[int] = Counter()
        self.starts = self.injected_on_ray = 0
        self.seconds = {"ray": 0.0, "inline": 0.0}
        self.steps: list[str] = []

    @property
    def remaining(self) -> int:
        return max(self.faults - self.injected.total(), 0)

    def problems(self) -> list[str]:
        """Run the job undisturbed, then with faults until all were injected; returns what is wrong."""
        pace = write_job(self.setting)
        undisturbed = Driver(self.setting, "undisturbed", pace)
        self.expected_code = undisturbed.start(FaultPlan(on_ray=False), 0)
        if self.expected_code not in FINISHED:
            return [f"the undisturbed run ended with {self.expected_code}: {undisturbed.log}"]
        problems: list[str] = []
        while self.remaining and not problems:
            driver = Driver(self.setting, f"run-{len(self.steps)}", pace)
            problems = self.run_to_end(driver, undisturbed.steps_taken) or [
                *check(driver.run, undisturbed.run, self.setting.pairs),
                *tracebacks(driver.log.read_text(errors="replace")),
                *steps_repeated(driver.steps_taken, undisturbed.steps_taken, driver.may_repeat),
            ]
            repeated = driver.steps_taken - undisturbed.steps_taken
            self.steps.append(f"{repeated} of {undisturbed.steps_taken}, {driver.may_repeat} at most")
            problems = [f"{driver.run}: {problem}" for problem in problems]
        return problems

    def run_to_end(self, driver: Driver, needed: int) -> list[str]:
        """Start the same command until the run is finished; returns what went wrong."""
        without_faults = 0  # starts
        while without_faults < 2:
            to_go = max(needed - self.setting.steps * len(list(driver.run.glob("records/*.json"))), 1)
            gap = min(0.8 * to_go / max(self.remaining, 1), self.setting.steps)
            on_ray = self.remaining > 0 and self.injected_on_ray < self.ray_share * (self.injected.total() + 1)
            kind = "ray" if on_ray else "inline"
            faults = min(self.remaining, FAULTS_PER_START[kind])
            plan = FaultPlan(False)
            if faults:
                plan = draw(self.seed, self.starts, on_ray, faults, gap, self.setting.steps)
            without_faults += not faults
            started, self.starts = time.monotonic(), self.starts + 1
            code = driver.start(plan, self.starts)
            self.seconds[kind] += time.monotonic() - started
            self.count(driver, plan, code)
            if code == self.expected_code:
                return []
            if code not in INTERRUPTED:
                return [f"start {self.starts} ended with {code}: {driver.log}"]
        return [f"not finished by a start without faults: {driver.log}"]

    def count(self, driver: Driver, plan: FaultPlan, code: int | None) -> None:
        self.exit_codes[code or 0] += 1
        self.injected.update(driver.injected)
        self.injected_on_ray += len(driver.injected) * plan.on_ray
        harmful = sum(not any(name in fault for name in HARMLESS) for fault in driver.injected)
        steps = self.setting.every + 1  # a step is taken while the checkpoint before it is written
        driver.may_repeat += harmful * steps * (self.setting.workers if plan.on_ray else 1)
        where = "on Ray" if plan.on_ray else "inline"
        print(f"{self.injected.total():4} start {self.starts} {where} ended {code}: {', '.join(driver.injected)}")
        sys.stdout.flush()

    def describe(self) -> str:
        kinds = Counter(fault.partition(" ")[2] for fault in self.injected.elements())
        points = {fault.partition(" ")[0] for fault in self.injected}
        durations = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in self.seconds.items())
        return "\n".join(
            [
                f"{self.injected.total()} faults, {self.injected_on_ray} on Ray, in {self.starts} starts; {durations}",
                f"  faults: {', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}",
                f"  at: {', '.join(sorted(points))}",
                f"  exit codes: {', '.join(f'{code} {count}' for code, count in self.exit_codes.most_common())}",
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
    parser.add_argument("--ray-share", type=float, default=0.5, help="of the faults that are injected on Ray")
    parser.add_argument(
        "--folder",
        type=Path,
        help="for all files, which are kept; without it, they are kept only if something is wrong",
    )
    given = parser.parse_args(arguments)
    again = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(given).items() if value is not None)
    print(f"python benchmarks/chaos.py {again}", flush=True)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(folder, given.engine, given.pairs, given.workers)
    chaos_run = ChaosRun(setting, given.seed, given.faults, given.ray_share)
    problems = chaos_run.problems()
    print(chaos_run.describe())
    if problems:
        print(*problems, f"all files are in {folder}", sep="\n")
        return 1
    print("  data files as undisturbed, 0 rows lost, 0 twice, 0 stray files, verify --deep clean")
    if not given.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
