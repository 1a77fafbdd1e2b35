"""Data files: the same bytes for the same rows, whole or noticed, and readable as a Hugging Face dataset."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store_shards import FINGERPRINT, attempt, run_folder, table
from stylemill.errors import DamagedError, StorageError
from stylemill.store.commit import commit
from stylemill.store.parquet import ROWS_PER_GROUP, Failure, check_file, output_schema, write_failures, write_shard


def test_the_same_rows_give_the_same_bytes_however_they_are_held(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    whole = table(range(250))
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 148), whole.slice(149)])
    first, second = (write_shard(paths, 0, name, rows) for name, rows in (("a", whole), ("b", pieces)))
    assert first.read_bytes() == second.read_bytes()
    lost = [Failure(row, str(row), "read", "ImageError", "gone") for row in (3, 1)]
    assert (
        write_failures(paths, 0, "a", lost, FINGERPRINT).read_bytes()
        == write_failures(paths, 0, "b", lost[::-1], FINGERPRINT).read_bytes()
    )


def test_images_are_stored_as_they_are_and_the_rest_compressed(tmp_path: Path) -> None:
    metadata = pq.read_metadata(write_shard(run_folder(tmp_path), 0, "a", table(range(250))))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROWS_PER_GROUP] * 2 + [50]
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    stored = {column.path_in_schema: column.compression for column in columns}
    assert stored.pop("image.bytes") == "UNCOMPRESSED"
    assert set(stored.values()) == {"ZSTD"}


def test_no_damage_gives_other_rows(tmp_path: Path) -> None:
    path = write_shard(run_folder(tmp_path), 0, "a", table(range(3)))
    whole, schema, expected = path.read_bytes(), pq.read_schema(path), pq.read_table(path)
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=path.name):
            check_file(path, schema)
    noticed = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            check_file(path, schema)
        except DamagedError:
            noticed += 1
        else:
            assert pq.read_table(path).equals(expected)  # statistics and the like
    assert noticed > len(whole) // 3 * 0.4


def test_an_image_that_is_not_its_digest_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    rows = table(range(3))
    wrong = rows.set_column(rows.column_names.index("sha256"), "sha256", pa.array(["0" * 64] * 3))
    with pytest.raises(DamagedError, match="row 0"):
        write_shard(paths, 0, "a", wrong)
    assert list(paths.tmp.iterdir()) == []


def test_an_attempt_that_breaks_off_leaves_no_valid_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = run_folder(tmp_path)
    real = pq.ParquetWriter.write_table

    def break_off(writer: pq.ParquetWriter, rows: pa.Table, **options: int) -> None:
        real(writer, rows.slice(0, 1), **options)
        if rows.num_rows:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", break_off)
    with pytest.raises(StorageError, match="disk is full"):
        write_shard(paths, 0, "a", table(range(3)))
    assert list(paths.tmp.iterdir()) == []


def test_a_shard_without_rows_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave it out"):
        write_shard(run_folder(tmp_path), 0, "a", table([]))


carried_types = st.recursive(
    st.sampled_from(
        [
            *(
                pa.string(),
                pa.large_string(),
                pa.int8(),
                pa.uint64(),
                pa.float16(),
                pa.float64(),
                pa.bool_(),
                pa.null(),
            ),
            *(pa.timestamp("s"), pa.timestamp("ns", "UTC"), pa.date64(), pa.time32("s"), pa.duration("s")),
            *(pa.binary(3), pa.decimal128(9, 2), pa.dictionary(pa.int8(), pa.string())),
        ]
    ),
    lambda inner: st.one_of(
        inner.map(pa.list_),
        inner.map(lambda kind: pa.list_(kind, 2)),
        inner.map(lambda kind: pa.struct([pa.field("a.b", kind)])),
        inner.map(lambda kind: pa.map_(pa.string(), kind)),
    ),
    max_leaves=3,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=carried_types)
def test_any_type_that_a_manifest_can_hold_is_carried(tmp_path: Path, kind: pa.DataType) -> None:
    """As `manifest.schema` gives it: a type that went through Parquet once."""
    manifest = tmp_path / "manifest.parquet"
    try:
        pq.write_table(pa.table({"extra": pa.nulls(3, kind)}), manifest)
        carried = pq.read_table(manifest)
    except (pa.ArrowException, KeyError):
        return  # nor can a manifest hold it
    paths = run_folder(tmp_path)
    schema = output_schema(carried.schema, style_is_list=True, fingerprint="f")
    empty = [pa.nulls(3, field.type) for field in schema]
    rows = pa.table(empty, schema=schema).drop_columns(["sha256"])
    path = write_shard(paths, 0, "a", rows)
    assert pq.read_table(path).column("extra").equals(carried.column("extra"))
    path.unlink()


def test_loads_with_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    paths = run_folder(tmp_path, shards=3)
    for shard, failed in enumerate([[1], range(4, 8), []]):
        commit(paths, *attempt(paths, "a", shard, failed=failed))
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("parquet", data_dir=str(paths.data_folder), split="train", cache_dir=cache)
    assert loaded["row"] == [0, 2, 3, 8, 9, 10, 11]
    assert isinstance(loaded.features["image"], datasets.Image)
    first = loaded[0]
    assert first["image"].size == (first["width"], first["height"])
    assert first["image"].getpixel((0, 0)) == (0, 100, 200)
    assert first["tags"] == ["a", "b"]


def test_features_of_carried_columns_are_kept_and_no_others() -> None:
    features = {"label": {"names": ["cat"], "_type": "ClassLabel"}, "style": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = output_schema(pa.schema([("label", pa.int64()), ("note", pa.string())], metadata), True, "f")
    kept = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert kept == {"image": {"_type": "Image"}, "label": features["label"]}
    assert schema.field("style").type == pa.list_(pa.string())
