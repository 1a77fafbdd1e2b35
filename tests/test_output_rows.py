"""Output rows: each has in columns what made its image, and where its input images are."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import stylemill
from stylemill.config.job import Job
from stylemill.manifest import ImageRef, Row

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    for number, name in enumerate(("c.png", "s.png")):
        (folder / name).write_bytes(png(number))
    return folder


def output_rows(folder: Path, model: Path, columns: dict[str, Any], **job: Any) -> list[dict[str, Any]]:
    """Run a job over a manifest with `columns` in `folder`, whose rows must all succeed; its output rows."""
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    settings = {
        "name": "rows",
        "manifest": str(folder / "pairs.parquet"),
        "output": str(folder.parent / "run"),
        "model": str(model),
        "image": {"size": 64},
        "sampling": {"steps": 2},
        **job,
    }
    result = stylemill.run(Job.parse(settings), inline=True, quiet=True)
    assert result.exit_code == 0, result.describe()
    return pq.read_table(result.summary.paths.data_folder).sort_by("row").to_pylist()  # type: ignore[no-any-return]


def test_prompts_and_the_content_weight_of_a_row_are_columns(folder: Path, folder_of_images: Path) -> None:
    columns = {
        "content": ["c.png", "c.png", None],
        "style": ["s.png"] * 3,
        "prompt": [None, "a boat", ""],
        "negative_prompt": [None, "blurry", None],
        "content_weight": [None, 0.0, 0.5],
        "label": [1, 2, 3],
    }
    rows = output_rows(
        folder_of_images, folder, columns, images_per_pair=3, sampling={"steps": 2, "content_weight": 0.3}
    )
    assert [row["prompt"] for row in rows] == [None] * 3 + ["a boat"] * 3 + [""] * 3
    assert [row["negative_prompt"] for row in rows] == [None] * 3 + ["blurry"] * 3 + [None] * 3
    assert [row["content_weight"] for row in rows] == [0.3] * 3 + [0.0] * 3 + [0.5] * 3
    assert [row["label"] for row in rows] == [1] * 3 + [2] * 3 + [3] * 3, "carried columns follow"
    for row in rows:
        assert not {"prompt", "negative_prompt", "content_weight"} & json.loads(row["settings"]).keys()


def test_base_is_the_folder_of_relative_paths(folder: Path, folder_of_images: Path) -> None:
    embedded, named = {"bytes": png(2), "path": None}, {"bytes": png(3), "path": "c.png"}

    def at(path: object) -> dict[str, Any]:
        return {"bytes": None, "path": str(path)}

    contents = [at("c.png"), named, named, at(folder_of_images / "c.png"), None]
    styles = [embedded, at("s.png"), embedded, embedded, at("../manifests/s.png")]
    columns = {"content": pa.array(contents, IMAGE), "style": pa.array(styles, IMAGE)}
    rows = output_rows(folder_of_images, folder, columns)
    base = str(folder_of_images)
    assert [row["base"] for row in rows] == [base, base, None, None, base]
    for row in (rows[0], rows[4]):  # every relative path that is not the name of an embedded image leads to a file
        assert any((Path(row["base"]) / str(row[name])).is_file() for name in ("content", "style"))


@pytest.mark.parametrize(
    ("images", "relative"),
    [
        ({"content": ImageRef("c.png")}, True),
        ({"content": ImageRef("https://host/c.png")}, False),
        ({"content": ImageRef("s3://bucket/c.png"), "controls": (ImageRef("edges.png"),)}, True),
        ({"content_mask": "mask.png", "style_masks": ("/masks/mask.png",)}, True),
        ({"content": ImageRef("c.png", b"bytes")}, False),
        ({}, False),
    ],
)
def test_a_row_has_relative_paths_if_any_of_its_files_is_relative(images: dict[str, Any], relative: bool) -> None:
    row = Row(0, 0, "a", **{"content": None, "styles": (ImageRef("/styles/s.png"),), **images})
    assert row.has_relative_paths == relative


def test_base_is_absolute_also_for_a_job_with_a_relative_manifest(
    folder: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_of_images)
    columns = {"content": ["c.png"], "style": ["s.png"]}
    (row,) = output_rows(folder_of_images, folder, columns, manifest="pairs.parquet")
    assert row["base"] == str(folder_of_images)
