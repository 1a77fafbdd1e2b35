"""Bad input gives one message that says what is wrong, where, and what to do. The exit code is right. No data is lost.

All tests use the command line, as a user does. Exit code 2: the user must change something first. Exit code 3: the run
finished with recorded failures. Exit code 1: the run stopped or is incomplete.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.core import TyperCommand

import stylemill.execution.local
from cli_commands import COMMANDS, OPTIONS, words_of
from stylemill import __version__
from stylemill.cli.app import main

SIZE = 64  # pixels


@dataclass(frozen=True)
class CommandResult:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error message of the command. Asserts that there is exactly one, and no traceback."""
        assert "Traceback" not in self.err, self.err
        assert self.err.count("error: ") == 1, self.err
        return self.err[self.err.index("error: ") + len("error: ") :].strip()


@pytest.fixture
def run_command(capsys) -> Callable[..., CommandResult]:
    def run(*argv: object) -> CommandResult:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return CommandResult(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("model") / "demo")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def as_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def here(tmp_path, model, monkeypatch) -> Path:
    """A folder with a valid job of four pairs: job.yaml, pairs.parquet and its images."""
    for name, seed in {"c0.png": 0, "c1.png": 1, "s0.png": 2, "s1.png": 3}.items():
        (tmp_path / name).write_bytes(as_bytes(picture(seed)))
    write_manifest(tmp_path)
    (tmp_path / "job.yaml").write_text(
        f"manifest: pairs.parquet\noutput: run\nmodel: {model}\nsampling: {{steps: 2}}\nimage: {{size: {SIZE}}}\n"
        "shards: {pairs_per_shard: 2}\ncluster: {workers: 1, micro_batch: 2}\nretries: 0\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = {
    "fingerprint": {"image.fit": "crop"},
    "fingerprint_sha256": "0" * 64,
    "job": {},
    "versions": {},
    "rows": 4,
    "shards": 2,
    "pairs_per_shard": 2,
}
GOOD = {
    "pair_id": ["a", "b", "c", "d"],
    "content": ["c0.png", "c0.png", "c1.png", "c1.png"],
    "style": ["s0.png", "s1.png", "s0.png", "s1.png"],
}


def write_manifest(folder: Path, **columns: object) -> None:
    values = {name: column for name, column in {**GOOD, **columns}.items() if column is not None}
    pq.write_table(pa.table(values), folder / "pairs.parquet")


def refused(result: CommandResult, folder: Path, *words: str) -> str:
    """Assert that a command was refused as bad input before it wrote anything. Returns its error message."""
    assert result.code == 2, result
    for word in words:
        assert word in result.error, result.error
    assert result.out == ""
    assert not (folder / "run").exists()
    return result.error


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=words_of)
def test_every_help_ends_with_an_example_that_parses(run_command, monkeypatch, command):
    result = run_command(*command, "--help")
    assert result.code == 0
    _, example = result.out.split("example: stylemill ")
    words = shlex.split(example)
    assert tuple(words[: len(command)]) == command
    called = []
    monkeypatch.setattr(TyperCommand, "invoke", lambda self, context: called.append(self.name) or 0)
    assert run_command(*words).code == 0
    assert len(called) == 1
    assert called[0] in words[:2]


@pytest.mark.parametrize("command", COMMANDS, ids=words_of)
def test_every_help_fits_in_80_columns(run_command, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_command(*command, "--help").out.splitlines()
    assert lines[0].startswith(" ".join(["Usage: stylemill", *command]))
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("  example: "), "the example must be on one line, so that it can be copied"
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage:")], (
        "a summary is too long for the list of commands"
    )


@pytest.mark.parametrize("command", COMMANDS, ids=words_of)
def test_every_help_is_in_ascii(run_command, command):
    """typer writes help as UTF-8 to a terminal that takes ASCII only."""
    assert run_command(*command, "--help").out.isascii()


def in_process(encoding: str, folder: Path, *argv: str) -> CommandResult:
    """A command in a process of its own, on a terminal of `encoding`."""
    done = subprocess.run(
        [sys.executable, "-m", "stylemill", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    return CommandResult(done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))


@pytest.mark.slow
def test_commands_work_without_utf_8(here):
    """What the encoding of the terminal lacks is written in ASCII."""
    assert in_process("ascii", here, "--help").out.startswith("Usage: stylemill")
    assert "optimization, 2 steps, 64x64 pixels" in (
        in_process("ascii", here, "plan", "job.yaml", "--preset", "style-transfer").out
    )
    assert "guided, 2 steps, 64×64 pixels" in in_process("latin-1", here, "plan", "job.yaml").out
    assert " c0.png x s0.png" in in_process("ascii", here, "manifest", "show", "pairs.parquet").out
    assert "image.size 65x64: sides must be multiples" in (
        in_process("ascii", here, "plan", "job.yaml", "--set", "image.size=[65, 64]").error
    )
    (here / "c0.png").write_bytes(b"")
    run = in_process("ascii", here, "run", "job.yaml", "--inline", "--set", "max_failed_fraction=1")
    assert run.code == 3
    assert "  2 x ImageError" in run.out
    assert "  2 x ImageError" in in_process("ascii", here, "status", "run").out


def test_names_that_are_no_text_are_refused_by_name(here):
    """A file name may be any bytes. Arrow and JSON take text only."""
    folder = os.fsdecode(os.fsencode(here) + b"/caf\xe9")
    os.mkdir(folder)
    for name in ("job.yaml", "pairs.parquet"):
        shutil.copy(here / name, f"{folder}/{name}")
    shown = "caf\\udce9"
    for encoding in ("ascii", "utf-8"):
        for words in (["plan", "job.yaml"], ["run", "job.yaml", "--inline"], ["plan", "../job.yaml", "--output", "x"]):
            message = in_process(encoding, Path(folder), *words).error
            assert shown in message
            assert "is not UTF-8" in message
    for words in (["validate", "pairs.parquet"], ["build", "new.parquet", "--style", ".."]):
        result = in_process("utf-8", Path(folder), "manifest", *words)
        assert result.code == 2
        assert shown in result.error
        assert "is not UTF-8" in result.error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Missing command"),
        (["manifest"], "Missing command"),
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'JOB'"),
        (["run", "job.yaml", "other.yaml"], "unexpected extra argument(s) (other.yaml)"),
        (["run", "job.yaml", "--worker-count", "2"], "No such option: --worker-count"),
        (["run", "job.yaml", "--work", "2"], "No such option: --work"),  # no abbreviations
        (["manifest", "build", "p.parquet", "--style", ".", "--tile", "16"], "'--tile': '16': write contents x styles"),
        (
            ["manifest", "build", "p.parquet", "--style", ".", "--seed", "x"],
            "'--seed': Input should be a valid integer",
        ),
        (["manifest", "build", "p.parquet", "--pairing", "all"], "'--pairing': Value error, 'all' is not one of"),
    ],
)
def test_command_lines_that_do_not_parse(run_command, argv, words):
    result = run_command(*argv)
    assert result.code == 2
    assert words in result.error
    assert result.err.startswith("Usage: stylemill")
    assert result.out == ""


@pytest.mark.parametrize("command", [command for command in COMMANDS if OPTIONS[command]], ids=words_of)
def test_an_option_that_is_given_twice_is_refused(run_command, command):
    """The last one would win, and the other would be ignored without a word."""
    for option in OPTIONS[command]:
        result = run_command(*command, "x", option, "1", option, "1")
        assert result.code == 2, option
        assert f"'{option}': given 2 times; give it once" in result.error


@pytest.mark.parametrize("command", [["plan"], ["run", "--inline"]])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "sampling.steps=3", "--set", "sampling.steps=4"], "sampling.steps is given twice, also as 3"),
        (["--set", "output=a", "--output", "b"], "--set output=a: output is given twice, also as 'b'; give it once"),
        (["--set", "model=a", "--model", "b"], "--set model=a: model.name is given twice, also as 'b'; give it once"),
        (["--workers", "1", "--set", "cluster.workers=2"], "cluster.workers is given twice, also as 1"),
        (["--workers", "1", "--set", "cluster={threads: 2}"], "a part of cluster is given twice, also as 1"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(run_command, here, command, flags, words):
    refused(run_command(*command, "job.yaml", *flags), here, words)


def test_a_model_and_its_settings_are_different_keys(run_command, here, model):
    result = run_command("plan", "job.yaml", "--set", f"model={model}", "--set", "model.layers=[10]")
    assert result.code == 0, result.err


def test_version(run_command):
    assert run_command("--version") == CommandResult(0, f"stylemill {__version__}\n", "")


def test_an_interrupted_command_exits_with_130(run_command, monkeypatch):
    monkeypatch.setattr("stylemill.report.status.status", _raise(KeyboardInterrupt()))
    assert run_command("status", "run") == CommandResult(130, "", "interrupted; the same command resumes\n")


def test_a_bug_is_not_reported_as_bad_input(run_command, monkeypatch):
    monkeypatch.setattr("stylemill.report.status.status", _raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run_command("status", "run")


def _raise(error: BaseException) -> Callable[..., object]:
    def call(*_: object) -> object:
        raise error

    return call


@pytest.mark.parametrize("command", ["status", "verify"])
@pytest.mark.parametrize("name", ["absent", ".", "job.yaml"])
def test_folders_that_are_not_run_folders(run_command, here, command, name):
    assert "is not a run folder (it has no job.json)" in refused(run_command(command, name), here, name)


# --- job files and options; test_job.py has the other mistakes in job files -------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "flags", "words"),
    [
        pytest.param("sampling: {stepz: 2}", [], ["job.yaml: ", "'sampling.stepz'", "'steps'"], id="unknown key"),
        pytest.param("sampling: {steps: 0}", [], ["job.yaml: sampling.steps", "1, not 0"], id="no steps"),
        pytest.param("sampling: {content_weight: -1}", [], ["job.yaml: sampling.content_weight"], id="λ < 0"),
        pytest.param("image: {size: 100}", [], ["image.size 100×100", "multiples of 64", "128×128"], id="off the grid"),
        pytest.param("name: x\nname: y", [], ["job.yaml: line 10", "duplicate key 'name'"], id="key twice"),
        pytest.param("\tname: x", [], ["job.yaml: line 9, column 1", "indent with spaces"], id="a tab"),
        pytest.param("", ["--set", "sampling.stepz=2"], ["flag", "'sampling.stepz'", "'steps'"], id="--set unknown"),
        pytest.param("", ["--set", "sampling.steps=two"], ["flag", "sampling.steps", "not 'two'"], id="--set mistyped"),
        pytest.param("", ["--set", "sampling.steps"], ["--set sampling.steps", "key=value"], id="--set without value"),
        pytest.param("", ["--set", "a=[1"], ["--set a=[1: line 1", "not valid YAML"], id="--set not YAML"),
        pytest.param("", ["--set", "image.size=100"], ["image.size 100×100", "128×128"], id="--set off the grid"),
        pytest.param("", ["--workers", "many"], ["flag", "cluster.workers", "auto, not 'many'"], id="--workers many"),
        pytest.param("", ["--workers", "²"], ["flag", "cluster.workers", "auto, not '²'"], id="--workers ²"),
        pytest.param("", ["--workers", "0"], ["flag", "cluster.workers", "auto, not 0"], id="--workers 0"),
        pytest.param("", ["--preset", "nope"], ["preset 'nope' is not one of", "guided-transfer"], id="--preset nope"),
        pytest.param("", ["--manifest", "no.parquet"], ["no.parquet: no such manifest"], id="--manifest absent"),
        pytest.param(
            "", ["--set", "model.layers=[16]"], ["no self-attention layer 16", " to 15 up_blocks"], id="no such layer"
        ),
    ],
)
@pytest.mark.parametrize("command", [["plan"], ["run", "--inline"]], ids=["plan", "run"])
def test_bad_jobs(run_command, here, command, yaml, flags, words):
    job = here / "job.yaml"
    others = [line for line in job.read_text().splitlines() if line.split(":")[0] != yaml.split(":")[0]]
    job.write_text("\n".join([*others, yaml]))
    refused(run_command(*command, job.name, *flags), here, *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("absent.yaml", None, "absent.yaml: no such job file", id="absent"),
        pytest.param(".", None, ".: the job file cannot be read: Is a directory", id="a folder"),
        pytest.param("x.yaml", b"", "x.yaml: a job file has keys and values", id="empty"),
        pytest.param("x.yaml", b"- manifest: a", "x.yaml: a job file has keys and values", id="a list"),
        pytest.param("x.yaml", b"output: run\nmodel: m", "x.yaml: key 'manifest' is missing", id="without manifest"),
        pytest.param("x.yaml", b"manifest: a\nmodel: m", "x.yaml: key 'output' is missing", id="without output"),
        pytest.param("x.yaml", b"PAR1\xff\x00", "x.yaml: not a text file in UTF-8", id="not text"),
    ],
)
def test_files_that_are_not_job_files(run_command, here, name, content, words):
    if content is not None:
        (here / name).write_bytes(content)
    refused(run_command("run", name, "--inline"), here, words)


def test_yaml_1_2_numbers_are_numbers(run_command, here):
    assert run_command("plan", "job.yaml", "--set", "sampling.learning_rate=1e-2").code == 0


# --- manifests --------------------------------------------------------------------------------------------------------


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "pairs.parquet").write_bytes(content) and None


def _cut(part: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / "pairs.parquet"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])

    return cut


def _damage(folder: Path) -> None:
    """Overwrite data pages; the footer stays valid."""
    path = folder / "pairs.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 100 + content[104:])


def _folder(folder: Path) -> None:
    (folder / "pairs.parquet").unlink()
    (folder / "pairs.parquet").mkdir()


def _columns(**columns: object) -> Callable[[Path], None]:
    return lambda folder: write_manifest(folder, **columns)


def _repeated_name(folder: Path) -> None:
    values = [pa.array(GOOD["style"])] * 2
    pq.write_table(pa.Table.from_arrays(values, names=["style", "style"]), folder / "pairs.parquet")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda folder: (folder / "pairs.parquet").unlink(), ["no such manifest", "build"], id="absent"),
        pytest.param(_folder, ["is a folder; name the Parquet file in it"], id="a folder"),
        pytest.param(_bytes(b""), ["not a Parquet file, or a damaged one"], id="zero bytes"),
        pytest.param(_bytes(b"content,style\na,b\n"), ["not a Parquet file, or a damaged one"], id="a CSV"),
        pytest.param(_cut(0.5), ["not a Parquet file, or a damaged one"], id="truncated"),
        pytest.param(_damage, ["the Parquet file is damaged"], id="damaged pages"),
        pytest.param(_columns(**{name: pa.array([], "string") for name in GOOD}), ["has no rows"], id="no rows"),
        pytest.param(_columns(style=None), ["no column 'style'", "its columns are: pair_id, content"], id="no style"),
        pytest.param(_repeated_name, ["duplicate column 'style'; keep one of them"], id="style twice"),
        pytest.param(_columns(style=[1, 2, 3, 4]), ["column 'style' is int64, expected string"], id="style: numbers"),
        pytest.param(_columns(content=[True] * 4), ["column 'content' is bool, expected string"], id="content: truth"),
        pytest.param(_columns(seed=[1.5] * 4), ["column 'seed' is double, expected integer"], id="seed: fractions"),
        pytest.param(_columns(pair_id=[1, 2, 3, 4]), ["column 'pair_id' is int64, expected string"], id="id: numbers"),
        pytest.param(_columns(prompt=[b"x"] * 4), ["column 'prompt' is binary, expected string"], id="prompt: bytes"),
        pytest.param(_columns(image=["x"] * 4), ["column 'image'", "an output column; rename it"], id="a taken name"),
        pytest.param(_columns(content_weight=["1"] * 4), ["'content_weight' is string, expected number"], id="λ: text"),
    ],
)
def test_files_that_are_not_manifests(run_command, here, spoil, words):
    spoil(here)
    words = [str(here / "pairs.parquet"), *words]
    refused(run_command("run", "job.yaml", "--inline"), here, *words)
    refused(run_command("manifest", "validate", "pairs.parquet"), here, *words)


@pytest.mark.parametrize(
    ("columns", "place", "words"),
    [
        pytest.param({"style": ["s0.png", None] * 2}, "row 1, column 'style'", "is null", id="null style"),
        pytest.param({"style": ["s0.png", ""] * 2}, "row 1, column 'style'", "is empty", id="empty style"),
        pytest.param({"style": [["s0.png"], []] * 2}, "row 1, column 'style'", "empty list", id="no style in a list"),
        pytest.param({"style": [["s0.png", None]] * 4}, "row 0, column 'style'", "item 1 is null", id="null in a list"),
        pytest.param({"style": ["s0.png", "a\0b"] * 2}, "row 1, column 'style'", "NUL", id="NUL in a path"),
        pytest.param({"pair_id": ["a", "b", "a", "c"]}, "row 2, column 'pair_id'", "the id of row 0", id="id twice"),
        pytest.param({"pair_id": ["../x", *"abc"]}, "row 0, column 'pair_id'", "'../x' could be a path", id="../x"),
        pytest.param({"pair_id": [*"abc", "/etc/x"]}, "row 3, column 'pair_id'", "could be a path", id="/etc/x"),
        pytest.param({"pair_id": [*"abc", "..\\x"]}, "row 3, column 'pair_id'", "could be a path", id="..\\x"),
        pytest.param({"pair_id": [*"abc", ".."]}, "row 3, column 'pair_id'", "could be a path", id=".."),
        pytest.param({"pair_id": [*"abc", "a\nb"]}, "row 3, column 'pair_id'", "a control character", id="line break"),
        pytest.param({"pair_id": [*"abc", " "]}, "row 3, column 'pair_id'", "is empty", id="blank id"),
        pytest.param({"pair_id": [*"abc", "x" * 999]}, "row 3, column 'pair_id'", "at most 200", id="long id"),
        pytest.param({"seed": [1, -1, 1, 1]}, "row 1, column 'seed'", "is -1, expected 0 to 2^63 - 1", id="seed < 0"),
        pytest.param({"content_weight": [-0.5] * 4}, "row 0, column 'content_weight'", "0 or more", id="λ < 0"),
        pytest.param(
            {"content_weight": [1, float("nan"), 1, 1]}, "row 1, column 'content_weight'", "a finite number", id="λ nan"
        ),
    ],
)
def test_bad_rows(run_command, here, columns, place, words):
    write_manifest(here, **columns)
    refused(run_command("run", "job.yaml", "--inline"), here, str(here / "pairs.parquet"), place, words, "validate")
    result = run_command("manifest", "validate", "pairs.parquet")
    assert result.code == 2
    assert re.search(f"^{re.escape(place)}: .*{re.escape(words)}", result.out, re.MULTILINE), result.out


# --- models -----------------------------------------------------------------------------------------------------------


def _edit(part: str, **values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def _pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def _truncated(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(shutil.rmtree, ["no such folder", "'demo', the embedded model"], id="absent"),
        pytest.param(lambda folder: shutil.rmtree(folder / "unet"), ["lacks unet/config.json"], id="without UNet"),
        pytest.param(_pickled, ["pickled only (unet/diffusion_pytorch_model.bin)", "convert once"], id="pickled"),
        pytest.param(_truncated, ["diffusion_pytorch_model.safetensors: truncated or not safetensors"], id="truncated"),
        pytest.param(
            lambda folder: (folder / "unet" / "config.json").write_text("{"), ["unet/config.json"], id="broken config"
        ),
        pytest.param(_edit("unet", addition_embed_type="text_time"), ["lacks text_encoder_2"], id="SDXL"),
        pytest.param(_edit("unet", in_channels=9), ["takes 9 channels, as inpainting models do"], id="inpainting"),
        pytest.param(_edit("unet", cross_attention_dim=1024), ["reads text of 1024 channels"], id="parts of two"),
    ],
)
def test_models_that_cannot_be_used(run_command, here, model, spoil, words):
    bad = here / "model"
    shutil.copytree(model, bad)
    spoil(bad)
    for command in (["plan"], ["run", "--inline"], ["run"]):  # with Ray, before it starts
        refused(run_command(*command, "job.yaml", "--model", "./model"), here, str(bad), *words)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "words"),
    [
        pytest.param("job.yaml", ["job.yaml: cannot be written (", "--output"], id="a file"),
        pytest.param("job.yaml/run", ["job.yaml/run: cannot be written (Not a directory)"], id="below a file"),
        pytest.param("/proc/run", ["/proc/run: cannot be written (", "--output"], id="/proc"),
        pytest.param("x" * 300, ["File name too long"], id="a long name"),
        pytest.param("s3:///run/..", ["output s3://run/..: name a bucket and a folder in it"], id="S3"),
        pytest.param("gs://bucket/run", ["output gs://bucket/run: only local folders and s3:// can be"], id="GCS"),
    ],
)
def test_outputs_that_cannot_be_written(run_command, here, output, words):
    before = sorted(here.rglob("*"))
    refused(run_command("run", "job.yaml", "--inline", "--output", output), here, *words)
    if output != "/proc/run":  # only an attempt to write there shows it
        refused(run_command("plan", "job.yaml", "--output", output), here, *words)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "words"),
    [
        pytest.param(["notes.txt"], "holds other files (notes.txt) and no run", id="a file"),
        pytest.param(["checkpoints/mine.ckpt"], "holds other files (checkpoints) and no run", id="own checkpoints"),
        pytest.param(["tmp/mine"], "holds other files (tmp) and no run", id="own tmp"),
        pytest.param(["data/train-00000-of-00002.parquet", "records/0.json"], "(data, records)", id="without job.json"),
        pytest.param([*"abcde"], "(a, b, c, …)", id="many"),
    ],
)
def test_folders_with_other_files_are_not_changed(run_command, here, names, words):
    for name in names:
        (here / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "out" / name).write_text("mine")
    refused(run_command("run", "job.yaml", "--inline", "--output", "out"), here, words, "new or an empty folder")
    assert sorted(path.relative_to(here / "out").as_posix() for path in (here / "out").rglob("*.*")) == sorted(
        name for name in names if "." in name
    )


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"name": "of another program"}'),
        *(json.dumps({**RUN, key: None}).encode() for key in ("rows", "shards", "fingerprint")),
        json.dumps({**RUN, "shards": 0}).encode(),
    ],
)
def test_job_json_that_is_damaged_or_foreign(run_command, here, content):
    (here / "out").mkdir()
    (here / "out" / "job.json").write_bytes(content)
    for command in (["run", "job.yaml", "--inline", "--output", "out"], ["status", "out"], ["verify", "out"]):
        refused(run_command(*command), here, "out/job.json: damaged, or written by another", "--output")
    assert (here / "out" / "job.json").read_bytes() == content


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("address", "words"),
    [
        pytest.param("127.0.0.1:1", ["no answer from 127.0.0.1:1 (Connection refused)"], id="nobody there"),
        pytest.param("nonsense", ["not one of host:port"], id="no address"),
    ],
)
def test_a_ray_address_that_does_not_answer(run_command, here, address, words):
    result = run_command("run", "job.yaml", "--address", address)
    assert result.code == 2
    for word in [f"cluster.address {address}: ", *words]:
        assert word in result.error
    assert not list((here / "run" / "records").iterdir())


# --- images: a bad image fails its own rows and no others -------------------------------------------------------------


def _bomb() -> bytes:
    """The header of a PNG of 50000 × 50000 pixels, without pixel data."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))


def _palette_with_alpha() -> bytes:
    image = picture(5, mode="P")
    image.putpixel((0, 0), 0)
    return as_bytes(image, transparency=0)


def _animated() -> bytes:
    return as_bytes(picture(6), "GIF", save_all=True, append_images=[picture(7), picture(8)])


def _sixteen_bit() -> bytes:
    return as_bytes(Image.fromarray(np.random.default_rng(9).integers(0, 65536, (30, 40), np.uint16)))


BAD: dict[str, bytes | None] = {  # None: there is no such file
    "absent.png": None,
    "zero.png": b"",
    "truncated.jpg": as_bytes(picture(10, (200, 200)), "JPEG")[:2000],
    "1x1.png": as_bytes(picture(11, (1, 1))),
    "bomb.png": _bomb(),
    "text.jpg": b"This is not an image.",
    "folder.png": None,
}
ODD: dict[str, bytes] = {
    "cmyk.jpg": as_bytes(picture(12, mode="CMYK"), "JPEG"),
    "16bit.png": _sixteen_bit(),
    "palette.png": _palette_with_alpha(),
    "animated.gif": _animated(),
}


def bad_and_good(folder: Path, bad: bool) -> None:
    """Write a manifest whose contents alternate between bad and readable images, and whose last style is bad.

    With `bad` False, valid images take the place of the bad ones. Rows and shards are the same in both manifests.
    """
    for name, content in BAD.items():
        if not bad:
            (folder / name).write_bytes(as_bytes(picture(99)))
        elif content is not None:
            (folder / name).write_bytes(content)
    if bad:
        (folder / "folder.png").mkdir()
    for name, content in ODD.items():
        (folder / name).write_bytes(content)
    contents = [name for pair in zip(BAD, ["c0.png", *ODD, "c1.png", "c0.png"], strict=True) for name in pair]
    contents += ["c1.png", "c1.png"]
    styles = ["s0.png"] * (len(contents) - 1) + ["text.jpg"]
    ids = [f"{row:02d}-{name.split('.')[0]}" for row, name in enumerate(contents)]
    write_manifest(folder, pair_id=ids, content=contents, style=styles)


def outputs(run: Path) -> dict[str, bytes]:
    """Image bytes of every committed pair."""
    rows = [row for path in sorted((run / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["pair_id"]: row["image"]["bytes"] for row in rows}


def test_bad_images_fail_their_own_rows_and_no_others(run_command, here):
    command = ["run", "job.yaml", "--inline", "--set", "shards.pairs_per_shard=8"]
    bad_and_good(here, bad=True)
    result = run_command(*command)
    assert result.code == 3, result
    assert "Traceback" not in result.err
    assert "8 of 16 images done, 8 failed, 0 open\n  8 × ImageError\n" in result.out

    assert f"    … all of them in {here}/run/failures.parquet\n" in result.out
    rows = [row for path in sorted((here / "run" / "failures").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert pq.read_table(here / "run" / "failures.parquet").to_pylist() == rows
    expected = {f"{2 * place:02d}-{name.split('.')[0]}": name for place, name in enumerate(BAD)} | {
        "15-c1": "text.jpg"  # because of its style
    }
    assert [row["pair_id"] for row in rows] == list(expected)
    for row in rows:
        assert row.keys() == {"row", "pair_id", "stage", "error", "message"}
        assert (row["row"], row["stage"], row["error"]) == (int(row["pair_id"][:2]), "read", "ImageError")
        assert row["message"].startswith(f"{expected[row['pair_id']]}: "), row
        assert "\n" not in row["message"]

    images = outputs(here / "run")
    assert len(images) == 8
    for data in images.values():
        with Image.open(io.BytesIO(data)) as image:
            assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")

    assert run_command(*command).code == 3  # the run is finished: no row is tried again
    assert run_command(*command, "--failures-ok").code == 0
    assert run_command("verify", "run", "--deep").code == 0
    assert "8 failed" in run_command("status", "run").out

    # The other images are byte for byte those of a run without bad images.
    (here / "folder.png").rmdir()
    bad_and_good(here, bad=False)
    assert run_command(*command, "--output", "good").code == 0
    among_good = outputs(here / "good")
    assert len(among_good) == 16
    assert images == {name: among_good[name] for name in images}


TOO_MANY = ["run", "job.yaml", "--inline", "--failures-ok"]  # the option does not cover a run that stopped


@pytest.mark.parametrize("bad_row", [0, 5])
def test_a_few_failures_in_the_shard_that_happens_to_be_first_stop_no_run(run_command, here, bad_row):
    styles = ["s0.png"] * 6
    styles[bad_row] = "no.png"
    write_manifest(here, pair_id=None, content=["c0.png"] * 6, style=styles, seed=list(range(6)))
    command = [*TOO_MANY, "--set", "max_failed_fraction=0.2", "--set", "shards.pairs_per_shard=1"]
    result = run_command(*command)
    assert result.code == 0, result
    assert "5 of 6 images done, 1 failed, 0 open" in result.out


def test_a_run_stops_once_too_many_rows_have_failed_whatever_becomes_of_the_others(run_command, here):
    write_manifest(
        here, pair_id=None, content=["c0.png"] * 6, style=[*(f"no{row}.png" for row in range(4)), "s0.png", "s1.png"]
    )
    result = run_command(*TOO_MANY)
    assert result.code == 1, result
    assert "0 of 6 images done, 4 failed, 2 open" in result.out
    assert "too many failures: 4 of 4 rows seen so far, more than the max_failed_fraction of 0.5 allows" in result.out
    assert f"{here / 'run' / 'failures.parquet'} has the reasons" in result.out
    assert pq.read_table(here / "run" / "failures.parquet").num_rows == 4

    advice = f"then `stylemill retry-failed {here / 'run'}`, then start this command again for the other 2 rows"
    assert advice in result.out
    for row in range(4):
        (here / f"no{row}.png").write_bytes(as_bytes(picture(row)))
    for _ in range(2):
        result = run_command("retry-failed", "run", "--inline")
        assert (result.code, "4 of 6 images done, 0 failed, 2 open" in result.out) == (1, True), result
        last = "not sampled yet: 2 rows in 1 shard; `stylemill run` with the job file of this run goes on there"
        assert result.out.splitlines()[-1] == last
    result = run_command(*TOO_MANY)
    assert (result.code, "6 of 6 images done, 0 failed, 0 open" in result.out) == (0, True), result


def test_a_run_stops_when_too_many_of_its_first_hundred_rows_failed(run_command, here):
    write_manifest(
        here, pair_id=None, content=["c0.png"] * 220, style=["no.png"] * 100 + ["s0.png"] * 120, seed=list(range(220))
    )
    result = run_command(*TOO_MANY, "--set", "shards.pairs_per_shard=50")
    assert result.code == 1, result
    assert "0 of 220 images done, 100 failed, 120 open" in result.out
    assert "too many failures: 100 of 100 rows seen so far" in result.out


def test_a_finished_run_with_too_many_failures_fails_until_they_are_accepted(run_command, here):
    write_manifest(here, style=["no0.png", "no1.png", "s0.png", "no2.png"])
    for _ in range(2):
        result = run_command(*TOO_MANY)
        assert result.code == 1
        assert "1 of 4 images done, 3 failed, 0 open" in result.out
        assert "too many failures: 3 of 4 rows" in result.out
        assert "start this command again" not in result.out
    assert run_command(*TOO_MANY[:-1], "--set", "max_failed_fraction=1").code == 3
    assert run_command(*TOO_MANY, "--set", "max_failed_fraction=0.75").code == 0
    assert run_command("verify", "run").code == 0


# --- run folders of other jobs, and disks that fail or are full -------------------------------------------------------


def data_files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "data").iterdir()}


def test_a_run_folder_of_another_job_names_each_difference(run_command, here):
    assert run_command("run", "job.yaml", "--inline").code == 0
    before = data_files(here / "run")
    flags = ["--set", "sampling.steps=3", "--set", "sampling.content_weight=0.5", "--set", "shards.pairs_per_shard=1"]
    write_manifest(here, seed=[1, 2, 3, 4])
    result = run_command("run", "job.yaml", "--inline", *flags, "--set", "image.fit=pad")
    assert result.code == 2
    for words in (
        f"{here / 'run'}: holds a run of another job",
        "manifest.sha256: run has ",
        "sampling.steps: run has 2, job has 3",
        "sampling.content_weight: run has 0.25, job has 0.5",
        "shards.pairs_per_shard: run has 2, job has 1",
        "image.fit: run has crop, job has pad",
        "Undo the change, or choose another folder with --output",
    ):
        assert words in result.error
    assert data_files(here / "run") == before
    assert run_command("verify", "run").code == 0


class SmallDisk:
    """A disk that becomes full: a small tmpfs, or a failing fsync where a tmpfs cannot be mounted."""

    def __init__(self, folder: Path, mounted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.mounted, self.monkeypatch = folder, mounted, monkeypatch

    def fill(self) -> None:
        if not self.mounted:
            self.monkeypatch.setattr(os, "fsync", self._full)
            return
        with open(self.folder / ".ballast", "ab", buffering=0) as ballast:
            while True:
                try:
                    ballast.write(bytes(4096))
                except OSError:
                    break

    def empty(self) -> None:
        if self.mounted:
            (self.folder / ".ballast").unlink()
        else:
            self.monkeypatch.undo()

    def _full(self, _: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(here, monkeypatch) -> Iterator[SmallDisk]:
    folder = here / "disk"
    folder.mkdir()
    mounted = _mount(folder, "size=2m")
    with pytest.MonkeyPatch.context() as patch:
        yield SmallDisk(folder, mounted, patch)
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(folder: Path, options: str) -> bool:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode == 0


def test_a_full_disk_loses_nothing(run_command, here, disk, monkeypatch):
    assert run_command("run", "job.yaml", "--inline").code == 0
    command = ["run", "job.yaml", "--inline", "--output", "disk/out"]

    disk.fill()
    result = run_command(*command)
    assert result.code == 2  # before anything was sampled
    assert "disk/out: cannot be written (No space left on device); free some space" in result.error
    disk.empty()

    process_shard = stylemill.execution.local.process_shard

    def fill_before_shard_1(run, attempt, *rest):
        if attempt.shard == 1:
            disk.fill()
        return process_shard(run, attempt, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stylemill.execution.local, "process_shard", fill_before_shard_1)
        patch.setattr(stylemill.execution.local, "SHARDS_AT_A_TIME", 1)  # so that shard 0 is committed by then
        result = run_command(*command)
    assert result.code == 1, result
    assert "Traceback" not in result.err
    assert "the disk is full; nothing committed is lost: free some space, then the same command resumes" in (
        result.out + result.err
    )
    disk.empty()

    assert "2 of 4 images done, 0 failed, 2 open" in run_command("status", "disk/out").out
    assert run_command(*command).code == 0
    assert data_files(disk.folder / "out") == data_files(here / "run")
    assert run_command("verify", "disk/out").code == 0


def test_a_read_only_disk(run_command, here):
    folder = here / "read-only"
    folder.mkdir()
    if not _mount(folder, "size=64k,ro"):
        pytest.skip("needs the right to mount")
    try:
        for command in (["plan"], ["run", "--inline"]):
            refused(
                run_command(*command, "job.yaml", "--output", "read-only/out"),
                here,
                "read-only/out: cannot be written (Read-only file system); free some space, fix the permissions",
                "--output",
            )
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
