"""Fixtures of all tests that compare the engine with the oracle. A test file may define its own of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's folder."""
    from stylemill.engine.demo_model import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The demo model as the oracle holds it, in float64."""
    import oracle

    return oracle.Model.load(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    """The engine with the demo model in float64."""
    from stylemill.engine import Engine

    return Engine.load(folder, dtype="float64", device="cpu", micro_batch=4)
