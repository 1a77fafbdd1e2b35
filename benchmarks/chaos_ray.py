"""The driver of a chaos run on Ray: the command line of stylemill, with workers whose engine logs its steps.

    CHAOS_LEFTOVERS=FILE     lists what a killed driver may leave: the folder of Ray, and the pids of workers

`chaos_engine` describes the other variables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import ray

from chaos_engine import command, install_engine
from stylemill.cluster import actors
from stylemill.cluster.worker import LoadedModel, Worker
from stylemill.execution.attempt import AutoSettings


class LoggingWorker(Worker):
    """A worker whose engine logs its steps."""

    def load(self, auto: AutoSettings) -> LoadedModel:
        _log_leftover(f"pid {os.getpid()}")
        install_engine()
        return super().load(auto)

    def _import_engine(self) -> None:
        if os.environ["CHAOS_ENGINE"] != "fake":  # it would only cost seconds
            super()._import_engine()


def _log_leftover(line: str) -> None:
    with open(os.environ["CHAOS_LEFTOVERS"], "a") as file:
        file.write(f"{line}\n")


def drive(arguments: Sequence[str]) -> int:
    real_init = ray.init

    def init(**options: Any) -> Any:
        _log_leftover(f"folder {options['_temp_dir']}")
        return real_init(**options)

    ray.init = init
    actors.Worker = LoggingWorker  # type: ignore[misc]
    return command(arguments)


if __name__ == "__main__":
    import chaos_ray  # workers import LoggingWorker from this module, not from __main__

    sys.exit(chaos_ray.drive(sys.argv[1:]))
