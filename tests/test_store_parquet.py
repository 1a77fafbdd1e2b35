"""Data files: the same rows give the same bytes, damage is noticed, and the files are a Hugging Face dataset."""

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


def test_the_same_rows_give_the_same_bytes_however_their_table_is_chunked(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    rows = table(range(250))
    chunked = pa.concat_tables([rows.slice(0, 1), rows.slice(1, 148), rows.slice(149)])
    first, second = (write_shard(paths, 0, name, source) for name, source in (("a", rows), ("b", chunked)))
    assert first.read_bytes() == second.read_bytes()
    failures = [Failure(row, str(row), "read", "ImageError", "gone") for row in (3, 1)]
    assert (
        write_failures(paths, 0, "a", failures, FINGERPRINT).read_bytes()
        == write_failures(paths, 0, "b", failures[::-1], FINGERPRINT).read_bytes()
    )


def test_all_columns_but_the_images_are_compressed(tmp_path: Path) -> None:
    metadata = pq.read_metadata(write_shard(run_folder(tmp_path), 0, "a", table(range(250))))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROWS_PER_GROUP] * 2 + [50]
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    compression = {column.path_in_schema: column.compression for column in columns}
    assert compression.pop("image.bytes") == "UNCOMPRESSED"
    assert set(compression.values()) == {"ZSTD"}


def test_a_damaged_file_never_gives_other_rows(tmp_path: Path) -> None:
    path = write_shard(run_folder(tmp_path), 0, "a", table(range(3)))
    data, schema, expected = path.read_bytes(), pq.read_schema(path), pq.read_table(path)
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedError, match=path.name):
            check_file(path, schema)
    noticed = 0
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            check_file(path, schema)
        except DamagedError:
            noticed += 1
        else:
            assert pq.read_table(path).equals(expected)  # the damage is in statistics, for example
    assert noticed > len(data) // 3 * 0.4


def test_an_image_with_another_digest_is_refused_and_no_file_is_left(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    rows = table(range(3))
    wrong = rows.set_column(rows.column_names.index("sha256"), "sha256", pa.array(["0" * 64] * 3))
    with pytest.raises(DamagedError, match="row 0"):
        write_shard(paths, 0, "a", wrong)
    assert list(paths.tmp.iterdir()) == []


def test_an_interrupted_attempt_leaves_no_valid_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = run_folder(tmp_path)
    real = pq.ParquetWriter.write_table

    def fail_after_one_row(writer: pq.ParquetWriter, rows: pa.Table, **options: int) -> None:
        real(writer, rows.slice(0, 1), **options)
        if rows.num_rows:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail_after_one_row)
    with pytest.raises(StorageError, match="disk is full"):
        write_shard(paths, 0, "a", table(range(3)))
    assert list(paths.tmp.iterdir()) == []


def test_a_file_without_rows_is_not_written(tmp_path: Path) -> None:
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
def test_any_column_type_of_a_manifest_is_carried_over(tmp_path: Path, kind: pa.DataType) -> None:
    """In the form that `manifest.schema` returns: as read back from Parquet."""
    manifest = tmp_path / "manifest.parquet"
    try:
        pq.write_table(pa.table({"extra": pa.nulls(3, kind)}), manifest)
        carried = pq.read_table(manifest)
    except (pa.ArrowException, KeyError):
        return  # a manifest cannot have this type
    paths = run_folder(tmp_path)
    schema = output_schema(carried.schema, style_is_list=True, fingerprint="f")
    empty = [pa.nulls(3, field.type) for field in schema]
    rows = pa.table(empty, schema=schema).drop_columns(["sha256"])
    path = write_shard(paths, 0, "a", rows)
    assert pq.read_table(path).column("extra").equals(carried.column("extra"))
    path.unlink()


def test_the_data_folder_loads_with_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_only_the_features_of_carried_columns_are_kept() -> None:
    features = {"label": {"names": ["cat"], "_type": "ClassLabel"}, "style": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = output_schema(pa.schema([("label", pa.int64()), ("note", pa.string())], metadata), True, "f")
    kept = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert kept == {"image": {"_type": "Image"}, "label": features["label"]}
    assert schema.field("style").type == pa.list_(pa.string())
