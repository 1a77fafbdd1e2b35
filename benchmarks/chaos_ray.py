"""The driver that the chaos run disturbs on Ray: `stylemill`'s own command line, whose workers note their steps.

    CHAOS_LEFT=FILE     where is noted what a killed driver may leave behind: Ray's folder, and workers' pids

The rest of the environment is that of `chaos_engine`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import ray

from chaos_engine import command, install_engine
from stylemill.cluster import actors as crew
from stylemill.cluster.worker import Loaded, Worker


class NotingWorker(Worker):
    """A worker whose engine notes its steps."""

    def load(self, micro_batch: int | None) -> Loaded:
        _note_left(f"pid {os.getpid()}")
        install_engine()
        return super().load(micro_batch)


def _note_left(what: str) -> None:
    with open(os.environ["CHAOS_LEFT"], "a") as file:
        file.write(f"{what}\n")


def drive(arguments: Sequence[str]) -> int:
    start = ray.init

    def init(**options: Any) -> Any:
        _note_left(f"folder {options['_temp_dir']}")
        return start(**options)

    ray.init = init
    crew.Worker = NotingWorker  # type: ignore[misc]
    return command(arguments)


if __name__ == "__main__":
    import chaos_ray  # workers shall find NotingWorker by name, and not get this file's __main__

    sys.exit(chaos_ray.drive(sys.argv[1:]))
