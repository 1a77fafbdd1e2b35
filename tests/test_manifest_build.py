"""Building manifests: sources, pairings, tile order, ids and paths, and what a failed build leaves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stylemill.errors import ManifestError
from stylemill.manifest import build_manifest, open_manifest, validate_manifest
from stylemill.manifest.image_names import unique_names
from stylemill.manifest.sources import IMAGE_EXTENSIONS, find_images
from stylemill.manifest.tile_order import TileOrder

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a folder of empty files, since building opens no image."""

    def make(name: str, *files: str) -> Path:
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / name

    return make


def table(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(Path(row["content"]).stem, Path(row["style"]).stem) for row in table(path)]


@given(
    contents=st.integers(1, 40),
    styles=st.integers(1, 40),
    rows=st.integers(1, 100),
    tile=st.none() | st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_a_product_has_each_pair_once_with_any_tile(
    contents: int, styles: int, rows: int, tile: tuple[int, int] | None
) -> None:
    order = TileOrder.of(contents, styles, rows, tile)
    ordered = [order.pair(position) for position in range(len(order))]
    assert sorted(ordered) == [(content, style) for content in range(contents) for style in range(styles)]


@given(contents=st.integers(1, 60), styles=st.integers(1, 60), start=st.integers(0, 3600))
def test_any_64_neighbouring_pairs_share_images(contents: int, styles: int, start: int) -> None:
    order = TileOrder.of(contents, styles, 64)
    stop = min(start + 64, len(order))
    neighbours = [order.pair(position) for position in range(start, stop)]
    images = len({content for content, _ in neighbours}) + len({style for _, style in neighbours})
    # The best tile of 64 pairs has 16 images, or those of a strip where a side is shorter. A start within a tile, bands
    # narrower than 8 and their borders add some; a nested loop over 64 styles has 65.
    short = min(contents, styles, 8)
    assert images <= short + math.ceil(64 / short) + 12


@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize(("contents", "styles"), [(1, 30), (2, 20), (3, 6), (5, 5), (5, 20), (7, 20)])
def test_few_contents_share_as_well_as_they_can(contents: int, styles: int, tile: tuple[int, int] | None) -> None:
    """With fewer contents than a tile has, every range has all contents and hardly more styles than it needs."""
    order = TileOrder.of(contents, styles, 64, tile)
    ordered = [order.pair(position) for position in range(len(order))]
    for size in range(contents, len(order) + 1):
        for start in range(len(order) - size + 1):
            assert len({style for _, style in ordered[start : start + size]}) <= math.ceil(size / contents) + 1


def test_a_row_group_is_a_tile_where_it_fits(folder: Folder, tmp_path: Path) -> None:
    contents = folder("contents", *(f"c{index}.png" for index in range(8)))
    styles = folder("styles", *(f"s{index}.png" for index in range(6)))
    out = tmp_path / "pairs.parquet"
    assert build_manifest(out, contents, styles, tile=(4, 2)) == 48
    all_pairs = pairs(out)
    starts = open_manifest(out).group_starts
    assert starts == (0, 8, 16, 24, 32, 40, 48)
    for start, stop in pairwise(starts):
        group = all_pairs[start:stop]
        assert len({content for content, _ in group}) == 4
        assert len({style for _, style in group}) == 2
    assert len(set(all_pairs)) == 48


def test_the_default_row_group_is_a_tile_of_64(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", *(f"{index}.png" for index in range(10)))
    out = tmp_path / "pairs.parquet"
    assert build_manifest(out, images, images) == 100
    assert open_manifest(out).group_starts == (0, 64, 100)
    build_manifest(out, images, images, rows_per_group=30, force=True)
    assert open_manifest(out).group_starts == (0, 30, 60, 90, 100)


def test_the_same_sources_give_the_same_bytes(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", *(f"{index}.png" for index in range(5)))
    digests = set()
    for name in ("one.parquet", "two.parquet"):
        build_manifest(tmp_path / name, images, images, pairing="sample", samples=7)
        digests.add(open_manifest(tmp_path / name).sha256())
    assert len(digests) == 1


def test_zip_keeps_the_order_of_lists_and_numbers_repeated_pairs(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", "a.png", "b.png", "x.png")
    out = tmp_path / "pairs.parquet"
    contents = [images / name for name in ("b.png", "a.png", "b.png")]
    build_manifest(out, contents, [images / "x.png"] * 3, pairing="zip")
    assert [row["pair_id"] for row in table(out)] == ["b__x", "a__x", "b__x__2"]
    with pytest.raises(ManifestError, match=r"3 contents and 1 style$"):
        build_manifest(out, contents, images / "x.png", pairing="zip", force=True)


def test_samples_are_different_pairs_and_depend_on_the_seed(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", *(f"{index}.png" for index in range(9)))
    drawn = []
    for seed in (0, 1):
        out = tmp_path / f"{seed}.parquet"
        assert build_manifest(out, images, images, pairing="sample", samples=20, sample_seed=seed) == 20
        drawn.append(pairs(out))
        assert len(set(drawn[-1])) == 20
    assert drawn[0] != drawn[1]
    build_manifest(out, images, images, pairing="sample", samples=81, force=True)
    assert len(set(pairs(out))) == 81
    for samples in (0, 82, None):
        with pytest.raises(ManifestError, match="samples"):
            build_manifest(out, images, images, pairing="sample", samples=samples, force=True)


def test_styles_without_contents_give_rows_without_content(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "textures.parquet"
    build_manifest(out, styles=folder("styles", "wood.png", "stone.png"), prompt="p", seed=3, content_weight=0.5)
    assert pq.read_schema(out).names == ["pair_id", "style", "prompt", "seed", "content_weight"]
    assert [row.pair_id for row in open_manifest(out).rows()] == ["stone", "wood"]
    assert table(out)[0] == {
        "pair_id": "stone",
        "style": "styles/stone.png",
        "prompt": "p",
        "seed": 3,
        "content_weight": 0.5,
    }


def test_folders_are_searched_with_subfolders_in_natural_order(folder: Folder) -> None:
    images = folder(
        "images", "10.PNG", "9.jpg", "sub/2.webp", "sub/10.webp", "notes.txt", "v.svg", "._9.jpg", ".x/1.png"
    )
    names = [os.path.relpath(path, os.path.realpath(images)) for path in find_images(images, "content")]
    assert names == ["9.jpg", "10.PNG", "sub/2.webp", "sub/10.webp"]
    assert [Path(path).name for path in find_images(f"{images}/**/*.webp", "content")] == ["2.webp", "10.webp"]


def test_images_are_read_from_lists(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", "a.png", "b.png")
    (tmp_path / "list.txt").write_text("images/b.png\n\ns3://bucket/c.png\n")
    (tmp_path / "list.csv").write_text("\ufeffpath,note\nimages/b.png,x\nimages/a.png,y\n", encoding="utf-8")
    real = os.path.realpath(images)
    assert find_images(tmp_path / "list.txt", "style") == [f"{real}/b.png", "s3://bucket/c.png"]
    assert find_images([tmp_path / "list.csv", images / "a.png"], "style") == [f"{real}/{n}.png" for n in "baa"]
    (tmp_path / "list.csv").write_text("file\nx\n")
    with pytest.raises(ManifestError, match=r"needs a column 'style' or 'path', has: file"):
        find_images(tmp_path / "list.csv", "style")


def test_a_source_without_images_is_an_error_with_what_was_looked_for(folder: Folder, tmp_path: Path) -> None:
    empty = folder("empty", "readme.md")
    for source, message in [
        (empty, r"empty: no style images there; looked for files ending in .*\.jpg"),
        (f"{empty}/*.png", "no style images there"),
        (empty / "readme.md", "no style images there"),
        (tmp_path / "absent", "absent: no such file or folder of style images"),
        ([], "the list of style images is empty"),
    ]:
        with pytest.raises(ManifestError, match=message):
            build_manifest(tmp_path / "out.parquet", styles=source)
    with pytest.raises(ManifestError, match="no style images named"):
        build_manifest(tmp_path / "out.parquet", contents=empty)
    assert not (tmp_path / "out.parquet").exists()


def test_paths_are_relative_where_the_manifest_is_near_the_images(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", "a.png")
    far = tmp_path / "one" / "two" / "three"
    for out, written in [
        (tmp_path / "near.parquet", "images/a.png"),
        (tmp_path / "one" / "two" / "near.parquet", "../../images/a.png"),
        (far / "far.parquet", os.path.realpath(images / "a.png")),
    ]:
        build_manifest(out, styles=images)
        assert [row["style"] for row in table(out)] == [written]
        assert validate_manifest(out).ok


def test_names_are_readable_unique_and_safe() -> None:
    names = unique_names(
        ["/p/cat.jpg", "/p/dog.png", "/q/dog.png", "/q/r/Dog.jpg", "/q/r/dog.gif", "/p/a__b_.png", "/p/é" * 60]
    )
    assert names["/p/cat.jpg"] == "cat"
    assert names["/p/dog.png"] == "p-dog"
    assert names["/q/dog.png"] == "q-dog"
    assert names["/q/r/Dog.jpg"].startswith("Dog-")
    assert names["/p/a__b_.png"] == "a_b"
    assert len(set(names.values())) == len(names)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab_-. é\t\\"), min_size=1, max_size=4), min_size=1, max_size=12, unique=True))
def test_pair_ids_are_unique(stems: list[str]) -> None:
    names = unique_names(f"/f/{stem}.png" for stem in stems)
    joined = {f"{content}__{style}" for content in names.values() for style in names.values()}
    assert len(joined) == len(stems) ** 2


def test_long_file_names_give_valid_ids(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", "é" * 110 + "1.png", "é" * 110 + "2.png")
    out = tmp_path / "pairs.parquet"
    build_manifest(out, images, images)
    assert validate_manifest(out).ok


def test_a_csv_of_pairs_becomes_typed_columns(folder: Folder, tmp_path: Path) -> None:
    folder("images", "a.png", "b.png")
    csv = tmp_path / "pairs.csv"
    csv.write_text(
        "pair_id,content,style,seed,content_weight,label\nx,images/a.png,images/b.png,7,0.5,1\n,,images/b.png,,,\n"
    )
    out = tmp_path / "out" / "pairs.parquet"
    assert build_manifest(out, pairs=csv, prompt="all") == 2
    first, second = table(out)
    assert first == {
        "pair_id": "x",
        "content": "../images/a.png",
        "style": "../images/b.png",
        "seed": 7,
        "content_weight": 0.5,
        "label": "1",
        "prompt": "all",
    }
    assert second["content"] is second["seed"] is second["pair_id"] is None
    assert open_manifest(out).carried.names == ["label"]
    assert validate_manifest(out).ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("style,seed\nx.png,abc\n", r"line 2, column 'seed': 'abc', expected integer"),
        ("style,content_weight\nx.png,1\ny.png,nan\n", "row 1, column 'content_weight': is nan"),
        ("style,pair_id\nx.png,a\ny.png,a\n", "row 1, column 'pair_id': 'a' is already the id of row 0"),
        ("style,pair_id\nx.png,../a\n", "could be a path"),
        ("style,prompt\n,p\n", "row 0, column 'style': is null"),
        ("style,prompt\nx.png\n", "line 2: has another number of values"),
        ("content\nx.png\n", "no column 'style' in the header"),
        ("style,image\nx.png,y\n", "column 'image' has the name of an output column"),
        ("style,style\nx.png,y\n", "repeated"),
        ("style,seed\nx.png,99999999999999999999\n", r"pairs\.csv"),
        ("style\n", "no rows"),
        ("", "no column 'style'"),
    ],
)
def test_a_bad_csv_is_reported_with_its_line_and_leaves_no_file(tmp_path: Path, text: str, message: str) -> None:
    csv = tmp_path / "pairs.csv"
    csv.write_text(text)
    with pytest.raises(ManifestError, match=message):
        build_manifest(tmp_path / "out.parquet", pairs=csv)
    assert os.listdir(tmp_path) == ["pairs.csv"]


def test_a_manifest_that_exists_is_replaced_only_with_force(folder: Folder, tmp_path: Path) -> None:
    out, styles = tmp_path / "pairs.parquet", folder("styles", "x.png")
    build_manifest(out, styles=styles)
    before = out.read_bytes()
    with pytest.raises(ManifestError, match=r"pairs\.parquet: exists already; .* or replace it with --force"):
        build_manifest(out, styles=styles, prompt="another")
    assert out.read_bytes() == before
    build_manifest(out, styles=styles, prompt="another", force=True)
    assert table(out)[0]["prompt"] == "another"


def test_a_failed_build_keeps_the_old_manifest(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    build_manifest(out, styles=folder("styles", "x.png"))
    before = out.read_bytes()
    csv = tmp_path / "pairs.csv"
    # The first row group is written before the bad line is read.
    csv.write_text("style,seed\n" + "x.png,1\n" * 200 + "x.png,bad\n")
    with pytest.raises(ManifestError, match="line 202"):
        build_manifest(out, pairs=csv, force=True)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["pairs.csv", "pairs.parquet", "styles"]


def test_bad_arguments_are_refused(folder: Folder, tmp_path: Path) -> None:
    images = folder("images", "x.png")
    (tmp_path / "file").touch()
    out = tmp_path / "out.parquet"
    for path, options, message in [
        (tmp_path / "out.csv", {}, r"ends in \.parquet"),
        (tmp_path / "file" / "out.parquet", {}, "cannot be written"),
        (out, {"tile": (0, 4)}, "both sides must be 1 or more"),
        (out, {"rows_per_group": 0}, "must be 1 or more"),
        (out, {"pairing": "all"}, "not one of: product, zip, sample"),
        (out, {"samples": 3}, "belongs to the pairing 'sample'"),
        (out, {"seed": -1}, "column 'seed': is -1"),
        (out, {"content_weight": math.nan}, "column 'content_weight': is nan"),
        (out, {"pairs": "pairs.csv"}, "give no contents, styles or samples with a CSV"),
    ]:
        with pytest.raises(ManifestError, match=message):
            build_manifest(path, styles=images, **options)
    assert not out.exists()


def test_pillow_reads_every_extension_that_is_searched_for() -> None:
    known = Image.registered_extensions()
    assert {extension for extension in IMAGE_EXTENSIONS if known.get(extension) not in Image.OPEN} == set()
