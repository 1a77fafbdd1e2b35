"""Workers on Ray with the fake device of `device_busy`, which they import: its folder must be on their path."""

from __future__ import annotations

import device_busy
from fake_engine_ray import FakeEngineWorker
from stylemill.cluster import actors


class DeviceWorker(FakeEngineWorker):
    """A worker with the fake device."""

    install = staticmethod(device_busy.install)


def install_worker() -> None:
    """Make the pool of this process create such workers."""
    actors.Worker = DeviceWorker  # type: ignore[misc]
