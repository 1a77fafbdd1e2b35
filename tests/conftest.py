"""Fixtures of the tests that compare the engine with the oracle, and of those that run a job, killed and undisturbed.

Models and engines are loaded once for all test files: a test that changes one loads its own. A test file may define a
fixture of the same name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_finish() -> None:
    """Let torch use one thread: for the small tensors of the tests, a second one makes it slower."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the untrained model of Stable Diffusion 1.x's architecture."""
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the untrained model of SDXL's architecture."""
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("models") / "sdxl", kind="sdxl")


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    """The model of `folder` as the oracle holds it, in float64."""
    import oracle

    return oracle.Model.load(folder)


@pytest.fixture(scope="session")
def engine(folder: Path) -> Any:
    """The engine with the model of `folder` in float64."""
    from stylemill.engine import Engine

    return Engine.load(folder, dtype="float64", device="cpu", micro_batch=4)


@pytest.fixture(scope="session")
def engine32(folder: Path) -> Any:
    """The engine with the model of `folder` in float32."""
    from stylemill.engine import Engine

    return Engine.load(folder, dtype="float32", device="cpu", micro_batch=4)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file of `demo_job`."""
    import demo_job

    return demo_job.write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs that job, or another, in processes that have imported all they need: a `demo_job.Warm`."""
    import demo_job

    return demo_job.Warm(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def whole(job: Path, warm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, on a disk, of an undisturbed run."""
    output: Path = tmp_path_factory.mktemp("whole") / "run"
    ended = warm.run(output, job)
    assert ended.exit_code == 3, ended.output
    return output
