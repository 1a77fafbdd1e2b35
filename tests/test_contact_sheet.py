"""The contact sheet: which input and output images it shows, and where."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stylemill.errors import StorageError
from stylemill.images.encode import encode_image
from stylemill.manifest.read import Manifest, open_manifest
from stylemill.report.contact_sheet import GAP, LABEL, THUMB, write_contact_sheet
from stylemill.store import atomic
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record
from stylemill.store.run_file import create_run_folder

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 160, 30), (30, 30, 200), (214, 214, 214)


def one_colour(colour: tuple[int, int, int], size: int = 64) -> bytes:
    return encode_image(np.full((size, size, 3), colour, np.uint8), "png", 95)


def make_manifest(folder: Path, rows: list[dict[str, object]]) -> Manifest:
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return open_manifest(folder / "pairs.parquet")


def commit(paths: RunPaths, shard: int, first: int, stop: int, images: dict[int, bytes], generation: int = 0) -> Record:
    """Commit a shard with the output rows first..stop; `images` are the successful ones by output row."""
    data = None
    if images:
        file = paths.data(shard, generation)
        rows = {"row": list(images), "image": [{"bytes": image, "path": None} for image in images.values()]}
        pq.write_table(pa.table(rows), file)
        data = FileEntry(paths.relative(file), len(images), file.stat().st_size, "")
    return Record(shard, "", first, stop, "a", generation, len(images), stop - first - len(images), data)


def cell(sheet: Path, row: int, column: int) -> np.ndarray:
    """The pixels of one cell of the sheet. Row 0 and column 0 show the input images."""
    x, y = GAP + column * (THUMB + GAP), GAP + row * (THUMB + GAP + LABEL)
    return np.asarray(Image.open(sheet))[y : y + THUMB, x : x + THUMB].astype(int)


def shows(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixels[8:-8, 8:-8] - colour).max() < 16)


@pytest.fixture
def paths(tmp_path):
    paths = RunPaths(tmp_path / "run", 2)
    create_run_folder(paths)
    return paths


def test_contents_are_rows_and_styles_are_columns(paths, tmp_path):
    for name, colour in {"a.png": RED, "b.png": GREEN, "s.png": BLUE}.items():
        (tmp_path / name).write_bytes(one_colour(colour))
    rows = [{"content": c, "style": s} for c in ("a.png", "b.png") for s in ("s.png", "absent.png")]
    manifest = make_manifest(tmp_path, rows)
    records = [
        commit(paths, 0, 0, 2, {0: one_colour((0, 0, 0))}),
        commit(paths, 1, 2, 4, {2: one_colour((90, 90, 90)), 3: b"junk"}),
    ]
    sheet = write_contact_sheet(paths, manifest, records)
    assert sheet == paths.contact_sheet
    assert Image.open(sheet).size == (3 * (THUMB + GAP) + GAP, 3 * (THUMB + GAP + LABEL) + GAP)
    assert shows(cell(sheet, 0, 1), BLUE)
    assert shows(cell(sheet, 0, 2), GREY)  # the style image does not exist
    assert shows(cell(sheet, 1, 0), RED)
    assert shows(cell(sheet, 2, 0), GREEN)
    assert shows(cell(sheet, 1, 1), (0, 0, 0))
    assert 20 < cell(sheet, 1, 2).std() < 80  # hatched: the pair failed
    assert shows(cell(sheet, 2, 1), (90, 90, 90))
    assert shows(cell(sheet, 2, 2), GREY)  # the output image is damaged
    assert not any(paths.tmp.iterdir())


def test_pairs_without_content_are_grouped_by_prompt(paths, tmp_path):
    style = {"bytes": one_colour(BLUE), "path": None}
    rows = [{"content": None, "style": style, "prompt": prompt} for prompt in (None, "a fox", "a fox", "日本")]
    manifest = make_manifest(tmp_path, rows)
    sheet = write_contact_sheet(paths, manifest, [commit(paths, 0, 0, 4, {n: one_colour(RED) for n in range(4)})])
    assert Image.open(sheet).height == 4 * (THUMB + GAP + LABEL) + GAP
    assert shows(cell(sheet, 0, 1), BLUE)
    assert shows(cell(sheet, 1, 0), (255, 255, 255))
    assert all(shows(cell(sheet, row, 1), RED) for row in (1, 2, 3))


def test_several_styles_are_one_column(paths, tmp_path):
    for name, colour in {"r.png": RED, "g.png": GREEN, "b.png": BLUE}.items():
        (tmp_path / name).write_bytes(one_colour(colour))
    manifest = make_manifest(tmp_path, [{"style": ["r.png", "g.png", "b.png"]}, {"style": ["r.png"]}])
    sheet = write_contact_sheet(paths, manifest, [commit(paths, 0, 0, 2, {0: one_colour(RED), 1: one_colour(GREEN)})])
    header, half = cell(sheet, 0, 1), THUMB // 2
    for y, x, colour in ((0, 0, RED), (0, half, GREEN), (half, 0, BLUE)):
        assert shows(header[y : y + half, x : x + half], colour)
    assert shows(cell(sheet, 0, 2), RED)
    assert shows(cell(sheet, 1, 2), GREEN)


def test_only_committed_rows_are_drawn_and_no_more_are_read_than_fit(paths, tmp_path, monkeypatch):
    rows = [{"content": f"{c}.png", "style": f"{s}.png"} for c in range(100) for s in range(20)]
    manifest = make_manifest(tmp_path, rows)
    rows_read: list[int] = []
    original = Manifest.rows

    def record_rows(self, start=0, stop=None, occurrences=None):
        for row in original(self, start, stop, occurrences):
            rows_read.append(row.manifest_row)
            yield row

    monkeypatch.setattr(Manifest, "rows", record_rows)
    record = commit(paths, 1, 1000, 2000, {row: one_colour(RED) for row in range(1000, 1100)})
    sheet = write_contact_sheet(paths, manifest, [record], limit=(3, 2))
    assert Image.open(sheet).size == (3 * (THUMB + GAP) + GAP, 4 * (THUMB + GAP + LABEL) + GAP)
    assert all(shows(cell(sheet, row, column), RED) for row in (1, 2, 3) for column in (1, 2))
    assert rows_read == list(range(1000, 1042))  # none after the row of the last cell


def test_pairs_without_common_images_leave_cells_empty(paths, tmp_path):
    manifest = make_manifest(tmp_path, [{"content": f"{n}.png", "style": f"{n}.png"} for n in range(500)])
    sheet = write_contact_sheet(
        paths, manifest, [commit(paths, 0, 0, 500, {0: one_colour(RED), 1: one_colour(BLUE)})], (2, 2)
    )
    assert shows(cell(sheet, 1, 1), RED)
    assert shows(cell(sheet, 2, 2), BLUE)
    assert shows(cell(sheet, 1, 2), (255, 255, 255))


def test_a_later_generation_fills_a_failed_cell(paths, tmp_path):
    manifest = make_manifest(tmp_path, [{"style": "a.png"}, {"style": "b.png"}])
    first, second = (
        commit(paths, 0, 0, 2, {0: one_colour(RED)}),
        commit(paths, 0, 0, 2, {1: one_colour(BLUE)}, generation=1),
    )
    sheet = write_contact_sheet(paths, manifest, [first, second])
    assert shows(cell(sheet, 1, 1), RED)
    assert shows(cell(sheet, 1, 2), BLUE)


def test_each_cell_shows_its_own_pair_when_a_pair_has_several_images(paths, tmp_path):
    rows = [{"content": f"{c}.png", "style": f"{s}.png"} for c in "ab" for s in "st"]
    manifest = make_manifest(tmp_path, rows).with_images_per_pair(3)
    colours = {(pair, image): (60 * pair, 200 - 60 * pair, 80 * image) for pair in range(4) for image in range(3)}
    images = {3 * pair + image: one_colour(colour) for (pair, image), colour in colours.items()}
    records = [  # the first shard ends inside the third pair
        commit(paths, 0, 0, 8, {row: images[row] for row in range(8)}),
        commit(paths, 1, 8, 12, {row: images[row] for row in range(8, 12)}),
    ]
    sheet = write_contact_sheet(paths, manifest, records)
    assert Image.open(sheet).size == (3 * (THUMB + GAP) + GAP, 3 * (THUMB + GAP + LABEL) + GAP)
    for pair, (row, column) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)]):
        assert shows(cell(sheet, row, column), colours[pair, 0])  # the first image of each pair


def test_no_sheet_is_written_when_nothing_is_committed(paths, tmp_path):
    assert write_contact_sheet(paths, make_manifest(tmp_path, [{"style": "a.png"}]), []) is None
    assert not paths.contact_sheet.exists()


def test_a_damaged_data_file_is_grey_and_a_failed_shard_is_hatched(paths, tmp_path):
    manifest = make_manifest(tmp_path, [{"style": "a.png"}, {"style": "b.png"}])
    damaged, failed = commit(paths, 0, 0, 1, {0: one_colour(RED)}), commit(paths, 1, 1, 2, {})
    paths.data(0).write_bytes(b"PAR1 and nothing more")
    sheet = write_contact_sheet(paths, manifest, [damaged, failed])
    assert shows(cell(sheet, 1, 1), GREY)
    assert 20 < cell(sheet, 1, 2).std() < 80


def test_the_old_sheet_is_kept_when_the_new_one_cannot_be_written(paths, tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path, [{"style": "a.png"}])
    records = [commit(paths, 0, 0, 1, {0: one_colour(RED)})]
    paths.contact_sheet.write_bytes(b"old")

    def full(*_args):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", full)
        with pytest.raises(StorageError, match="disk is full"):
            write_contact_sheet(paths, manifest, records)
    assert paths.contact_sheet.read_bytes() == b"old"
    assert not any(paths.tmp.iterdir())
    assert write_contact_sheet(paths, manifest, records) == paths.contact_sheet
    assert shows(cell(paths.contact_sheet, 1, 1), RED)
