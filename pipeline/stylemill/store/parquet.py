"""Write the Parquet files of a shard to tmp/ and check them there. The same rows give the same bytes.

The image column is not compressed, because images are compressed already. Pages have checksums, so a flipped bit is
noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stylemill.errors import DamagedError
from stylemill.store.atomic import discard, storage_errors, sync
from stylemill.store.paths import RunPaths
from stylemill.testing.failpoints import failpoint

ROWS_PER_GROUP = 100  # a reader holds a whole row group; the Hugging Face viewer expects 100 for images
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the storage type of datasets.Image
FINGERPRINT_KEY = b"stylemill.fingerprint"
OUTPUT_FORMAT = 2  # part of the fingerprint: with other columns, the files of one run would not fit together
_FAILURE_COLUMNS = ("row", "pair_id", "stage", "error", "message")
FAILURE_SCHEMA = pa.schema([pa.field(name, pa.int64() if name == "row" else pa.string()) for name in _FAILURE_COLUMNS])


@dataclass(frozen=True)
class Failure:
    """A failed row: the stage (read | encode | sample | decode), the error class and the message."""

    row: int
    pair_id: str
    stage: str
    error: str
    message: str


@dataclass(frozen=True)
class RowIds:
    """The output row numbers of a file, in order, and the pair_id of each row."""

    rows: tuple[int, ...]
    pair_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


def output_schema(carried: pa.Schema, style_is_list: bool, fingerprint: str) -> pa.Schema:
    """The schema of a data file: the columns of stylemill, then the columns that are carried over from the manifest.

    The schema metadata declares `image` a Hugging Face Image, keeps the features of the carried columns, and holds the
    `fingerprint` of the run, which tells the file from one of another job.
    """
    # Named "element" as in Parquet, so that reading and rewriting a file gives the same bytes.
    references = pa.list_(pa.field("element", pa.string())) if style_is_list else pa.string()
    own = [
        pa.field("pair_id", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("image", IMAGE),
        pa.field("content", pa.string()),
        pa.field("style", references),
        pa.field("base", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("seed", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("negative_prompt", pa.string()),
        pa.field("content_weight", pa.float64()),
        pa.field("settings", pa.string()),
        pa.field("style_distance_before", pa.float32()),
        pa.field("style_distance", pa.float32()),
        pa.field("content_distance", pa.float32()),
        pa.field("content_sha256", pa.string()),
        pa.field("style_sha256", references),
        pa.field("sha256", pa.string()),
        pa.field("model", pa.string()),
    ]
    features = {"image": {"_type": "Image"}, **_features(carried)}
    info = json.dumps({"info": {"features": features}}, sort_keys=True)
    return pa.schema([*own, *carried], {b"huggingface": info.encode(), FINGERPRINT_KEY: fingerprint.encode()})


def _features(carried: pa.Schema) -> dict[str, object]:
    try:
        known = json.loads((carried.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: known[name] for name in carried.names if name in known}
    except (KeyError, TypeError, ValueError):
        return {}


def write_shard(paths: RunPaths, shard: int, attempt: str, table: pa.Table, generation: int = 0) -> Path:
    """Write the successful rows of a shard to tmp/, fsync the file and read it back; returns its path.

    `table` has the columns of `output_schema` and at least one row. Raises StorageError, and DamagedError if what is
    read back differs; then no file is left.
    """
    return _write(table, paths.tmp_file(paths.data(shard, generation), attempt))


def write_failures(
    paths: RunPaths, shard: int, attempt: str, failures: Sequence[Failure], fingerprint: str, generation: int = 0
) -> Path:
    """Write the failed rows of a shard to tmp/, in row order; returns and raises as `write_shard` does."""
    rows = [asdict(failure) for failure in sorted(failures, key=lambda failure: failure.row)]
    schema = FAILURE_SCHEMA.with_metadata({FINGERPRINT_KEY: fingerprint.encode()})
    table = pa.Table.from_pylist(rows, schema=schema)
    return _write(table, paths.tmp_file(paths.failures(shard, generation), attempt))


def rewrite(path: Path, tmp: Path) -> Path:
    """Write the rows of the file `path` to `tmp`. If the bytes differ, `path` was changed after it was written."""
    with storage_errors(path):
        table = pq.ParquetFile(path).read(use_threads=False)
    return _write(table, tmp)


def _write(table: pa.Table, tmp: Path) -> Path:
    if not table.num_rows:
        raise ValueError("a Parquet file without rows makes a dataset folder unreadable; leave it out")
    leaves, schema = _stored_schema(table.schema)
    compressed = [leaf for leaf in leaves if leaf != "image.bytes"]
    try:
        with storage_errors(tmp):
            with open(tmp, "xb") as file:
                pq.write_table(
                    table,
                    file,
                    row_group_size=ROWS_PER_GROUP,
                    version="2.6",
                    compression={leaf: "zstd" if leaf in compressed else "none" for leaf in leaves},
                    use_dictionary=False,
                    write_statistics=compressed,
                    write_batch_size=1,  # rows between checks of the page size; with more, images would overflow a page
                    data_page_size=1 << 20,
                    write_page_checksum=True,
                )
                failpoint("mid-write", folder=tmp.name.partition("-")[0])  # the last bytes are still buffered
            sync(tmp)
        if check_file(tmp, schema) != row_ids(table):
            raise DamagedError(f"{tmp}: the rows that were read back are not those that were written")
    except BaseException:
        # pyarrow closes an interrupted file properly, so it would look like a complete one.
        discard(tmp)
        raise
    return tmp


def _stored_schema(schema: pa.Schema) -> tuple[list[str], pa.Schema]:
    """The paths of the leaf columns in Parquet, such as `style.list.element`, and the schema that will be read back."""
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer, version="2.6")
    file = pq.ParquetFile(buffer)
    return [file.schema.column(index).path for index in range(len(file.schema))], file.schema_arrow


def check_file(path: Path, schema: pa.Schema | None = None, fingerprint: str | None = None) -> RowIds:
    """Read and check a whole data or failures file; returns its rows.

    Checks the checksum of every page, the digest of every image if there is a `sha256` column, and the schema and the
    fingerprint of the run if they are given. Raises DamagedError, and StorageError if the disk fails.
    """
    rows: list[int] = []
    pair_ids: list[str] = []
    try:
        with open(path, "rb") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            if schema is not None and not parquet.schema_arrow.equals(schema, check_metadata=True):
                raise DamagedError(f"{path}: has other columns, or belongs to another job")
            file_fingerprint = (parquet.schema_arrow.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
            if fingerprint is not None and file_fingerprint != fingerprint:
                raise DamagedError(f"{path}: belongs to another job")
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, use_threads=False)
                ids = row_ids(table)
                _check_images(path, table, ids)
                rows += ids.rows
                pair_ids += ids.pair_ids
    except OSError as error:
        if error.errno is not None:  # pyarrow raises OSError without errno for damage
            with storage_errors(path):
                raise
        raise DamagedError(f"{path}: is damaged: {error}") from error
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise DamagedError(f"{path}: is truncated, damaged, or not a file of a run: {error}") from error
    return RowIds(tuple(rows), tuple(pair_ids))


def row_ids(table: pa.Table) -> RowIds:
    rows: list[Any] = table.column("row").to_pylist()
    pair_ids: list[Any] = table.column("pair_id").to_pylist()
    return RowIds(tuple(rows), tuple(pair_ids))


def _check_images(path: Path, table: pa.Table, ids: RowIds) -> None:
    if "sha256" not in table.column_names:
        return
    chunks: list[Any] = table.column("image").chunks
    images = (image.as_py() for chunk in chunks for image in chunk.field("bytes"))
    for row, image, expected in zip(ids.rows, images, table.column("sha256").to_pylist(), strict=True):
        if image is None or hashlib.sha256(image).hexdigest() != expected:
            raise DamagedError(f"{path}: row {row}: the digest of the image is not that in the column sha256")
