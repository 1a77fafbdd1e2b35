"""Bad input: one clear line that says what, where and what to do, the right exit code, and nothing lost.

Everything goes through the command line, as a user meets it. Exit code 2 is for what the user must change first, 3 for
a finished run with recorded failures, 1 for a run that is stopped or incomplete.
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
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import stylemill.execution.local
from stylemill import __version__
from stylemill.cli.app import _parser, main

SIZE = 64  # pixels
VERBS = [
    *(["manifest", "build"], ["manifest", "validate"], ["manifest", "show"], ["manifest"], []),
    *(["plan"], ["run"], ["status"], ["verify"], ["demo-model"]),
]


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error message of the command; that there is exactly one, and no traceback, is checked here."""
        assert "Traceback" not in self.err, self.err
        assert self.err.count("error: ") == 1, self.err
        return self.err[self.err.index("error: ") + len("error: ") :].strip()


@pytest.fixture
def stylemill_says(capsys) -> Callable[..., Said]:
    def say(*argv: object) -> Said:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:  # argparse's way
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return say


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
    """A folder with a good job of four pairs: job.yaml, pairs.parquet and its images."""
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


def refused(said: Said, folder: Path, *words: str) -> str:
    """Assert that a command was refused as bad input before it wrote anything; returns its message."""
    assert said.code == 2, said
    for word in words:
        assert word in said.error, said.error
    assert said.out == ""
    assert not (folder / "run").exists()
    return said.error


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_help_shows_an_example_that_parses(stylemill_says, verb):
    said = stylemill_says(*verb, "--help")
    assert said.code == 0
    _, example = said.out.split("example: stylemill ")
    words = shlex.split(example)
    assert words[: len(verb)] == verb
    assert _parser().parse_args(words).call


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["manifest"], "the following arguments are required: COMMAND"),
        (["rum"], "invalid choice: 'rum'"),
        (["run"], "the following arguments are required: job"),
        (["run", "job.yaml", "--worker-count", "2"], "unrecognized arguments: --worker-count 2"),
        (["manifest", "build", "p.parquet", "--style", ".", "--tile", "16"], "--tile: '16': write contents x styles"),
        (["manifest", "build", "p.parquet", "--style", ".", "--seed", "x"], "--seed: invalid int value: 'x'"),
    ],
)
def test_commands_that_are_not_there(stylemill_says, argv, words):
    said = stylemill_says(*argv)
    assert said.code == 2
    assert words in said.error
    assert said.err.startswith("usage: stylemill")


def test_version(stylemill_says):
    assert stylemill_says("--version") == Said(0, f"stylemill {__version__}\n", "")


@pytest.mark.parametrize("verb", ["status", "verify"])
@pytest.mark.parametrize("name", ["absent", ".", "job.yaml"])
def test_folders_that_are_no_runs(stylemill_says, here, verb, name):
    assert "is not a run folder (it has no job.json)" in refused(stylemill_says(verb, name), here, name)


# --- job files and flags; every other mistake in one is in test_job.py ------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "flags", "words"),
    [
        pytest.param("sampling: {stepz: 2}", [], ["job.yaml: ", "'sampling.stepz'", "'steps'"], id="unknown key"),
        pytest.param("sampling: {steps: 0}", [], ["job.yaml: sampling.steps", "1, not 0"], id="no steps"),
        pytest.param("sampling: {content_weight: -1}", [], ["job.yaml: sampling.content_weight"], id="λ < 0"),
        pytest.param("image: {size: 100}", [], ["image.size 100×100", "multiples of 64", "128×128"], id="off the grid"),
        pytest.param("name: x\nname: y", [], ["job.yaml: line 10", "'name' stands there twice"], id="key twice"),
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
@pytest.mark.parametrize("verb", [["plan"], ["run", "--inline"]], ids=["plan", "run"])
def test_bad_jobs(stylemill_says, here, verb, yaml, flags, words):
    job = here / "job.yaml"
    own = [line for line in job.read_text().splitlines() if line.split(":")[0] != yaml.split(":")[0]]
    job.write_text("\n".join([*own, yaml]))
    refused(stylemill_says(*verb, job.name, *flags), here, *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("absent.yaml", None, "absent.yaml: no such job file", id="absent"),
        pytest.param(".", None, ".: the job file cannot be read: Is a directory", id="a folder"),
        pytest.param("x.yaml", b"", "x.yaml: a job file holds keys and values", id="empty"),
        pytest.param("x.yaml", b"- manifest: a", "x.yaml: a job file holds keys and values", id="a list"),
        pytest.param("x.yaml", b"output: run\nmodel: m", "x.yaml: key 'manifest' is missing", id="without manifest"),
        pytest.param("x.yaml", b"manifest: a\nmodel: m", "x.yaml: key 'output' is missing", id="without output"),
        pytest.param("x.yaml", b"PAR1\xff\x00", "x.yaml: not a text file in UTF-8", id="not text"),
    ],
)
def test_files_that_are_no_jobs(stylemill_says, here, name, content, words):
    if content is not None:
        (here / name).write_bytes(content)
    refused(stylemill_says("run", name, "--inline"), here, words)


def test_numbers_that_only_yaml_1_2_knows(stylemill_says, here):
    assert stylemill_says("plan", "job.yaml", "--set", "sampling.learning_rate=1e-2").code == 0


# --- manifests --------------------------------------------------------------------------------------------------------


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "pairs.parquet").write_bytes(content) and None


def _cut(part: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / "pairs.parquet"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])

    return cut


def _damage(folder: Path) -> None:
    """A valid footer above pages of noise."""
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
        pytest.param(_repeated_name, ["column 'style' stands there more than once"], id="style twice"),
        pytest.param(_columns(style=[1, 2, 3, 4]), ["column 'style' is int64, expected string"], id="style: numbers"),
        pytest.param(_columns(content=[True] * 4), ["column 'content' is bool, expected string"], id="content: truth"),
        pytest.param(_columns(seed=[1.5] * 4), ["column 'seed' is double, expected integer"], id="seed: fractions"),
        pytest.param(_columns(pair_id=[1, 2, 3, 4]), ["column 'pair_id' is int64, expected string"], id="id: numbers"),
        pytest.param(_columns(prompt=[b"x"] * 4), ["column 'prompt' is binary, expected string"], id="prompt: bytes"),
        pytest.param(_columns(image=["x"] * 4), ["column 'image'", "an output column; rename it"], id="a taken name"),
        pytest.param(_columns(content_weight=["1"] * 4), ["'content_weight' is string, expected number"], id="λ: text"),
    ],
)
def test_files_that_are_no_manifests(stylemill_says, here, spoil, words):
    spoil(here)
    words = [str(here / "pairs.parquet"), *words]
    refused(stylemill_says("run", "job.yaml", "--inline"), here, *words)
    refused(stylemill_says("manifest", "validate", "pairs.parquet"), here, *words)


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
def test_bad_rows(stylemill_says, here, columns, place, words):
    write_manifest(here, **columns)
    refused(stylemill_says("run", "job.yaml", "--inline"), here, str(here / "pairs.parquet"), place, words, "validate")
    said = stylemill_says("manifest", "validate", "pairs.parquet")
    assert said.code == 2
    assert re.search(f"^{re.escape(place)}: .*{re.escape(words)}", said.out, re.MULTILINE), said.out


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
def test_models_that_cannot_be_used(stylemill_says, here, model, spoil, words):
    bad = here / "model"
    shutil.copytree(model, bad)
    spoil(bad)
    for verb in (["plan"], ["run", "--inline"], ["run"]):  # before Ray starts, too
        refused(stylemill_says(*verb, "job.yaml", "--model", "./model"), here, str(bad), *words)


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
def test_outputs_that_cannot_be_written(stylemill_says, here, output, words):
    before = sorted(here.rglob("*"))
    refused(stylemill_says("run", "job.yaml", "--inline", "--output", output), here, *words)
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
def test_folders_with_other_files_stay_as_they_are(stylemill_says, here, names, words):
    for name in names:
        (here / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "out" / name).write_text("mine")
    refused(stylemill_says("run", "job.yaml", "--inline", "--output", "out"), here, words, "new or an empty folder")
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
def test_job_json_that_is_damaged_or_foreign(stylemill_says, here, content):
    (here / "out").mkdir()
    (here / "out" / "job.json").write_bytes(content)
    for command in (["run", "job.yaml", "--inline", "--output", "out"], ["status", "out"], ["verify", "out"]):
        refused(stylemill_says(*command), here, "out/job.json: damaged, or written by another", "--output")
    assert (here / "out" / "job.json").read_bytes() == content


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("address", "words"),
    [
        pytest.param("127.0.0.1:1", ["no answer from 127.0.0.1:1 (Connection refused)"], id="nobody there"),
        pytest.param("nonsense", ["not one of host:port"], id="no address"),
    ],
)
def test_a_ray_address_that_does_not_answer(stylemill_says, here, address, words):
    said = stylemill_says("run", "job.yaml", "--address", address)
    assert said.code == 2
    for word in [f"cluster.address {address}: ", *words]:
        assert word in said.error
    assert not list((here / "run" / "records").iterdir())


# --- images: a bad one costs its own rows and no others ---------------------------------------------------------------


def _bomb() -> bytes:
    """The head of a PNG of 50000 × 50000 pixels; nothing decodes that by mistake."""
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


BAD: dict[str, bytes | None] = {  # None: no file is there
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
    """One manifest of bad, odd and good contents in turn, and a row with a bad style; `bad` False: good in their place.

    Both have the same rows, so that every pair has the same place in the same shard.
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


def test_bad_images_cost_their_own_rows_and_nothing_else(stylemill_says, here):
    command = ["run", "job.yaml", "--inline", "--set", "shards.pairs_per_shard=8"]
    bad_and_good(here, bad=True)
    said = stylemill_says(*command)
    assert said.code == 3, said
    assert "Traceback" not in said.err
    assert "8 of 16 images done, 8 failed, 0 open\n  8 × ImageError\n" in said.out

    rows = [row for path in sorted((here / "run" / "failures").iterdir()) for row in pq.read_table(path).to_pylist()]
    expected = {f"{2 * place:02d}-{name.split('.')[0]}": name for place, name in enumerate(BAD)} | {
        "15-c1": "text.jpg"  # by its style
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

    assert stylemill_says(*command).code == 3  # done: nothing is tried again
    assert stylemill_says(*command, "--failures-ok").code == 0
    assert stylemill_says("verify", "run", "--deep").code == 0
    assert "8 failed" in stylemill_says("status", "run").out

    # The neighbours of bad images are, to the byte, what they are among good ones.
    (here / "folder.png").rmdir()
    bad_and_good(here, bad=False)
    assert stylemill_says(*command, "--output", "good").code == 0
    among_good = outputs(here / "good")
    assert len(among_good) == 16
    assert images == {name: among_good[name] for name in images}


def test_too_many_failures_stop_the_run(stylemill_says, here):
    write_manifest(here, style=["no0.png", "no1.png", "s0.png", "no2.png"])
    command = ["run", "job.yaml", "--inline", "--failures-ok"]  # the flag is for some failures, not for a lost run
    said = stylemill_says(*command)
    assert said.code == 1, said
    assert "0 of 4 images done, 2 failed, 2 open" in said.out
    assert "too many failures: 2 of the 2 rows seen so far, more than the max_failed_fraction of 0.5" in said.out
    assert str(here / "run" / "failures") in said.out
    said = stylemill_says(*command)  # the last shard, and still too many
    assert said.code == 1
    assert "too many failures: 3 of the 4 rows" in said.out
    assert stylemill_says(*command).code == 1
    assert stylemill_says(*command[:-1], "--set", "max_failed_fraction=1").code == 3
    assert stylemill_says(*command, "--set", "max_failed_fraction=0.75").code == 0
    assert stylemill_says("verify", "run").code == 0


# --- run folders of other jobs, and disks that fail or are full -------------------------------------------------------


def data_files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "data").iterdir()}


def test_a_run_folder_of_another_job_names_each_difference(stylemill_says, here):
    assert stylemill_says("run", "job.yaml", "--inline").code == 0
    before = data_files(here / "run")
    flags = ["--set", "sampling.steps=3", "--set", "sampling.content_weight=0.5", "--set", "shards.pairs_per_shard=1"]
    write_manifest(here, seed=[1, 2, 3, 4])
    said = stylemill_says("run", "job.yaml", "--inline", *flags, "--set", "image.fit=pad")
    assert said.code == 2
    for words in (
        f"{here / 'run'}: holds a run of another job",
        "manifest.sha256: run has ",
        "sampling.steps: run has 2, job has 3",
        "sampling.content_weight: run has 0.25, job has 0.5",
        "shards.pairs_per_shard: run has 2, job has 1",
        "image.fit: run has crop, job has pad",
        "Undo the change, or choose another folder with --output",
    ):
        assert words in said.error
    assert data_files(here / "run") == before
    assert stylemill_says("verify", "run").code == 0


class SmallDisk:
    """A disk that another program fills and empties: a small tmpfs, or a failing fsync where none can be mounted."""

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
    with pytest.MonkeyPatch.context() as own:
        yield SmallDisk(folder, mounted, own)
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(folder: Path, options: str) -> bool:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode == 0


def test_a_full_disk_loses_nothing(stylemill_says, here, disk, monkeypatch):
    assert stylemill_says("run", "job.yaml", "--inline").code == 0
    command = ["run", "job.yaml", "--inline", "--output", "disk/out"]

    disk.fill()
    said = stylemill_says(*command)
    assert said.code == 2  # before anything was sampled
    assert "disk/out: cannot be written (No space left on device); free some space" in said.error
    disk.empty()

    process_shard = stylemill.execution.local.process_shard

    def filled_before_the_second(run, attempt, *rest):
        if attempt.shard == 1:
            disk.fill()
        return process_shard(run, attempt, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stylemill.execution.local, "process_shard", filled_before_the_second)
        said = stylemill_says(*command)
    assert said.code == 1, said
    assert "Traceback" not in said.err
    assert "the disk is full; nothing committed is lost: free some space, then the same command resumes" in (
        said.out + said.err
    )
    disk.empty()

    assert "2 of 4 images done, 0 failed, 2 open" in stylemill_says("status", "disk/out").out
    assert stylemill_says(*command).code == 0
    assert data_files(disk.folder / "out") == data_files(here / "run")
    assert stylemill_says("verify", "disk/out").code == 0


def test_a_read_only_disk(stylemill_says, here):
    folder = here / "read-only"
    folder.mkdir()
    if not _mount(folder, "size=64k,ro"):
        pytest.skip("needs the right to mount")
    try:
        said = stylemill_says("run", "job.yaml", "--inline", "--output", "read-only/out")
        refused(
            said,
            here,
            "read-only/out: cannot be written (Read-only file system); free some space, fix the permissions",
            "--output",
        )
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
