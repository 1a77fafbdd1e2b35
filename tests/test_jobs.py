"""Every job file in jobs/ runs, here with fewer steps and smaller images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import stylemill
from stylemill.config.job import Job
from stylemill.demo.untrained import write_demo_model
from stylemill.demo.untrained_controlnet import write_demo_controlnet

ROOT = Path(__file__).parent.parent
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with jobs/, manifests/ and the models that the jobs name. The jobs write their runs there."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("jobs", "manifests"):
        shutil.copytree(ROOT / name, folder / name)
    write_demo_model(folder / "runs/models/demo")
    write_demo_model(folder / "runs/models/demo-sdxl", kind="sdxl")
    write_demo_controlnet(folder / "runs/models/demo-controlnet")
    return folder


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_job_file_runs(project: Path, job: Path):
    file = project / "jobs" / job.name
    steps = 2 if Job.load(file).sampling.first_step == 0 else 4
    small = {"sampling.steps": steps, "image.size": 64}
    result = stylemill.run(file, small, inline=True, quiet=True)
    assert result.exit_code == 0, result.describe()
    assert result.summary.paths.output == project / "runs" / job.stem, "the run folder has the name of the job file"
    assert stylemill.verify(result.summary.paths.output, deep=True).ok


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_job_file_says_what_it_is_for(job: Path):
    assert job.read_text().startswith("# "), "the first line of a job file must say what the job shows"
