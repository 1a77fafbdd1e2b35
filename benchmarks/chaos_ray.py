"""The driver of the chaos run on Ray: the command line of `stylemill`, with workers that record their steps.

    CHAOS_LEFT=FILE     records what a killed driver may leave behind: the folder of Ray and the pids of the workers

The other environment variables are those of `chaos_engine`.
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


class RecordingWorker(Worker):
    """A worker whose engine records its steps."""

    def load(self, micro_batch: int | None) -> LoadedModel:
        _record_left(f"pid {os.getpid()}")
        install_engine()
        return super().load(micro_batch)


def _record_left(line: str) -> None:
    with open(os.environ["CHAOS_LEFT"], "a") as file:
        file.write(f"{line}\n")


def drive(arguments: Sequence[str]) -> int:
    original_init = ray.init

    def init(**options: Any) -> Any:
        _record_left(f"folder {options['_temp_dir']}")
        return original_init(**options)

    ray.init = init
    actors.Worker = RecordingWorker  # type: ignore[misc]
    return command(arguments)


if __name__ == "__main__":
    import chaos_ray  # workers import RecordingWorker from this module; they cannot import it from __main__

    sys.exit(chaos_ray.drive(sys.argv[1:]))
