"""Fuzzing: any bytes are read, or raise an error of stylemill; they never crash, hang, or are read as something else.

Each test takes a valid file, and hypothesis removes, inserts and overwrites some of its bytes. A reader processes more
of such a file than of noise.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stylemill.config.inputs import InputSettings
from stylemill.config.job import Job
from stylemill.errors import DamagedError, ImageError, JobError, ManifestError
from stylemill.images.masks import load_labels
from stylemill.images.read import load_image
from stylemill.manifest import open_manifest, validate_manifest
from stylemill.store.checkpoints import load, save_inputs, save_progress
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record
from stylemill.store.run_file import create_run_folder

pytestmark = pytest.mark.slow

bounded = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
Damage = Callable[[bytes], bytes]
FEW_BYTES = st.binary(max_size=4)


@st.composite
def damages(draw: st.DrawFn, pieces: st.SearchStrategy[bytes] = FEW_BYTES) -> Damage:
    """Edits at a few places, given as fractions of the length: some bytes are removed and others inserted."""
    edits = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), pieces), min_size=1, max_size=6))
    kept = draw(st.floats(0, 1)) if draw(st.integers(0, 4)) == 0 else 1.0

    def damage(data: bytes) -> bytes:
        for place, removed, inserted in edits:
            index = int(place * len(data))
            data = data[:index] + inserted + data[index + removed :]
        return data[: int(kept * len(data))]

    return damage


# --- images -----------------------------------------------------------------------------------------------------------


def _images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    files = {}
    for kind, mode in (
        *(("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGBA")),
        *(("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "F"), ("BMP", "RGB"), ("PPM", "RGB"), ("JPEG2000", "RGB")),
        *(("AVIF", "RGB"), ("QOI", "RGB")),
    ):
        if kind in Image.SAVE:
            buffer = io.BytesIO()
            (Image.new(mode, (32, 24), 7) if mode in ("I;16", "F") else image.convert(mode)).save(buffer, kind)
            files[f"{kind} {mode}"] = buffer.getvalue()
    return files


IMAGES = _images()
SMALL = InputSettings(max_pixels=1 << 20)  # 300 images with headers of huge sizes would take long


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it reads
@bounded
@given(name=st.sampled_from(sorted(IMAGES)), damage=damages())
def test_changed_bytes_of_an_image_are_read_or_refused(name: str, damage: Damage) -> None:
    data, messages = damage(IMAGES[name]), []
    for fit in ("crop", "keep"):
        try:
            image = load_image("a.img", data, ".", (16, 16), fit, 8, SMALL)
        except ImageError as error:
            messages.append(str(error))
        else:
            assert (image.pixels.shape[2], image.pixels.dtype) == (3, np.uint8)
            assert max(image.pixels.shape[:2]) <= 16
            assert image.file_sha256 == hashlib.sha256(data).hexdigest()
    try:
        labels = load_labels("a.img", data, ".", (16, 16), "crop", inputs=SMALL)
        assert labels.shape == (16, 16)
    except ImageError as error:
        messages.append(str(error))
    assert all(message.startswith("a.img: ") for message in messages), messages


# --- manifests --------------------------------------------------------------------------------------------------------


def _manifest() -> bytes:
    rows = 40
    table = {
        "pair_id": [f"p{row}" for row in range(rows)],
        "content": [{"bytes": bytes([row]) * 9, "path": None} for row in range(rows)],
        "style": [["s.png", f"{row % 3}.png"] for row in range(rows)],
        "seed": [row if row % 3 else None for row in range(rows)],
        "content_weight": [row / 7 for row in range(rows)],
        "note": [{"a": [row]} for row in range(rows)],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, row_group_size=16)
    return buffer.getvalue()


MANIFEST = _manifest()


@bounded
@given(damage=damages(), in_footer=st.booleans())
def test_changed_bytes_of_a_manifest_are_read_or_refused(tmp_path: Path, damage: Damage, in_footer: bool) -> None:
    footer = len(MANIFEST) - 8 - int.from_bytes(MANIFEST[-8:-4], "little")
    data = MANIFEST[:footer] + damage(MANIFEST[footer:-8]) + MANIFEST[-8:] if in_footer else damage(MANIFEST)
    path = tmp_path / "pairs.parquet"
    path.write_bytes(data)
    try:
        manifest = open_manifest(path)
        rows = list(manifest.rows())
        carried = manifest.carried_rows()
        validate_manifest(path, check_files=False)
    except ManifestError:
        return
    assert len(rows) == manifest.num_rows
    assert carried.num_rows in (0, manifest.num_rows)  # 0: no column is carried


# --- jobs -------------------------------------------------------------------------------------------------------------

JOB = b"""manifest: pairs.parquet
output: run
model: {name: m, layers: 10-15, loras: [{name: l, scale: 0.5}]}
sampling: {steps: 2, learning_rate: 1e-2, adain: true}
image: &size
  size: [64, 128]
inputs: {remote_only: true, timeout: 1.5}
cluster: {workers: auto}
"""
YAML_PIECES = st.one_of(
    st.binary(max_size=4),
    st.sampled_from(
        [
            *(
                b"*size",
                b"&size ",
                b"<<: *size",
                b"!!set ",
                b"!!int ",
                b"!!bool ",
                b"!!timestamp ",
                b"!!binary ",
                b"!!map ",
            ),
            *(
                b"!!python/name:os.system",
                b"- ",
                b"? ",
                b": ",
                b"{",
                b"}",
                b"[",
                b"]",
                b"'",
                b'"',
                b"|\n",
                b"\t",
                b"\n---\n",
            ),
            *(
                b"~",
                b"=",
                b"1:30",
                b"0x1f",
                b".inf",
                b".nan",
                b"1e999",
                b"2001-99-99",
                b"\\ud800",
                b"\\x00",
                b"%YAML 9.9\n",
            ),
        ]
    ),
)


@bounded
@given(damage=damages(YAML_PIECES))
def test_changed_bytes_of_a_job_are_read_or_refused(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(damage(JOB))
    try:
        job = Job.load(path)
    except JobError:
        return
    assert Job.parse(job.model_dump()) == job  # a job that is accepted can be stored with the run and read again


# --- records and checkpoints ------------------------------------------------------------------------------------------

RECORD = Record(
    shard=3,
    fingerprint="f" * 64,
    first_row=6,
    stop_row=8,
    attempt="a1",
    rows_ok=1,
    rows_failed=1,
    data=FileEntry("data/train-00003-of-00005.parquet", 1, 99, "0" * 64),
    failures=FileEntry("failures/00003.parquet", 1, 77, "1" * 64),
    failed_by_class={"ImageError": 1},
    numerics={"torch": "2.13.0", "threads": 1},
    timings={"read": 0.5},
).to_bytes()


@bounded
@given(damage=damages(st.one_of(st.binary(max_size=4), st.sampled_from([b"null", b"1e999", b"[", b"}", b'"', b"-1"]))))
def test_a_changed_record_is_damaged(damage: Damage) -> None:
    data = damage(RECORD)
    if data == RECORD:
        assert Record.from_bytes(data).shard == 3
        return
    with pytest.raises(DamagedError):
        Record.from_bytes(data)


LATENTS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a valid checkpoint, by name."""
    paths = RunPaths(tmp_path_factory.mktemp("run"), 1)
    create_run_folder(paths)
    inputs = save_inputs(paths, 0, "a1", {"clean": LATENTS}, {"fingerprint": "f", "items": []})
    save_progress(paths, 0, 5, "a1", {"latents": LATENTS + 1}, {"fingerprint": "f"}, inputs)
    return {path.name: path.read_bytes() for path in paths.checkpoints(0).iterdir()}


@bounded
@given(damage=damages(), which=st.sampled_from(["inputs", "progress"]), renamed=st.booleans())
def test_a_changed_checkpoint_is_not_loaded(
    tmp_path: Path,
    checkpoint: dict[str, bytes],
    damage: Damage,
    which: str,
    renamed: bool,
) -> None:
    """The digest in a file's name detects a change. Where the digest was changed too, the content of the file does."""
    paths = RunPaths(tmp_path / uuid4().hex, 1)
    for folder in (paths.checkpoints(0), paths.tmp):
        folder.mkdir(parents=True)
    changed = False
    for name, valid in checkpoint.items():
        data = damage(valid) if name.startswith(which) else valid
        changed |= data != valid
        if data != valid and renamed:
            digest = hashlib.sha256(data).hexdigest()[:32]
            name = f"{name.rpartition('-')[0]}-{digest}.safetensors"
        (paths.checkpoints(0) / name).write_bytes(data)
    loaded = load(paths, 0, {"fingerprint": "f"})
    if not changed:
        assert loaded is not None
    elif not renamed or which == "inputs":  # the progress file has its name
        assert loaded is None
    if loaded is not None:
        assert (loaded.step, loaded.meta["fingerprint"], loaded.inputs_name in checkpoint) == (5, "f", True)
        assert np.array_equal(loaded.inputs["clean"], LATENTS)
