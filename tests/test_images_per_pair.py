"""`images_per_pair`: several images of each manifest row, each in an output row of its own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import stylemill
from stylemill.demo.untrained import write_demo_model
from stylemill.manifest import open_manifest
from stylemill.report.contact_sheet import GAP, LABEL, THUMB


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "s"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    table = pa.table(
        {
            "pair_id": ["a", "b", "c"],
            "content": ["a.png", "b.png", None],
            "style": ["s.png"] * 3,
            "seed": [None, 7, None],
            "label": [1, 2, 3],
        }
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def test_any_range_of_output_rows_equals_that_part_of_all_rows(manifest: Path):
    opened = open_manifest(manifest).with_images_per_pair(3)
    rows = list(opened.output_rows(0, opened.num_output_rows))
    assert [row.pair_id for row in rows] == ["a.0", "a.1", "a.2", "b.0", "b.1", "b.2", "c.0", "c.1", "c.2"]
    assert [row.output_row for row in rows] == list(range(9))
    assert [row.seed for row in rows] == [None] * 3 + [7, 8, 9] + [None] * 3
    for start in range(9):
        for stop in range(start + 1, 10):
            assert list(opened.output_rows(start, stop)) == rows[start:stop]
            labels = opened.carried_output_rows(start, stop)["label"].to_pylist()
            assert labels == [1, 1, 1, 2, 2, 2, 3, 3, 3][start:stop]


def test_images_of_a_pair_differ_and_the_first_equals_the_only_one_of_another_run(manifest: Path, tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(
        f"manifest: pairs.parquet\nmodel: {write_demo_model(tmp_path / 'demo')}\noutput: many\nimages_per_pair: 2\n"
        "sampling: {steps: 2}\nimage: {size: 64}\nshards: {pairs_per_shard: 6}\ncluster: {micro_batch: 1}\n"
    )
    many = _rows(stylemill.run(job, inline=True, quiet=True))
    one = _rows(
        stylemill.run(job, {"images_per_pair": 1, "output": str(tmp_path / "one")}, inline=True, quiet=True),
    )
    assert list(many) == ["a.0", "a.1", "b.0", "b.1", "c.0", "c.1"]
    assert [row["seed"] for row in many.values()] == [0, 1, 7, 8, 0, 1]
    assert [row["label"] for row in many.values()] == [1, 1, 2, 2, 3, 3]
    assert len({row["sha256"] for row in many.values()}) == 6
    assert [many[f"{name}.0"]["sha256"] for name in "abc"] == [one[name]["sha256"] for name in "abc"]
    assert stylemill.verify(tmp_path / "many", deep=True).ok


def test_the_contact_sheet_of_a_run_shows_the_first_image_of_each_pair_in_its_own_cell(manifest: Path, tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(
        f"manifest: pairs.parquet\nmodel: {write_demo_model(tmp_path / 'demo')}\noutput: many\nimages_per_pair: 3\n"
        "sampling: {steps: 2}\nimage: {size: 64}\nshards: {pairs_per_shard: 4}\n"  # shards end within pairs
    )
    result = stylemill.run(job, inline=True, quiet=True)
    table = pq.read_table(result.summary.paths.data_folder)
    images = {row["pair_id"]: Image.open(io.BytesIO(row["image"]["bytes"])) for row in table.to_pylist()}
    thumbnails = {name: np.asarray(image.resize((THUMB, THUMB))).astype(int) for name, image in images.items()}
    sheet = np.asarray(Image.open(tmp_path / "many" / "contact-sheet.jpg")).astype(int)
    shown = []
    for row in (1, 2, 3):  # of the sheet: a, b, and the pair without content; column 1 is the only style
        top, left = GAP + row * (THUMB + GAP + LABEL), GAP + THUMB + GAP
        cell = sheet[top : top + THUMB, left : left + THUMB]
        shown.append(min(thumbnails, key=lambda name: np.abs(thumbnails[name] - cell).mean()))
    assert len(images) == 9
    assert shown == ["a.0", "b.0", "c.0"]


def _rows(result: stylemill.execution.driver.RunResult) -> dict[str, dict[str, object]]:
    assert result.exit_code == 0
    table = pa.concat_tables(pq.read_table(path) for path in sorted(result.summary.paths.data_folder.iterdir()))
    return {row["pair_id"]: row for row in table.drop_columns("image").to_pylist()}


def test_the_largest_seeds_are_sampled_and_recorded(manifest: Path, tmp_path: Path):
    """The seed of a row starts again from 0 beyond its largest value. That of the job may not go beyond it."""
    largest = 2**63 - 1
    table = pq.read_table(manifest)
    table = table.set_column(table.column_names.index("seed"), "seed", [pa.array([None, largest, None], pa.int64())])
    pq.write_table(table, manifest)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"manifest: pairs.parquet\nmodel: {write_demo_model(tmp_path / 'demo')}\noutput: run\nimages_per_pair: 2\n"
        f"sampling: {{steps: 1, seed: {largest - 1}}}\nimage: {{size: 64}}\n"
    )
    result = stylemill.run(job, inline=True, quiet=True)
    assert result.exit_code == 0
    seeds = [row["seed"] for row in _rows(result).values()]
    assert seeds == [largest - 1, largest, largest, 0, largest - 1, largest]
