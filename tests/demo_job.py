"""A small job that uses most features, and processes that run it and can be killed at a chosen moment.

`ForkedCommands` forks processes from a server that has imported torch once, and runs the command line in them. What a
kill leaves behind follows from the file changes before it, so a moment is a number of changes: "before the third change
that shard 1 makes while it is sampled". Where the change creates a file, a part of that file is left. So that changes
have one order, these processes work on one shard at a time, unless `constants` says otherwise.
"""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import fake_engine
from store_shards import files
from stylemill.execution.interruption import Interruption

STEPS, EVERY_STEPS, PAIRS_PER_SHARD, SHARDS = 5, 2, 3, 3
ONE_SHARD_AT_A_TIME: dict[str, object] = {"stylemill.execution.local:SHARDS_AT_A_TIME": 1}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ABSENT = 3  # the row whose content is not there
CARRIED: dict[str, list[Any]] = {
    "caption": [f"picture {row}" for row in range(7)],
    "tags": [["a", "b"], [], ["c"], None, ["d"], ["e"], ["f", None]],
    "shot": [{"camera": f"k{row}", "iso": 100 * row} for row in range(7)],
}


def write_job(folder: Path) -> Path:
    """Model, images, manifest and job file in `folder`; returns the job file."""
    from stylemill.demo.untrained import write_demo_model

    write_demo_model(folder / "model")
    noise = np.random.default_rng(0)
    for name, size in (("street.png", (80, 64, 3)), ("waves.png", (64, 96, 3)), ("stars.png", (64, 64, 3))):
        Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    buffer = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    face = {"bytes": buffer.getvalue(), "path": "face.png"}
    street, absent = {"bytes": None, "path": "street.png"}, {"bytes": None, "path": "absent.png"}
    waves, stars = {"bytes": None, "path": "waves.png"}, {"bytes": (folder / "stars.png").read_bytes(), "path": None}
    columns = {
        # The last row repeats the first one, in another shard.
        "content": pa.array([face, street, None, absent, face, street, face], IMAGE),
        "style": pa.array(
            [[stars], [waves], [waves, stars], [waves], [stars, waves], [stars], [stars]], pa.list_(IMAGE)
        ),
        "prompt": [None, None, "a red boat", None, None, "a hill", None],
        "seed": pa.array([None, 5, None, None, None, None, None], pa.int64()),
        "content_weight": [None, 0.0, None, None, 0.5, None, None],
        **CARRIED,
    }
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    job = {
        "manifest": "pairs.parquet",
        "output": "run",
        "model": "./model",
        "image": {"size": 64},
        "sampling": {"steps": STEPS},
        "checkpoint": {"every_steps": EVERY_STEPS},
        "shards": {"pairs_per_shard": PAIRS_PER_SHARD},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def check_same(run: Path, whole: Path, set_aside: int = 0) -> None:
    """`run` is finished and holds what `whole` holds, beside `set_aside` files in quarantine."""
    from stylemill.store.verify import verify

    found, expected = files(run), files(whole)
    aside = [found.pop(name) for name in list(found) if name.startswith("quarantine/")]
    assert len(aside) == set_aside + bool(set_aside), "the files and the reasons"
    assert sorted(found) == sorted(expected)
    for name in expected:
        if name.startswith("records/"):
            assert lasting(found[name]) == lasting(expected[name])
        elif name != "job.json":  # it names the folder
            assert found[name] == expected[name], name
    report = verify(run, deep=True)
    assert report.ok, report.problems


def lasting(record: bytes) -> dict[str, Any]:
    """What of a record is the same whoever committed it, and when."""
    return {name: value for name, value in json.loads(record).items() if name not in ("attempt", "timings", "sha256")}


def until(happened: Callable[[], object]) -> None:
    while not happened():  # pytest-timeout ends it
        time.sleep(0.005)


# --- the real command -------------------------------------------------------------------------------------------------


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`python -m stylemill …` in a session of its own, as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "stylemill", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def stylemill(*arguments: object) -> tuple[int, str]:
    """Exit code and all output of a command."""
    process = start(*arguments)
    output = process.communicate()[0]
    return process.returncode, output


# --- the command, forked ----------------------------------------------------------------------------------------------

# A stage of a run, and its shard where it has one. start: before the first shard; sample: checkpoints; write: encoding
# and publishing; end: from the contact sheet on. "step" counts the steps of a shard and not changes.
Stage = tuple[str, int | None]


@dataclass(frozen=True)
class Moment:
    """The moment before change number `count` (from 0) of the run folder in a stage. The process gets `signal` then."""

    stage: Stage
    count: int
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class EndedProcess:
    """A process that ended: exit code (negative: the signal that killed it), output, steps and changes."""

    exit_code: int
    output: str
    steps: list[tuple[int, int]]  # (shard, step), in order
    stages: list[Stage]  # of each change

    def changes(self) -> dict[Stage, int]:
        """How many changes a fresh run makes in each stage, before it enters the next."""
        counts: dict[Stage, int] = {}
        for stage, group in groupby(self.stages):
            counts.setdefault(stage, len(list(group)))
        return counts


class ForkedCommands:
    """Runs commands in processes forked from one that has imported all that they need.

    With `fake_engine`, workers load the fake engine in place of the real one.
    """

    def __init__(self, logs: Path, fake_engine: bool = False) -> None:
        self.logs = logs
        self.fake_engine = fake_engine
        self.started = 0
        self.context = multiprocessing.get_context("forkserver")
        transformers = ["transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip"]
        ours = ["stylemill.execution.driver", "stylemill.execution.local", "stylemill.engine.engine"]
        self.context.set_forkserver_preload(["pytest", *ours, *transformers])

    def start(
        self,
        output: Path | str,
        *arguments: object,
        at: Moment | None = None,
        order: Sequence[int] = (),
        faults: dict[str, str] | None = None,
        constants: dict[str, object] | None = None,
    ) -> ForkedProcess:
        """Start `stylemill run … --inline --output OUTPUT`.

        If the first argument is `retry-failed` or `repair`, start that command on the run folder OUTPUT. `order` is the
        order of the shards, `faults` goes into the environment, and `constants` maps `module:name` to a value that
        replaces the module's own.
        """
        self.started += 1
        log = self.logs / str(self.started)
        first, rest = str(arguments[0]), [*map(str, arguments[1:]), "--inline"]
        if first in ("retry-failed", "repair"):
            command = [first, str(output), *rest]
        else:
            command = ["run", first, *rest, "--output", str(output)]
        settings = (at, order, faults or {}, constants or {}, self.fake_engine)
        process = self.context.Process(target=_run, args=(command, str(output), log, *settings), daemon=True)
        process.start()
        return ForkedProcess(process, log)

    def run(self, output: Path | str, *arguments: object, **options: Any) -> EndedProcess:
        """`start`, and wait for the end."""
        return self.start(output, *arguments, **options).ended()


class ForkedProcess:
    def __init__(self, process: Any, log: Path) -> None:
        self.process = process
        self.log = log

    def ended(self) -> EndedProcess:
        self.process.join()
        lines = [json.loads(line) for line in self.log.with_suffix(".log").read_text().splitlines()]
        return EndedProcess(
            exit_code=self.process.exitcode,
            output=self.log.with_suffix(".out").read_text(),
            steps=[(line["shard"], line["step"]) for line in lines if "step" in line],
            stages=[(line["stage"], line["shard"]) for line in lines if "stage" in line],
        )


def _run(
    command: list[str],
    output: str,
    log: Path,
    at: Moment | None,
    order: Sequence[int],
    faults: dict[str, str],
    constants: dict[str, object],
    with_fake_engine: bool,
) -> None:
    os.environ.update(faults)
    tempfile.tempdir = None  # so that it is read from TMPDIR again
    if with_fake_engine:
        fake_engine.install()
    for constant, value in (ONE_SHARD_AT_A_TIME | constants).items():
        module, name = constant.split(":")
        setattr(importlib.import_module(module), name, value)
    with open(log.with_suffix(".out"), "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    journal = os.open(log.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**facts: object) -> None:
        os.write(journal, (json.dumps(facts) + "\n").encode())

    import stylemill.execution.local
    from stylemill.cli import main
    from stylemill.execution.listener import RunListener

    watcher, original_progress = _FolderWatcher(output, note, at), RunListener.progress

    def progress(self: Any, progress: Any) -> None:
        if progress.stage == "sample":
            note(shard=progress.shard, step=progress.step)
            watcher.reached(("step", progress.shard))
        original_progress(self, progress)

    RunListener.progress = progress  # type: ignore[method-assign]
    if order:
        run_inline = stylemill.execution.local.run_inline

        def run_in_order(run: Any, shards: Sequence[int], *rest: Any) -> dict[int, str]:
            return run_inline(run, [shard for shard in order if shard in shards], *rest)

        stylemill.execution.local.run_inline = run_in_order
    sys.addaudithook(watcher)
    sys.exit(main(command))


class _FolderWatcher:
    """An audit hook that notes every change of a run folder before Python makes it."""

    _PATH: ClassVar = {"open": 0, "os.mkdir": 0, "os.remove": 0, "shutil.rmtree": 0, "os.link": 1, "os.rename": 1}
    _WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def __init__(self, output: str, note: Any, at: Moment | None) -> None:
        self.below = f"{output}/"
        self.note = note
        self.at = at
        self.seen: Counter[Stage] = Counter()
        self.ending = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        place = self._PATH.get(event)
        if place is None or not isinstance(arguments[place], str | os.PathLike):
            return
        path = os.fspath(arguments[place])
        if not isinstance(path, str) or not path.startswith(self.below):
            return
        if event == "open" and not arguments[2] & self._WRITING:
            return
        stage = self._stage(event, path.removeprefix(self.below))
        self.note(stage=stage[0], shard=stage[1], event=event, path=path)
        torn = Path(path) if event == "open" and "/tmp/" in path.removeprefix(self.below[:-1]) else None
        self.reached(stage, torn)

    def reached(self, stage: Stage, torn: Path | None = None) -> None:
        here = (stage, self.seen[stage])
        self.seen[stage] += 1
        if self.at and here == (self.at.stage, self.at.count):
            number, self.at = self.at.signal, None
            if torn and number == signal.SIGKILL:
                torn.write_bytes(b"torn")
            handler = signal.getsignal(number)
            os.kill(os.getpid(), number)
            if isinstance(interruption := getattr(handler, "__self__", None), Interruption):
                interruption.stopping.wait()  # the main thread handles the signal, and this may be another one

    def _stage(self, event: str, path: str) -> Stage:
        self.ending |= "contact-sheet" in path
        if self.ending:
            return "end", None
        number = re.search(r"\b(\d{5})\b", path)
        if number is None:
            return "start", None
        sampling = re.match(r"(tmp/)?checkpoints[/-]\d{5}(?!\.lock)", path) and event != "shutil.rmtree"
        return "sample" if sampling else "write", int(number[1])
