"""Fixtures of the tests that compare the engine with the oracle, and of those that run jobs, killed and undisturbed.

Models and engines are loaded once for all test files: a test that changes one loads its own. A test file may define a
fixture of the same name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Read by torch when it is imported, here and in the processes that tests start. The engine sets its own number of
# threads. With small tensors, more threads than one mostly wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the untrained models by family, "sd" and "sdxl". Tests must not change files in them."""
    from stylemill.demo.untrained import write_demo_model

    folder = tmp_path_factory.mktemp("models")
    return {"sd": write_demo_model(folder / "sd"), "sdxl": write_demo_model(folder / "sdxl", kind="sdxl")}


@pytest.fixture(scope="session")
def folder(demo_models: dict[str, Path]) -> Path:
    """The folder of the untrained model of Stable Diffusion 1.x's architecture."""
    return demo_models["sd"]


@pytest.fixture(scope="session")
def sdxl_folder(demo_models: dict[str, Path]) -> Path:
    """The folder of the untrained model of SDXL's architecture."""
    return demo_models["sdxl"]


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
def with_fake_engine() -> bool:
    """Whether `commands` run with the fake engine: a test file overrides it where the engine is not the subject."""
    return False


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, with_fake_engine: bool) -> Any:
    """Runs that job, or another, in forked processes: a `demo_job.ForkedCommands`."""
    import demo_job

    return demo_job.ForkedCommands(tmp_path_factory.mktemp("logs"), with_fake_engine)


@pytest.fixture(scope="module")
def whole(job: Path, commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, on a disk, of an undisturbed run."""
    output: Path = tmp_path_factory.mktemp("whole") / "run"
    ended = commands.run(output, job)
    assert ended.exit_code == 3, ended.output
    return output
