"""Hostile input: a corpus of files, URLs, jobs and models that try to exhaust, mislead or take over a worker.

Each has its error class, a part of its message, and its exit code. test_bad_input.py has the input that is wrong by
mistake. The two together list what stylemill refuses.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stylemill.cli import main
from stylemill.config.inputs import InputSettings
from stylemill.errors import ImageError, JobError, ManifestError, ModelError, StylemillError
from stylemill.images.read import load_image
from stylemill.planning.plan import plan


def as_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *between: bytes, data: bytes = b"\0", depth: int = 8) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int], frames: int = 1) -> bytes:
    """A GIF of plain frames of 8 × 8 pixels whose headers give the size `frame`."""
    plain = as_bytes(Image.new("P", (8, 8), 1), "GIF")
    begin = 13 + 3 * 2 ** ((plain[10] & 7) + 1)  # after the palette
    assert plain[begin : begin + 9] == b"," + struct.pack("<HHHH", 0, 0, 8, 8)
    image = b"," + struct.pack("<HHHH", 0, 0, *frame) + plain[begin + 9 : -1]
    return plain[:6] + struct.pack("<HH", *screen) + plain[10:begin] + image * frames + b";"


def tiff(width: int, height: int, next_ifd: int = 0) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, min(width * height, 2**32 - 1))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", next_ifd)


def jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header gives another size."""
    data = bytearray(as_bytes(picture(1), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../../evil.png", as_bytes(picture(1)))
    return buffer.getvalue()


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


LIMIT = r"over the limit of 178,956,970 pixels"
UNKNOWN = "not an image, or in a format that is not read"
DAMAGED = "truncated or damaged"
METADATA = "where clouds keep their metadata, which is never read"
PRIVATE = "not one of the public Internet"
LAUGHS = '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><svg>&b;</svg>'

Write = Callable[[Path], None]  # writes a file, or changes the files of a folder

# --- images: the name in the manifest -> its bytes, or a function that writes the file; and a pattern of the message --

IMAGES: dict[str, tuple[bytes | Write | None, str]] = {
    # large dimensions in few bytes
    "bomb.png": (png(50_000, 50_000), LIMIT),
    "bomb-beyond-32-bits.png": (png(2**31 - 1, 2**31 - 1), LIMIT),
    "bomb-deep.png": (png(30_000, 30_000, depth=16), LIMIT),
    "bomb-flat.png": (png(2**31 - 1, 8), LIMIT),
    "bomb-screen.gif": (gif((65_535, 65_535), (8, 8)), LIMIT),
    "bomb-frame.gif": (gif((8, 8), (65_535, 65_535)), "over the limit|truncated or damaged"),
    "bomb.tif": (tiff(100_000, 100_000), LIMIT),
    "bomb.jpg": (jpeg(65_535, 65_535), LIMIT),
    "bomb.bmp": (b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0), LIMIT),
    "bomb.ppm": (b"P6 100000 100000 255\n", LIMIT),
    "bomb.webp": (riff((b"VP8X", b"\x10\0\0\0" + b"\xff\xff\xff" * 2)), "over the limit"),
    "bomb.qoi": (b"qoif" + struct.pack(">IIBB", 65_535, 65_535, 3, 0), LIMIT),
    # few bytes that decompress to many
    "bomb-text.png": (png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))), DAMAGED),
    "bomb-texts.png": (png(8, 8, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))] * 80), DAMAGED),
    "gzip-bomb.png": (gzip.compress(bytes(10 << 20)), UNKNOWN),
    # drawings, documents and programs named as images
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9e9" height="9e9"/>', "is an SVG drawing"),
    "drawing-external.png": (
        b'<?xml version="1.0"?><svg><image href="file:///etc/passwd"/></svg>',
        "is an SVG drawing",
    ),
    "billion-laughs.svg": (LAUGHS.encode(), UNKNOWN),
    "drawing.svgz": (gzip.compress(b"<svg/>"), UNKNOWN),
    "script.png": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n",
        "is a PostScript drawing",
    ),
    "script.eps": (b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS", "is a PostScript drawing"),
    "document.png": (b"%PDF-1.7\n/OpenAction", "is a PDF document"),
    "page.jpg": (b"<!doctype html><script>alert(1)</script>", "is a web page"),
    "script.gif": (b"GIF89a/*<script>*/=1;alert(1)//", UNKNOWN),
    "photo.psd": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3), UNKNOWN),
    "icon.ico": (as_bytes(picture(1, (32, 32)), "ICO"), UNKNOWN),
    "texture.tga": (as_bytes(picture(1), "TGA"), UNKNOWN),
    "archive.png": (archive(), UNKNOWN),
    "pickle.png": (pickle.dumps({"a": 1}), UNKNOWN),
    "program.png": (b"\x7fELF\2\1\1" + bytes(64), UNKNOWN),
    "video.webp": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", UNKNOWN),
    "nothing.png": (bytes(5000), UNKNOWN),
    # damaged so that a decoder might loop, wait or read outside the file
    "no-frames.gif": (gif((8, 8), (8, 8), frames=0), UNKNOWN),
    "half-a-directory.tif": (tiff(8, 8)[:-60], UNKNOWN),
    "far.tif": (b"II*\0" + struct.pack("<I", 2**32 - 8), f"{DAMAGED}|{UNKNOWN}"),
    "no-end.png": (png(64, 64)[:-12], DAMAGED),
    "lies.webp": (b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x7f" + bytes(20), f"{DAMAGED}|{UNKNOWN}"),
    "begin.jpg": (b"\xff\xd8\xff", f"{DAMAGED}|{UNKNOWN}"),
    "thin.png": (png(10_000, 1), "a side has at least 8"),
    # paths to other files
    "/etc/passwd": (None, UNKNOWN),
    "../../../../../../../../../../etc/passwd": (None, UNKNOWN),
    "link-to-passwd.png": (lambda path: path.symlink_to("/etc/passwd"), UNKNOWN),
    "link-to-itself.png": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "link-to-nothing.png": (lambda path: path.symlink_to("absent"), "No such file"),
    "link-to-zero.png": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "link-to-terminal.png": (lambda path: path.symlink_to("/proc/self/fd"), "is a folder"),
    "/dev/random": (None, "is not a regular file"),
    "pipe.png": (os.mkfifo, "is not a regular file"),
    "/proc/self/environ": (None, UNKNOWN),
    "a\x1b]0;owned\x07.png": (None, "No such file"),
    # URLs to other hosts and files
    "file:///etc/passwd": (None, "file:// is not read"),
    "ftp://127.0.0.1/a.png": (None, "ftp:// is not read"),
    "data://image/png;base64,AAAA": (None, "data:// is not read"),
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/": (None, METADATA),
    "http://[fd00:ec2::254]/latest/meta-data/": (None, METADATA),
    "http://2852039166/computeMetadata/v1/": (None, METADATA),
    "http://127.0.0.1:8265/api/jobs/": (None, PRIVATE),  # Ray's dashboard, which can start programs
    "http://[::ffff:7f00:1]:6379/": (None, PRIVATE),
    "http://10.0.0.1/a.png": (None, PRIVATE),
    "http://me:secret@192.168.0.1/a.png": (None, "a user's name"),
    "http://[oops/a.png": (None, "is no URL"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stylemill.demo.untrained import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("model") / "demo")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a valid job of one pair."""
    (tmp_path / "good.png").write_bytes(as_bytes(picture(0)))
    pq.write_table(pa.table({"content": ["good.png"], "style": ["good.png"]}), tmp_path / "pairs.parquet")
    (tmp_path / "job.yaml").write_text(
        f"manifest: pairs.parquet\noutput: run\nmodel: {model}\nsampling: {{steps: 1, iterations: 1}}\n"
        "image: {size: 64}\ncluster: {workers: 1, micro_batch: 2}\nretries: 0\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it reads
def test_each_hostile_image_fails_its_row_and_no_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (content, _) in IMAGES.items():
        if isinstance(content, bytes):
            (here / name).write_bytes(content)
        elif content is not None:
            content(here / name)
    contents = [*IMAGES, "good.png"]
    ids = [f"{number:02d}" for number in range(len(contents))]
    notes = ["../../evil", "/etc/cron.d/evil", "=cmd|' /C calc'!A0"] * len(ids)
    table = {"pair_id": ids, "content": contents, "style": ["good.png"] * len(ids), "../note": notes[: len(ids)]}
    pq.write_table(pa.table(table), here / "pairs.parquet")
    before = {path.name for path in here.iterdir()}

    assert main(["run", "job.yaml", "--inline", "--set", "max_failed_fraction=1"]) == 3
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "\x1b" not in printed.out + printed.err
    rows = [row for path in (here / "run" / "failures").iterdir() for row in pq.read_table(path).to_pylist()]
    failures = {contents[row["row"]]: row for row in rows}
    assert failures.keys() == IMAGES.keys()
    for name, (_, pattern) in IMAGES.items():
        failure = failures[name]
        assert (failure["stage"], failure["error"]) == ("read", "ImageError"), failure
        with pytest.raises(ImageError, match=pattern):
            raise ImageError(failure["message"])
        assert failure["message"].isprintable(), failure
        assert "secret" not in failure["message"]
        assert "root:" not in failure["message"]

    # Carried values that look like paths are only values: no file is written there.
    assert {path.name for path in here.iterdir()} == before | {"run"}
    (data,) = (here / "run" / "data").iterdir()
    assert pq.read_table(data)["../note"].to_pylist() == [table["../note"][-1]]
    assert pq.read_table(data)["pair_id"].to_pylist() == [ids[-1]]


def test_of_a_gif_with_a_hundred_thousand_frames_only_the_first_is_read(tmp_path: Path) -> None:
    """The other frames are neither counted nor decoded: noise in their place makes no difference."""
    image = load_image("a.gif", gif((8, 8), (8, 8), 100_000), tmp_path, (8, 8), "crop")
    assert image.source_size == (8, 8)
    noise = gif((8, 8), (8, 8), 2)[:-10] + bytes(range(256)) * 9
    assert (load_image("a.gif", noise, tmp_path, (8, 8), "crop").pixels == image.pixels).all()


def test_with_remote_only_a_manifest_reads_no_file_of_the_machine(here: Path) -> None:
    """Neither for a pair nor for a thumbnail of the contact sheet."""
    paths = ["good.png", str(here / "good.png"), "../good.png", "file:///etc/passwd"]
    embedded = [{"bytes": as_bytes(picture(0)), "path": "/etc/passwd"}]
    pq.write_table(
        pa.table({"content": [*({"bytes": None, "path": path} for path in paths), *embedded], "style": embedded * 5}),
        here / "pairs.parquet",
    )
    flags = ["--set", "inputs.remote_only=true", "--set", "max_failed_fraction=1", "--set", "shards.pairs_per_shard=5"]
    assert main(["run", "job.yaml", "--inline", *flags]) == 3
    (failures,) = (here / "run" / "failures").iterdir()
    messages = pq.read_table(failures)["message"].to_pylist()
    assert len(messages) == 4
    assert all("is a path of this machine, and inputs.remote_only allows none" in message for message in messages[:3])
    assert "file:// is not read" in messages[3]


def test_the_limits_of_inputs_may_change_between_two_starts_of_a_run(here: Path) -> None:
    """They decide which rows fail, and change no byte of the others."""
    plain = plan("job.yaml")
    strict = plan(
        "job.yaml",
        {
            "inputs": InputSettings(
                max_pixels=1, max_bytes=1, remote_only=True, timeout=1.0, cache_mb=0, retries=0
            ).model_dump()
        },
    )
    assert strict.job.inputs != plain.job.inputs
    assert strict.fingerprint == plain.fingerprint
    assert main(["run", "job.yaml", "--inline"]) == 0
    assert (
        main(["run", "job.yaml", "--inline", "--set", "inputs.max_pixels=1"]) == 0
    )  # the run is complete, and reads nothing


# --- jobs, manifests and models: refused before anything is written ---------------------------------------------------


@dataclass(frozen=True)
class Case:
    write: Write  # changes the folder of a valid job
    error: type[StylemillError]
    pattern: str  # of the message


def append_to_job(text: str) -> Write:
    def write(folder: Path) -> None:
        with (folder / "job.yaml").open("a") as file:
            file.write(text + "\n")

    return write


def job_file(content: bytes) -> Write:
    return lambda folder: (folder / "job.yaml").write_bytes(content) and None


def manifest_file(content: bytes) -> Write:
    return lambda folder: (folder / "pairs.parquet").write_bytes(content) and None


def replace_file(write: Write, name: str = "pairs.parquet") -> Write:
    """Another file in the place of the manifest, or of the file `name`."""

    def replace(folder: Path) -> None:
        (folder / name).unlink()
        write(folder / name)

    return replace


def job_with(line: str, **files: bytes) -> Write:
    """A job with `line` in the place of the line with its key, and with files beside it."""

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        path = folder / "job.yaml"
        key = line.partition(":")[0]
        path.write_text("\n".join([old for old in path.read_text().splitlines() if old.split(":")[0] != key] + [line]))

    return write


def both(first: Write, second: Write) -> Write:
    def write(folder: Path) -> None:
        first(folder)
        second(folder)

    return write


def table(**columns: object) -> Write:
    return lambda folder: pq.write_table(pa.table(columns), folder / "pairs.parquet")


def edit_manifest(edit: Callable[[bytes], bytes]) -> Write:
    def write(folder: Path) -> None:
        manifest_file(edit((folder / "pairs.parquet").read_bytes()))(folder)

    return write


def model_with(change: Write, more: str = "", **files: bytes) -> Write:
    """A changed copy of the model, with `more` keys of the job's `model`, and with files beside the job."""

    def write(folder: Path) -> None:
        lines = (folder / "job.yaml").read_text().splitlines()
        (model,) = [line.removeprefix("model: ") for line in lines if line.startswith("model: ")]
        shutil.copytree(model, folder / "model")
        change(folder / "model")
        job_with(f"model: {{name: ./model{more}}}", **files)(folder)

    return write


def weights(content: Callable[[bytes], bytes], rename: str | None = None) -> Write:
    """A model with other weights of the UNet, which `content` makes of the valid ones."""

    def change(folder: Path) -> None:
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(content(path.read_bytes()))
        if rename:
            path.rename(path.with_name(rename))

    return model_with(change)


def pickled(_: bytes) -> bytes:
    return pickle.dumps(Payload(Path("owned")))


def safetensors(header: object, data: bytes = b"") -> Callable[[bytes], bytes]:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda _: struct.pack("<Q", len(packed)) + packed + data


def aliases(levels: int, each: int, merge: bool = False) -> str:
    lines = ["a0: &a0 " + ("{x0: 1}" if merge else "[ha, ha]")]
    for level in range(1, levels):
        names = ", ".join([f"*a{level - 1}"] * each)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{names}]}}" if merge else f"[{names}]"))
    return "\n".join(lines)


MANY = "more than 10,000 values, with each alias counted"
NOT = "not a Parquet file, or a damaged one"
CUT = "truncated or not safetensors"

CORPUS: dict[str, Case] = {
    # YAML that expands, recurses, runs code, or is too large
    "billion laughs": Case(append_to_job(aliases(10, 10)), JobError, MANY),
    "quadratic aliases": Case(append_to_job("a: &a [" + "x, " * 150 + "]\nb: [" + "*a, " * 150 + "]"), JobError, MANY),
    "merged laughs": Case(append_to_job(aliases(9, 9, merge=True)), JobError, MANY),
    "list in itself": Case(append_to_job("name: &a [*a]"), JobError, "an alias refers to a value that contains it"),
    "keys in themselves": Case(append_to_job("name: &a {b: *a}"), JobError, "line 8.*an alias refers to a value"),
    "deep lists": Case(append_to_job("name: " + "[" * 700), JobError, "nested too deeply"),
    "deep keys": Case(append_to_job("name: " + "{a: " * 700), JobError, "nested too deeply"),
    "many values": Case(append_to_job("name: [" + "1," * 10_000 + "]"), JobError, MANY),
    "large job": Case(job_file(b"#" * (2 << 20)), JobError, "is larger than 1,048,576 bytes, the limit of a job file"),
    "endless job": Case(
        replace_file(lambda path: path.symlink_to("/dev/zero"), "job.yaml"),
        JobError,
        "larger than 1,048,576 bytes",
    ),
    "python object": Case(
        append_to_job("name: !!python/object/apply:os.mkdir [owned]"), JobError, "could not determine a constr"
    ),
    "python name": Case(append_to_job("name: !!python/name:os.system"), JobError, "could not determine a constructor"),
    "python module": Case(
        append_to_job("name: !!python/module:antigravity x"), JobError, "could not determine a constructor"
    ),
    "wrong tag": Case(append_to_job("name: !!bool x"), JobError, "does not fit its '!!' tag"),
    "map that is a list": Case(append_to_job("shards: !!map [1]"), JobError, "expected a mapping node"),
    "huge number": Case(append_to_job("max_failed_fraction: 0x" + "f" * 9999), JobError, "a number beyond 64 bits"),
    "huge decimal": Case(append_to_job("max_failed_fraction: " + "9" * 9999), JobError, "not valid YAML"),
    "half a character": Case(append_to_job('name: "\\ud800"'), JobError, "half of a surrogate pair"),
    "NUL in a job": Case(append_to_job("name: a\0b"), JobError, "special characters are not allowed"),
    "NUL in a path": Case(job_with('manifest: "a\\0b"'), JobError, "must be paths"),
    "code of a stranger": Case(append_to_job("trust_remote_code: true"), JobError, "unknown key 'trust_remote_code'"),
    "code of the model": Case(
        job_with("model: {name: m, trust_remote_code: true}"), JobError, "unknown key 'model.trust_remote_code'"
    ),
    "pickled weights allowed": Case(append_to_job("use_safetensors: false"), JobError, "unknown key 'use_safetensors'"),
    # limits that would not limit
    "misspelt limit": Case(
        append_to_job("inputs: {max_pixel: 9}"), JobError, "unknown key 'inputs.max_pixel'; did you mean 'max_p"
    ),
    "no limit of pixels": Case(
        append_to_job("inputs: {max_pixels: 1000000000}"), JobError, "inputs.max_pixels: expected less"
    ),
    "negative limit": Case(append_to_job("inputs: {max_bytes: -1}"), JobError, "inputs.max_bytes: expected greater"),
    "no deadline": Case(append_to_job("inputs: {timeout: .inf}"), JobError, "inputs.timeout: expected"),
    "deadline of nothing": Case(
        append_to_job("inputs: {timeout: 0}"), JobError, "inputs.timeout: expected greater than 0"
    ),
    "yes as text": Case(
        append_to_job('inputs: {remote_only: "yes"}'), JobError, "inputs.remote_only: expected true or false"
    ),
    "limits that are a list": Case(
        append_to_job("inputs: [1]"), JobError, "inputs: expected keys below it: remote_only, "
    ),
    # manifests that are no manifests, are damaged, or would block
    "manifest from the web": Case(
        job_with("manifest: http://169.254.169.254/m"), ManifestError, "only local manifests can be read"
    ),
    "pipe as manifest": Case(replace_file(os.mkfifo), ManifestError, "is not a regular file"),
    "device as manifest": Case(
        replace_file(lambda path: path.symlink_to("/dev/zero")), ManifestError, "is not a regular file"
    ),
    "manifest in itself": Case(replace_file(lambda path: path.symlink_to(path.name)), JobError, "must be paths"),
    "magic only": Case(manifest_file(b"PAR1PAR1"), ManifestError, NOT),
    "endless footer": Case(edit_manifest(lambda file: file[:-8] + b"\xff\xff\xff\x7fPAR1"), ManifestError, NOT),
    "negative footer": Case(edit_manifest(lambda file: file[:-8] + b"\xff\xff\xff\xffPAR1"), ManifestError, NOT),
    "empty footer": Case(edit_manifest(lambda file: file[:-8] + bytes(4) + b"PAR1"), ManifestError, NOT),
    "footer of noise": Case(
        edit_manifest(lambda file: b"PAR1" + b"\xff" * 99 + struct.pack("<I", 99) + b"PAR1"), ManifestError, NOT
    ),
    "deep footer": Case(
        edit_manifest(lambda file: b"PAR1" + b"\x1c" * 99_999 + struct.pack("<I", 99_999) + b"PAR1"),
        ManifestError,
        NOT,
    ),
    "encrypted": Case(edit_manifest(lambda file: file[:-4] + b"PARE"), ManifestError, NOT),
    "pickle as manifest": Case(manifest_file(pickle.dumps([1])), ManifestError, NOT),
    "archive as manifest": Case(manifest_file(archive()), ManifestError, NOT),
    "id that climbs": Case(
        table(pair_id=["../../x"], style=["good.png"]),
        ManifestError,
        "row 0, column 'pair_id': '../../x' could be a path",
    ),
    "column of ours": Case(
        table(sha256=["0"], style=["good.png"]), ManifestError, "column 'sha256' has the name of an output column"
    ),
    # weights that run code, or are no weights
    "pickled weights": Case(weights(pickled, "diffusion_pytorch_model.bin"), ModelError, "pickled only"),
    "pickle under a safe name": Case(weights(pickled), ModelError, CUT),
    "archive under a safe name": Case(weights(lambda _: archive()), ModelError, CUT),
    "endless header": Case(weights(lambda _: b"\xff" * 8 + b"{}"), ModelError, CUT),
    "header of a list": Case(weights(safetensors([1, 2])), ModelError, CUT),
    "deep header": Case(weights(safetensors(b"[" * 99_999)), ModelError, CUT),
    "tensors beyond the end": Case(
        weights(safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 10**15]}})),
        ModelError,
        CUT,
    ),
    "shape of text": Case(
        weights(safetensors({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, "y"]}})),
        ModelError,
        CUT,
    ),
    "checkpoint of a pickle": Case(
        job_with("model: ./m.ckpt", **{"m.ckpt": pickled(b"")}), ModelError, "is pickled, which can run code"
    ),
    "LoRA of a pickle": Case(
        model_with(lambda _: None, ", loras: [./l.bin]", **{"l.bin": pickled(b"")}),
        ModelError,
        "not a .safetensors file; other formats can run code",
    ),
    "ControlNet of a pickle": Case(
        both(
            table(content=["good.png"], style=["good.png"], control=["good.png"]),
            model_with(lambda _: None, ", controlnet: [./l.bin]", **{"l.bin": pickled(b"")}),
        ),
        ModelError,
        "controlnet '.*l.bin'",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CORPUS)
def test_hostile_jobs_manifests_and_models_are_refused(
    case: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = CORPUS[case]
    hostile.write(here)
    with pytest.raises(hostile.error, match=hostile.pattern):
        plan("job.yaml")
    for command in (["plan", "job.yaml"], ["run", "job.yaml", "--inline"]):
        assert main(command) == hostile.error.exit_code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("error: ") == 1
        assert "Traceback" not in printed.err
    assert not (here / "run").exists()
    assert not (here / "owned").exists()


def test_the_corpus_has_a_hundred_cases() -> None:
    assert len(IMAGES) + len(CORPUS) >= 100


def test_code_in_a_model_folder_never_runs(here: Path) -> None:
    """Neither a module beside the weights, nor one that a configuration names for transformers or diffusers."""

    def add_code(model: Path) -> None:
        code = f"import os\nos.mkdir({str(here / 'owned')!r})\nclass Evil: pass\n"
        for place in ("evil.py", "pipeline.py", "unet/evil.py", "text_encoder/evil.py", "tokenizer/evil.py"):
            (model / place).write_text(code)
        index = model / "model_index.json"
        values = json.loads(index.read_text()) if index.exists() else {}
        index.write_text(json.dumps({**values, "_class_name": ["evil", "Evil"], "unet": ["evil", "Evil"]}))
        auto_map = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        for part in ("unet", "text_encoder", "vae"):
            config = model / part / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": auto_map}))

    model_with(add_code)(here)
    assert main(["run", "job.yaml", "--inline"]) == 0
    assert not (here / "owned").exists()


def test_a_pickle_in_the_metadata_of_a_manifest_is_never_opened(here: Path) -> None:
    """Arrow once had extension types that were pickles. The column is carried with its storage type."""
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled(b"")}
    schema = pa.schema([pa.field("style", pa.string()), pa.field("note", pa.string(), metadata=metadata)])
    pq.write_table(pa.table({"style": ["good.png"], "note": ["x"]}, schema=schema), here / "pairs.parquet")
    assert main(["run", "job.yaml", "--inline"]) == 0
    assert not (here / "owned").exists()
