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
from stylemill.store import atomic as publish
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record
from stylemill.store.run_file import create_run_folder

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 160, 30), (30, 30, 200), (214, 214, 214)


def plain(colour: tuple[int, int, int], size: int = 64) -> bytes:
    return encode_image(np.full((size, size, 3), colour, np.uint8), "png", 95)


def make_manifest(folder: Path, rows: list[dict[str, object]]) -> Manifest:
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return open_manifest(folder / "pairs.parquet")


def commit(paths: RunPaths, shard: int, first: int, stop: int, images: dict[int, bytes], generation: int = 0) -> Record:
    """A committed shard whose data file holds `images` by row."""
    data = None
    if images:
        file = paths.data(shard, generation)
        rows = {"row": list(images), "image": [{"bytes": data, "path": None} for data in images.values()]}
        pq.write_table(pa.table(rows), file)
        data = FileEntry(paths.relative(file), len(images), file.stat().st_size, "")
    return Record(shard, "", first, stop, "a", generation, len(images), stop - first - len(images), data)


def cell(sheet: Path, row: int, column: int) -> np.ndarray:
    """The pixels of one cell; row 0 and column 0 show the inputs."""
    x, y = GAP + column * (THUMB + GAP), GAP + row * (THUMB + GAP + LABEL)
    return np.asarray(Image.open(sheet))[y : y + THUMB, x : x + THUMB].astype(int)


def shows(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixels[8:-8, 8:-8] - colour).max() < 16)


@pytest.fixture
def paths(tmp_path):
    paths = RunPaths(tmp_path / "run", 2)
    create_run_folder(paths)
    return paths


def test_contents_down_styles_across(paths, tmp_path):
    for name, colour in {"a.png": RED, "b.png": GREEN, "s.png": BLUE}.items():
        (tmp_path / name).write_bytes(plain(colour))
    rows = [{"content": c, "style": s} for c in ("a.png", "b.png") for s in ("s.png", "absent.png")]
    manifest = make_manifest(tmp_path, rows)
    records = [
        commit(paths, 0, 0, 2, {0: plain((0, 0, 0))}),
        commit(paths, 1, 2, 4, {2: plain((90, 90, 90)), 3: b"junk"}),
    ]
    sheet = write_contact_sheet(paths, manifest, records)
    assert sheet == paths.contact_sheet
    assert Image.open(sheet).size == (3 * (THUMB + GAP) + GAP, 3 * (THUMB + GAP + LABEL) + GAP)
    assert shows(cell(sheet, 0, 1), BLUE)
    assert shows(cell(sheet, 0, 2), GREY)  # an input that is not there
    assert shows(cell(sheet, 1, 0), RED)
    assert shows(cell(sheet, 2, 0), GREEN)
    assert shows(cell(sheet, 1, 1), (0, 0, 0))
    assert 20 < cell(sheet, 1, 2).std() < 80  # hatched: the pair failed
    assert shows(cell(sheet, 2, 1), (90, 90, 90))
    assert shows(cell(sheet, 2, 2), GREY)  # a damaged image
    assert not any(paths.tmp.iterdir())


def test_rows_without_content_stand_by_their_prompt(paths, tmp_path):
    style = {"bytes": plain(BLUE), "path": None}
    rows = [{"content": None, "style": style, "prompt": prompt} for prompt in (None, "a fox", "a fox", "日本")]
    manifest = make_manifest(tmp_path, rows)
    sheet = write_contact_sheet(paths, manifest, [commit(paths, 0, 0, 4, {n: plain(RED) for n in range(4)})])
    assert Image.open(sheet).height == 4 * (THUMB + GAP + LABEL) + GAP
    assert shows(cell(sheet, 0, 1), BLUE)
    assert shows(cell(sheet, 1, 0), (255, 255, 255))
    assert all(shows(cell(sheet, row, 1), RED) for row in (1, 2, 3))


def test_several_styles_are_one_column(paths, tmp_path):
    for name, colour in {"r.png": RED, "g.png": GREEN, "b.png": BLUE}.items():
        (tmp_path / name).write_bytes(plain(colour))
    manifest = make_manifest(tmp_path, [{"style": ["r.png", "g.png", "b.png"]}, {"style": ["r.png"]}])
    sheet = write_contact_sheet(paths, manifest, [commit(paths, 0, 0, 2, {0: plain(RED), 1: plain(GREEN)})])
    header, half = cell(sheet, 0, 1), THUMB // 2
    for y, x, colour in ((0, 0, RED), (0, half, GREEN), (half, 0, BLUE)):
        assert shows(header[y : y + half, x : x + half], colour)
    assert shows(cell(sheet, 0, 2), RED)
    assert shows(cell(sheet, 1, 2), GREEN)


def test_only_committed_rows_are_drawn_and_only_as_many_as_fit(paths, tmp_path, monkeypatch):
    rows = [{"content": f"{c}.png", "style": f"{s}.png"} for c in range(100) for s in range(20)]
    manifest = make_manifest(tmp_path, rows)
    seen: list[int] = []
    read = Manifest.rows

    def counted(self, start=0, stop=None, occurrences=None):
        for row in read(self, start, stop, occurrences):
            seen.append(row.manifest_row)
            yield row

    monkeypatch.setattr(Manifest, "rows", counted)
    record = commit(paths, 1, 1000, 2000, {row: plain(RED) for row in range(1000, 1100)})
    sheet = write_contact_sheet(paths, manifest, [record], limit=(3, 2))
    assert Image.open(sheet).size == (3 * (THUMB + GAP) + GAP, 4 * (THUMB + GAP + LABEL) + GAP)
    assert all(shows(cell(sheet, row, column), RED) for row in (1, 2, 3) for column in (1, 2))
    assert seen == list(range(1000, 1042))  # not one row beyond the last cell


def test_pairs_that_fill_no_grid_end_the_search(paths, tmp_path):
    manifest = make_manifest(tmp_path, [{"content": f"{n}.png", "style": f"{n}.png"} for n in range(500)])
    sheet = write_contact_sheet(paths, manifest, [commit(paths, 0, 0, 500, {0: plain(RED), 1: plain(BLUE)})], (2, 2))
    assert shows(cell(sheet, 1, 1), RED)
    assert shows(cell(sheet, 2, 2), BLUE)
    assert shows(cell(sheet, 1, 2), (255, 255, 255))


def test_a_later_generation_fills_a_failed_cell(paths, tmp_path):
    manifest = make_manifest(tmp_path, [{"style": "a.png"}, {"style": "b.png"}])
    first, second = commit(paths, 0, 0, 2, {0: plain(RED)}), commit(paths, 0, 0, 2, {1: plain(BLUE)}, generation=1)
    sheet = write_contact_sheet(paths, manifest, [first, second])
    assert shows(cell(sheet, 1, 1), RED)
    assert shows(cell(sheet, 1, 2), BLUE)


def test_nothing_committed_is_no_sheet(paths, tmp_path):
    assert write_contact_sheet(paths, make_manifest(tmp_path, [{"style": "a.png"}]), []) is None
    assert not paths.contact_sheet.exists()


def test_damaged_data_is_grey_and_all_failed_is_hatched(paths, tmp_path):
    manifest = make_manifest(tmp_path, [{"style": "a.png"}, {"style": "b.png"}])
    damaged, failed = commit(paths, 0, 0, 1, {0: plain(RED)}), commit(paths, 1, 1, 2, {})
    paths.data(0).write_bytes(b"PAR1 and nothing more")
    sheet = write_contact_sheet(paths, manifest, [damaged, failed])
    assert shows(cell(sheet, 1, 1), GREY)
    assert 20 < cell(sheet, 1, 2).std() < 80


def test_the_old_sheet_stands_until_the_new_one_is_whole(paths, tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path, [{"style": "a.png"}])
    records = [commit(paths, 0, 0, 1, {0: plain(RED)})]
    paths.contact_sheet.write_bytes(b"old")

    def full(*_args):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(publish.os, "replace", full)
        with pytest.raises(StorageError, match="disk is full"):
            write_contact_sheet(paths, manifest, records)
    assert paths.contact_sheet.read_bytes() == b"old"
    assert not any(paths.tmp.iterdir())
    assert write_contact_sheet(paths, manifest, records) == paths.contact_sheet
    assert shows(cell(paths.contact_sheet, 1, 1), RED)
