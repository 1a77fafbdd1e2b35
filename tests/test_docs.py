"""Every code block of the documentation runs, in order, in a copy of the project, with toy jobs in place of large ones.

A block that is new either runs, or has its first line in one of the tables below.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.core import TyperCommand

from stylemill.cli.app import main
from stylemill.config.job import Job, set_dotted
from stylemill.demo.untrained import write_demo_model

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "manifests/README.md", "benchmarks/README.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS.remove("docs/uses.md")  # is made from the job files: tests/test_jobs.py runs these and compares the page

# Blocks that are no code, by how they begin.
NO_CODE = (
    "24 of 24 images done",  # what make quickstart prints last
    "manifest ── plan ──> shards",  # the data flow
    "pyproject.toml  constraints.txt",  # the tree
    "time            4 to 4.4 minutes",  # what plan --bench adds
    "errors  s3  plural  config  testing",  # the layers
    "<output>/job.json",  # the run folder
)
# Commands that are only parsed, by how they begin. Those of make and python have only their target or file looked up.
NOT_RUN = {
    "git clone": "needs network",
    "stylemill run jobs/style-transfer.yaml --output runs/sd15": "needs network, and hours",
    "STYLEMILL_FAILPOINTS='after-record": "kills its process",
    "stylemill bench": "takes minutes, or needs network",
    "stylemill plan jobs/quickstart.yaml --workers 2 --bench": "needs what bench wrote",
    "import datasets, fsspec": "needs a bucket",
}
TOY = {"model": "toy-model", "sampling.steps": 2, "image.size": 64, "cluster.micro_batch": 2}


@dataclass(frozen=True)
class CodeBlock:
    line: int  # from 1
    language: str  # of a fence; empty for an indented block
    text: str


def code_blocks(text: str) -> Iterator[CodeBlock]:
    """The fenced blocks, and those that are indented after an empty line."""
    lines = text.splitlines(keepends=True)
    start = 0
    while start < len(lines):
        fence, indented = lines[start].startswith("```"), re.compile(r" {4}|$")
        stop = start + 1
        if fence:
            while not lines[stop].startswith("```"):
                stop += 1
            yield CodeBlock(start + 1, lines[start].strip("`\n"), "".join(lines[start + 1 : stop]))
        elif lines[start].startswith("    ") and not lines[start - 1].strip():
            while stop < len(lines) and indented.match(lines[stop]):
                stop += 1
            block = [line.removeprefix("    ") for line in lines[start:stop]]
            yield CodeBlock(start + 1, "", "".join(block).rstrip("\n") + "\n")
        start = stop + fence


def commands(text: str) -> list[str]:
    """The commands of a block, without comments, each on one line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("model") / "toy-model")


@pytest.fixture
def project(document, tmp_path, toy_model, monkeypatch) -> Path:
    """A copy of what the blocks use, with photos, paintings and lists of them as the blocks name them."""
    samples = document == "manifests/README.md"  # draws 500 different pairs, and runs no job
    for name in ("jobs", "manifests", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "toy-model").symlink_to(toy_model)
    for folder, count in {"photos": 25 if samples else 3, "paintings": 20 if samples else 2}.items():
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (16, 16), (number, 90, 200)).save(tmp_path / folder / f"{number}.jpg")
    images = {folder: sorted((tmp_path / folder).iterdir())[:2] for folder in ("photos", "paintings")}
    (tmp_path / "photos.txt").write_text("".join(f"{path}\n" for path in images["photos"]))
    (tmp_path / "styles.csv").write_text("path\n" + "".join(f"{path}\n" for path in images["paintings"]))
    (tmp_path / "pairs.csv").write_text(f"content,style\n{images['photos'][0]},{images['paintings'][0]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "HF_HUB_OFFLINE": "1"})
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_code_block_runs(document, project, capsys, monkeypatch):
    for block in code_blocks((ROOT / document).read_text("utf-8")):
        where = f"{document}:{block.line}"
        if block.text.startswith(NO_CODE):
            continue
        if block.language == "python":
            _run_python(block.text, where)
        elif block.language == "yaml":
            _write_toy_job(project, block.text)
        elif block.text.startswith("job             quickstart"):  # what `stylemill plan jobs/quickstart.yaml` says
            capsys.readouterr()
            main(["plan", "jobs/quickstart.yaml", "--set", "cluster.gpus_per_worker=0"])
            assert capsys.readouterr().out.replace(f"{project}/", "") == block.text, where
        elif block.text.startswith("model: "):  # a job's key on each line
            for line in block.text.splitlines():
                Job.parse({"name": "job", "manifest": "pairs.parquet", "output": "run", **yaml.safe_load(line)})
        else:
            for command in commands(block.text):
                _run_command(command, where, monkeypatch)


def test_the_tables_have_no_block_that_is_gone():
    blocks = [block.text for document in DOCUMENTS for block in code_blocks((ROOT / document).read_text("utf-8"))]
    lines = [line for text in blocks for line in commands(text)]
    assert [start for start in NO_CODE if not any(text.startswith(start) for text in blocks)] == []
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []


def _run_command(command: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed_only = any(command.startswith(start) for start in NOT_RUN)
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # a variable of the environment
        words.pop(0)
    program, *arguments = words
    if program == "stylemill":
        if parsed_only:
            with monkeypatch.context() as patch:
                patch.setattr(TyperCommand, "invoke", lambda self, context: 0)
                code = main(arguments)
        else:
            inline = ["--inline"] if arguments[0] in ("run", "retry-failed", "repair") else []
            code = main([*arguments, *inline])
        assert code == 0, f"{where}: {command} ended with {code}"
    elif program == "make":
        targets = [word for word in arguments if word not in ("&&",) and "=" not in word and word.isidentifier()]
        subprocess.run(["make", "-n", targets[0]], check=True, capture_output=True, cwd=ROOT)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"{where}: {command}"
    else:
        assert parsed_only, f"{where}: {command}: is in no table, and no test knows how to run it"


def _run_python(text: str, where: str) -> None:
    tree = ast.parse(text)
    if not any(text.startswith(start) for start in NOT_RUN):
        exec(compile(tree, where, "exec"), {"__name__": where})


def _write_toy_job(project: Path, text: str) -> None:
    """Write the job file as it is but for the model and sizes, which would take network and hours."""
    values = yaml.safe_load(text)
    Job.parse({"name": "job", **values})
    for key, value in TOY.items():
        set_dotted(values, key, value)
    (project / "job.yaml").write_text(yaml.safe_dump(values))
