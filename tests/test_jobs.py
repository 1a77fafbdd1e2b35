"""Every job file in jobs/ runs, here with fewer steps and smaller images; docs/uses.md shows all of them."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

import stylemill
from stylemill.cli.app import main
from stylemill.cli.options import job_overrides
from stylemill.config.job import Job
from stylemill.errors import ModelError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
make_uses = runpy.run_path(str(DOCS / "make_uses.py"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with jobs/, manifests/ and the models that the commands in the jobs' comments write there."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("jobs", "manifests"):
        shutil.copytree(ROOT / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in sorted({command for job in JOBS for command in re.findall("`(stylemill .*?)`", comment(job))}):
            assert main(shlex.split(command)[1:]) == 0
    return folder


def comment(job: Path) -> str:
    """The comment at the start of a job file, on one line."""
    lines = takewhile(lambda line: line.startswith("#"), job.read_text("utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


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


def command_lines(text: str) -> list[list[tuple[str, str]]]:
    """The options of each command line in a comment: consecutive ones, until a key is there again."""
    lines: list[list[tuple[str, str]]] = []
    for group in re.findall(r"(?:--(?:model|preset|set) \S+(?: |$)(?:and )?)+", text):
        lines.append([])
        for name, value in re.findall(r"--(\w+) (\S+)", group):
            if any((name, value.split("=")[0]) == (other, key.split("=")[0]) for other, key in lines[-1]):
                lines.append([])
            lines[-1].append((name, value.rstrip(".,;:")))
    return lines


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_the_options_in_the_comments_of_a_job_file_are_keys_of_a_job(job: Path):
    for options in command_lines(comment(job)):
        if ("set", "model.config=FOLDER") not in options:  # for a single file only
            settings = [value for name, value in options if name == "set"]
            overrides = {name: value for name, value in options if name != "set"}
            Job.load(job, job_overrides(settings, **overrides))


@pytest.mark.parametrize(
    "job", [job for job in JOBS if "runs/models" in job.read_text("utf-8")], ids=lambda job: job.stem
)
def test_a_job_whose_model_is_absent_names_the_commands_that_write_it(job: Path, tmp_path: Path):
    """The commands of the messages make each job file run as it stands."""
    for name in ("jobs", "manifests"):
        shutil.copytree(ROOT / name, tmp_path / name)
    while message := planning_error(tmp_path / "jobs" / job.name):
        written = re.findall("'(stylemill demo-model .*?)'", message)
        assert written, message
        assert main(shlex.split(written[-1 if "sdxl" in job.stem else 0])[1:]) == 0


def planning_error(job: Path) -> str:
    try:
        stylemill.plan(job)
    except ModelError as error:
        return str(error)
    return ""


def test_the_page_of_uses_says_what_the_job_files_say_and_shows_only_pictures_that_are_there():
    page = (DOCS / "uses.md").read_text()
    assert page == make_uses["page"](), "run docs/make_uses.py"
    assert sorted(make_uses["USES"]) == sorted(job.stem for job in JOBS if job.stem != "quickstart")
    pictures = {DOCS / link for link in re.findall(r"!\[.*\]\((.*)\)", page)}
    assert pictures == set((DOCS / "uses").iterdir())
    assert sum(picture.stat().st_size for picture in pictures) < 1.5e6


@pytest.mark.parametrize("name", make_uses["USES"])
def test_the_command_for_a_real_model_sets_keys_that_exist(name: str):
    words = shlex.split(make_uses["read_job"](name)[1])
    assert words[0] == "--model"
    settings = [value for flag, value in pairwise(words) if flag == "--set"]
    job = Job.load(ROOT / "jobs" / f"{name}.yaml", job_overrides(settings, model=words[1]))
    assert job.model.name == words[1]
    assert max(job.image.width_height) >= 512
