"""The command line with the fake engine, also in workers on Ray.

    PYTHONPATH=benchmarks python benchmarks/fake_engine_ray.py run jobs/quickstart.yaml --workers 2

Workers import this module, so its folder must be on their path.
"""

from __future__ import annotations

import sys

import fake_engine
from stylemill.cluster import actors
from stylemill.cluster.worker import LoadedModel, Worker
from stylemill.execution.attempt import AutoSettings


class FakeEngineWorker(Worker):
    """A worker with the fake engine."""

    install = staticmethod(fake_engine.install)

    def load(self, auto: AutoSettings) -> LoadedModel:
        self.install()
        return super().load(auto)

    def _import_engine(self) -> None:
        pass  # the real one is not needed


if __name__ == "__main__":
    from fake_engine_ray import FakeEngineWorker as ImportableWorker  # not of __main__, which workers cannot import
    from stylemill.cli import main

    actors.Worker = ImportableWorker  # type: ignore[misc]
    sys.exit(main())
