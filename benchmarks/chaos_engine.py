"""The driver of a chaos run: the command line of stylemill, with an engine that logs each of its steps.

    CHAOS_ENGINE=fake|demo     the engine of fake_engine.py, or the real one
    FAKE_STEP_SECONDS=0.1      seconds that a step of the fake engine takes
    CHAOS_STEPS=FILE           where each step is logged: pid, pairs, step

Only the engine is replaced. The driver, the pool, the workers, the shards and the store are the real ones, in processes
of their own.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylemill.engine import SampleState

# torch is imported in functions, because the driver on Ray does not need it.

LINE = "{pid:8} {pairs} {step:4}\n"  # of the step log
LINE_BYTES = 31


def logging_engine(engine: type[Any]) -> type[Any]:
    """A subclass of an engine that logs each step before it yields the state."""

    class LoggingEngine(engine):
        def sample(self, *arguments: Any, **options: Any) -> Iterator[SampleState]:
            steps = os.open(os.environ["CHAOS_STEPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                for state in super().sample(*arguments, **options):
                    identities = ",".join(pair.identity for pair in state.inputs.pairs)
                    pairs = hashlib.sha256(identities.encode()).hexdigest()[:16]
                    os.write(steps, LINE.format(pid=os.getpid(), pairs=pairs, step=state.step).encode())
                    yield state
            finally:
                os.close(steps)

    return LoggingEngine


def write_model(folder: Path) -> None:
    from stylemill.demo.untrained import write_demo_model

    write_demo_model(folder)


def install_engine() -> None:
    import stylemill.engine
    from fake_engine import FakeEngine

    fake = os.environ["CHAOS_ENGINE"] == "fake"
    stylemill.engine.Engine = logging_engine(FakeEngine if fake else stylemill.engine.Engine)  # type: ignore[misc]


def drive(arguments: Sequence[str], output: str, environment: Mapping[str, str]) -> None:
    """Run the command line in this process, with its output in the file `output`."""
    os.environ.update(environment)
    with open(output, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    install_engine()
    sys.exit(command(arguments))


def command(arguments: Sequence[str]) -> int:
    from stylemill.cli import main

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return main(list(arguments))
