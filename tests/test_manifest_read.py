"""Manifests: how they are opened, how ranges of rows are read, the ids of rows, and the documented columns."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stylemill.errors import InputError, ManifestError
from stylemill.manifest import KNOWN_COLUMNS, OUTPUT_COLUMNS, ImageRef, Manifest, open_manifest
from stylemill.manifest.row import parse_row
from stylemill.store.parquet import output_schema

PAGE = Path(__file__).parents[1] / "manifests" / "README.md"
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> Path:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.parquet"


def test_every_known_column_arrives_in_the_row(file: Path) -> None:
    table = {
        "pair_id": ["a"],
        "content": ["photos/cat.jpg"],
        "style": [["x.png", "y.png"]],
        "prompt": ["a cat"],
        "negative_prompt": ["blur"],
        "seed": pa.array([7], pa.uint8()),
        "content_mask": ["m.png"],
        "style_mask": [["mx.png", "my.png"]],
        "content_weight": pa.array([0.5], pa.float32()),
        "control": [["edges.png"]],
    }
    assert table.keys() == KNOWN_COLUMNS.keys()
    manifest = open_manifest(write(file, table))
    (row,) = manifest.rows()
    assert manifest.style_is_list
    assert (row.manifest_row, row.pair_id, row.seed, row.content_weight) == (0, "a", 7, 0.5)
    assert (row.prompt, row.negative_prompt) == ("a cat", "blur")
    assert row.content == ImageRef("photos/cat.jpg")
    assert [(column, ref.path) for column, ref in row.images()] == [
        ("content", "photos/cat.jpg"),
        ("style", "x.png"),
        ("style", "y.png"),
        ("content_mask", "m.png"),
        ("style_mask", "mx.png"),
        ("style_mask", "my.png"),
        ("control", "edges.png"),
    ]


def test_only_style_is_needed_and_null_columns_count_as_absent(file: Path) -> None:
    write(file, {"style": ["x.png"], "content": pa.nulls(1), "prompt": pa.nulls(1), "seed": pa.nulls(1)})
    (row,) = open_manifest(file).rows()
    assert (row.content, row.prompt, row.seed, row.style_masks) == (None, None, None, ())


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_arrow_string_type_is_read(file: Path, kind: pa.DataType) -> None:
    (row,) = open_manifest(write(file, {"style": pa.array(["x.png"]).cast(kind)})).rows()
    assert row.styles == (ImageRef("x.png"),)


def test_hugging_face_images_are_read_singly_and_in_lists(file: Path) -> None:
    image, name = {"bytes": b"abc", "path": "001.png"}, {"bytes": None, "path": "b.png"}
    write(file, {"content": pa.array([image], HF_IMAGE), "style": pa.array([[image, name]], pa.list_(HF_IMAGE))})
    (row,) = open_manifest(file).rows()
    assert row.content == ImageRef("001.png", b"abc")
    assert row.styles == (ImageRef("001.png", b"abc"), ImageRef("b.png", None))


def test_images_are_identified_by_bytes_and_else_by_path() -> None:
    assert ImageRef("001.png", b"a").key != ImageRef("001.png", b"b").key
    assert ImageRef("001.png", b"a").key == ImageRef("2.png", b"a").key == ImageRef(None, b"a").reference
    assert ImageRef("001.png", b"a").reference == "001.png" == ImageRef("001.png").key


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"styles": ["x"]}, "no column 'style'; its columns are: styles"),
        ({"style": [1]}, "column 'style' is int64, expected string, struct `{bytes, path}`, or a list of either"),
        ({"style": pa.nulls(1)}, "column 'style' is null"),
        ({"style": [{"image": "x"}]}, "column 'style' is struct"),
        ({"style": [[["x"]]]}, "column 'style' is list"),
        ({"style": ["x"], "content": [["x"]]}, "column 'content' is list"),
        ({"style": ["x"], "seed": [1.0]}, "column 'seed' is double, expected integer; in pandas, astype('Int64')"),
        ({"style": ["x"], "seed": ["1"]}, "column 'seed' is string"),
        ({"style": ["x"], "content_weight": ["1"]}, "column 'content_weight' is string, expected number"),
        ({"style": ["x"], "content_weight": [True]}, "column 'content_weight' is bool"),
        ({"style": ["x"], "prompt": [b"x"]}, "column 'prompt' is binary, expected string"),
        ({"style": ["x"], "pair_id": [1]}, "column 'pair_id' is int64, expected string"),
        ({"style": ["x"], "image": ["x"]}, "column 'image' has the name of an output column; rename it"),
        ({"style": pa.array([], pa.string())}, "the manifest has no rows"),
    ],
)
def test_a_table_that_is_no_manifest_is_refused_with_the_column(
    file: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)) as caught:
        open_manifest(write(file, columns))
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_of_the_schema_are_reported_at_once(file: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        open_manifest(write(file, {"width": [1], "seed": ["x"]}))
    assert len(str(caught.value).splitlines()) == 3


def test_repeated_column_names_are_refused(file: Path) -> None:
    write(file, pa.table([["x"], ["y"]], names=["style", "style"]))
    with pytest.raises(ManifestError, match="duplicate column 'style'; keep one of them"):
        open_manifest(file)


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.parquet"
    text.write_text("style\nx.png\n")
    empty = tmp_path / "empty.parquet"
    empty.touch()
    cut = write(tmp_path / "cut.parquet", {"style": ["x.png"]})
    cut.write_bytes(cut.read_bytes()[:-20])
    for path, message in [
        (tmp_path / "absent.parquet", "no such manifest"),
        (tmp_path, "is a folder"),
        (text, "not a Parquet file, or a damaged one"),
        (empty, "not a Parquet file, or a damaged one"),
        (cut, "not a Parquet file, or a damaged one"),
        ("s3://bucket/pairs.parquet", "only local manifests"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            open_manifest(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_page_is_a_manifest_error(file: Path) -> None:
    write(file, {"style": [f"{index}.png" for index in range(4000)]}, compression="zstd", use_dictionary=False)
    data = bytearray(file.read_bytes())
    data[200:1200] = bytes(1000)
    file.write_bytes(data)
    with pytest.raises(ManifestError, match="damaged"):
        list(open_manifest(file).rows())


def test_a_file_with_fewer_rows_than_its_metadata_says_is_damaged(file: Path) -> None:
    good = write(file, {"style": ["x.png"] * 40}).read_bytes()
    counts = [index for index in range(len(good) - 400, len(good)) if good[index] == 80]  # zigzag of 40
    messages = []
    for first, second in itertools.combinations(counts, 2):
        changed = bytearray(good)
        changed[first] = changed[second] = 82
        file.write_bytes(changed)
        try:
            assert len(list(open_manifest(file).rows())) == 40  # the changed bytes were no counts of rows
        except ManifestError as error:
            messages.append(str(error))
    assert any("is damaged: it has fewer rows than its metadata says" in message for message in messages)
    assert any("is damaged: its row groups do not add up to its 41 rows" in message for message in messages)


def test_a_small_file_of_repeated_large_values_does_not_fill_the_memory(file: Path) -> None:
    """4,096 prompts of 8 MB in a file of some KB are read in batches of at most 1 GiB."""
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * 4096, pa.int32()), ["x" * (8 << 20)])
    write(file, {"style": ["x.png"] * 4096, "prompt": prompts}, dictionary_pagesize_limit=1 << 28)
    assert file.stat().st_size < 1 << 20
    manifest = open_manifest(file)
    assert manifest.batch_rows < 128
    assert sum(len(row.prompt or "") == 8 << 20 for row in manifest.rows(100, 104)) == 4


def test_column_names_that_are_not_utf8_are_a_damaged_file(file: Path) -> None:
    content = write(file, {"style": ["x.png"], "abcdefgh": ["y"]}).read_bytes()
    file.write_bytes(content.replace(b"abcdefgh", b"abc\xff\xfefgh"))
    with pytest.raises(ManifestError, match="not a Parquet file, or a damaged one"):
        open_manifest(file)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (9, 11), (10, 20), (35, 1000), (5, 5), (37, 40)])
def test_ranges_of_rows_cross_row_groups(file: Path, start: int, stop: int | None) -> None:
    names = [f"{index}.png" for index in range(37)]
    table = {"style": names, "number": list(range(37)), "style.name": names, "a.b": names}
    manifest = open_manifest(write(file, table, row_group_size=10))
    rows = list(manifest.rows(start, stop))
    assert [row.manifest_row for row in rows] == list(range(37))[start:stop]
    assert [row.styles[0].path for row in rows] == names[start:stop]
    carried = manifest.carried_rows(start, stop)
    assert carried.column_names == ["number", "style.name", "a.b"]
    assert carried.column("number").to_pylist() == list(range(37))[start:stop]
    assert carried.column("a.b").to_pylist() == names[start:stop]


def bytes_read() -> int:
    """The bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_footer_is_read_once_by_a_process_and_again_if_the_file_changes(file: Path) -> None:
    """It grows with the manifest, and every shard reads a range of rows."""
    manifest = open_manifest(write(file, {"style": [f"{row}.png" for row in range(3000)]}, row_group_size=1))
    footer = pq.read_metadata(file).serialized_size
    assert [row.styles[0].path for row in manifest.rows(0, 1)] == ["0.png"]
    before = bytes_read()
    assert [row.styles[0].path for row in manifest.rows(1500, 1502)] == ["1500.png", "1501.png"]
    assert bytes_read() - before < footer / 4
    write(file, {"style": [f"{row}.jpg" for row in range(3000)]}, row_group_size=1)
    assert [row.styles[0].path for row in manifest.rows(2999)] == ["2999.jpg"]


def test_large_rows_are_read_in_small_batches(file: Path) -> None:
    images = pa.array([{"bytes": bytes([index]) * 2_000_000, "path": None} for index in range(24)], HF_IMAGE)
    manifest = open_manifest(write(file, {"style": images}, compression="none", use_dictionary=False, row_group_size=4))
    assert manifest.batch_rows < 10
    before = pa.total_allocated_bytes()
    for _row in manifest.rows():
        assert pa.total_allocated_bytes() - before < 40_000_000


def test_an_opened_manifest_can_be_sent_to_workers(file: Path) -> None:
    manifest = open_manifest(write(file, {"style": ["x.png"], "caption": ["c"]}))
    copy: Manifest = pickle.loads(pickle.dumps(manifest))
    assert list(copy.rows()) == list(manifest.rows())
    assert copy.sha256() == manifest.sha256()
    assert copy.base == file.parent


def test_metadata_of_carried_features_is_kept(file: Path) -> None:
    features = {"style": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    table = pa.table({"style": ["x"], "label": [1]})
    write(file, table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}))
    manifest = open_manifest(file)
    kept = json.loads(manifest.carried.metadata[b"huggingface"])
    assert kept == {"info": {"features": {"label": features["label"]}}}
    assert manifest.carried_rows(0, 1).schema.equals(manifest.carried, check_metadata=True)


def test_a_bad_row_is_reported_when_it_is_read(file: Path) -> None:
    manifest = open_manifest(write(file, {"style": ["x", "y", None, "z"]}))
    with pytest.raises(ManifestError, match="row 2, column 'style': is null"):
        list(manifest.rows())
    with pytest.raises(ManifestError, match="row 2, column 'style': is null"):
        manifest.repeated_rows()
    assert [row.manifest_row for row in manifest.rows(3)] == [3]


def test_strings_that_are_not_utf8_are_a_problem_of_their_row(file: Path) -> None:
    manifest = open_manifest(write(file, {"style": pa.array([b"x", b"\xff"]).view(pa.string()), "pair_id": ["a", "b"]}))
    assert next(manifest.rows()).pair_id == "a"
    with pytest.raises(ManifestError, match="row 1, column 'style': is not valid UTF-8"):
        list(manifest.rows())


def test_identical_rows_get_different_ids_in_any_range(file: Path) -> None:
    styles = ["x", "y", "x", "x", "z", "y"]
    manifest = open_manifest(write(file, {"style": styles, "caption": list("abcdef")}))
    repeated = manifest.repeated_rows()
    assert repeated == {2: 2, 3: 3, 5: 2}
    names = [row.pair_id for row in manifest.rows(occurrences=repeated)]
    assert len(set(names)) == 6
    assert names[3] == f"{names[0]}-3"
    assert [row.pair_id for row in manifest.rows(3, 6, repeated)] == names[3:]


def test_a_generated_id_is_never_that_of_another_row(file: Path) -> None:
    (row,) = open_manifest(write(file, {"style": ["x"]})).rows()
    manifest = open_manifest(write(file, {"style": ["x"] * 4, "pair_id": [f"{row.pair_id}-2", None, None, None]}))
    repeated = manifest.repeated_rows()
    assert repeated == {2: 3, 3: 4}
    assert len({row.pair_id for row in manifest.rows(occurrences=repeated)}) == 4


def test_a_duplicate_pair_id_is_refused(file: Path) -> None:
    manifest = open_manifest(write(file, {"style": ["x", "y", "z"], "pair_id": ["a", "b", "a"]}))
    with pytest.raises(ManifestError, match="row 2, column 'pair_id': 'a' is already the id of row 0"):
        manifest.repeated_rows()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "content": st.sampled_from([None, "a.png", "b.png"]),
                "style": st.sampled_from(["x.png", "y.png"]),
                "prompt": st.sampled_from([None, "", "p"]),
                "seed": st.sampled_from([None, 0, 1]),
                "content_weight": st.sampled_from([None, 0.0, 0.25]),
            }
        ),
        min_size=1,
        max_size=20,
    ),
    order=st.randoms(use_true_random=False),
)
def test_generated_ids_do_not_depend_on_the_order_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], order: random.Random
) -> None:
    def by_id(rows: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
        schema = pa.schema(
            [(name, pa.string()) for name in ("content", "style", "prompt")]
            + [("seed", pa.int64()), ("content_weight", pa.float64())]
        )
        path = tmp_path_factory.getbasetemp() / "permuted.parquet"
        manifest = open_manifest(write(path, pa.Table.from_pylist(rows, schema=schema), row_group_size=3))
        ordered = list(manifest.rows(occurrences=manifest.repeated_rows()))
        return {row.pair_id: (row.content, row.styles, row.prompt, row.seed, row.content_weight) for row in ordered}

    before = by_id(rows)
    order.shuffle(rows)
    assert len(before) == len(rows)
    assert by_id(rows) == before


def test_a_generated_id_ignores_null_columns_and_single_item_lists() -> None:
    def name(**values: Any) -> str:
        row, problems = parse_row(0, values)
        assert row is not None, problems
        return row.pair_id

    assert name(style="x") == name(style=["x"]) == name(style="x", prompt=None, seed=None, content=None)
    assert (
        len({name(style="x"), name(style="x", prompt=""), name(style="x", seed=0), name(style="x", content="x")}) == 4
    )


def test_the_documented_columns_are_those_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (yes|no) \| (.+) \|$", page, flags=re.MULTILINE)
    assert rows == [
        (column.name, column.types, "yes" if column.required else "no", column.meaning)
        for column in KNOWN_COLUMNS.values()
    ]
    output = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]*\|$", page, flags=re.MULTILINE)
    one, several = (output_schema(pa.schema([]), lists, "") for lists in (False, True))
    assert tuple(name for name, _ in output) == OUTPUT_COLUMNS == tuple(one.names)
    shown = {
        pa.list_(pa.field("element", pa.string())): "a list of them",
        one.field("image").type: "struct `{bytes, path}`",
    }
    for (name, types), *fields in zip(output, one, several, strict=True):
        kinds = dict.fromkeys(shown.get(field.type, str(field.type)) for field in fields)
        assert types == ", or ".join(kinds), name
