"""Assemble the Parquet files of a shard below tmp/ and check them there. The same rows give the same bytes.

An image is compressed already, so its column is stored as it is; pages carry checksums, so a flipped bit is seen.
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

ROWS_PER_GROUP = 100  # images a reader must hold to reach one; also what the Hugging Face viewer expects of images
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # exactly the storage of datasets.Image
FINGERPRINT_KEY = b"stylemill.fingerprint"
_FAILURE_COLUMNS = ("row", "pair_id", "stage", "error", "message")
FAILURE_SCHEMA = pa.schema([pa.field(name, pa.int64() if name == "row" else pa.string()) for name in _FAILURE_COLUMNS])


@dataclass(frozen=True)
class Failure:
    """A row that is lost for good: where (read | sample | decode | encode), the error class, and its message."""

    row: int
    pair_id: str
    stage: str
    error: str
    message: str


@dataclass(frozen=True)
class RowIds:
    """The rows of a file in their order: manifest row numbers and the pair_id of each."""

    rows: tuple[int, ...]
    pair_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


def output_schema(carried: pa.Schema, style_is_list: bool, fingerprint: str) -> pa.Schema:
    """The columns of a data file: ours, then those carried through from the manifest.

    The schema metadata names `image` a Hugging Face Image, keeps the features the manifest has for carried columns,
    and holds the run's `fingerprint`, without which a file of another job could be taken for one of this.
    """
    # "element" is what Parquet calls it, so that reading and writing again changes no byte.
    references = pa.list_(pa.field("element", pa.string())) if style_is_list else pa.string()
    own = [
        pa.field("pair_id", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("image", IMAGE),
        pa.field("content", pa.string()),
        pa.field("style", references),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("seed", pa.int64()),
        pa.field("settings", pa.string()),
        *(pa.field(f"{name}_loss_{when}", pa.float32()) for name in ("ad", "content") for when in ("first", "last")),
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
    """Write the successful rows of a shard below tmp/, complete, durable and checked; returns the file.

    `table` has the columns of `output_schema` and at least one row. Raises StorageError, and DamagedError if what was
    written does not read back as it should. Nothing is left behind then.
    """
    return _write(table, paths.tmp_name(paths.data(shard, generation), attempt))


def write_failures(
    paths: RunPaths, shard: int, attempt: str, failures: Sequence[Failure], fingerprint: str, generation: int = 0
) -> Path:
    """Write the failed rows of a shard below tmp/, in row order; raises as `write_shard` does."""
    rows = [asdict(failure) for failure in sorted(failures, key=lambda failure: failure.row)]
    schema = FAILURE_SCHEMA.with_metadata({FINGERPRINT_KEY: fingerprint.encode()})
    table = pa.Table.from_pylist(rows, schema=schema)
    return _write(table, paths.tmp_name(paths.failures(shard, generation), attempt))


def write_again(path: Path, tmp: Path) -> Path:
    """Write the rows of the valid file at `path` to `tmp`: other bytes mean that `path` was changed since."""
    with storage_errors(path):
        table = pq.ParquetFile(path).read(use_threads=False)
    return _write(table, tmp)


def _write(table: pa.Table, tmp: Path) -> Path:
    if not table.num_rows:
        raise ValueError("a file without a row makes a dataset folder unreadable: leave it out")
    leaves, read_back = _stored(table.schema)
    text = [leaf for leaf in leaves if leaf != "image.bytes"]
    try:
        with storage_errors(tmp):
            with open(tmp, "xb") as file:
                pq.write_table(
                    table,
                    file,
                    row_group_size=ROWS_PER_GROUP,
                    version="2.6",
                    compression={leaf: "zstd" if leaf in text else "none" for leaf in leaves},
                    use_dictionary=False,
                    write_statistics=text,
                    write_batch_size=1,  # rows between looks at a page's size: many images would overflow one page
                    data_page_size=1 << 20,
                    write_page_checksum=True,
                )
                failpoint("mid-write", folder=tmp.name.partition("-")[0])  # its last bytes are in a buffer
            sync(tmp)
        if check_file(tmp, read_back) != row_ids(table):
            raise DamagedError(f"{tmp}: other rows were read back than were written")
    except BaseException:
        # pyarrow closes what it was writing into a valid partial file, and nothing unfinished may look finished.
        discard(tmp)
        raise
    return tmp


def _stored(schema: pa.Schema) -> tuple[list[str], pa.Schema]:
    """The dotted paths of Parquet's own columns, `style.list.element`, and the schema as it will read back."""
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer, version="2.6")
    file = pq.ParquetFile(buffer)
    return [file.schema.column(index).path for index in range(len(file.schema))], file.schema_arrow


def check_file(path: Path, schema: pa.Schema | None = None, fingerprint: str | None = None) -> RowIds:
    """Read a data or failures file to its last byte and return its rows.

    Checks every page's checksum, every image's digest where the file has a `sha256` column, and the schema and the
    run's fingerprint where they are given. Raises DamagedError saying what is wrong, StorageError where the disk fails.
    """
    rows: list[int] = []
    pair_ids: list[str] = []
    try:
        with open(path, "rb") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            if schema is not None and not parquet.schema_arrow.equals(schema, check_metadata=True):
                raise DamagedError(f"{path}: has other columns, or belongs to another job")
            marked = (parquet.schema_arrow.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
            if fingerprint is not None and marked != fingerprint:
                raise DamagedError(f"{path}: belongs to another job")
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, use_threads=False)
                ids = row_ids(table)
                _check_images(path, table, ids)
                rows += ids.rows
                pair_ids += ids.pair_ids
    except OSError as error:
        if error.errno is not None:  # pyarrow's own, without a number, are damage
            with storage_errors(path):
                raise
        raise DamagedError(f"{path}: is damaged: {error}") from error
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise DamagedError(f"{path}: is truncated, damaged or no file of a run: {error}") from error
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
            raise DamagedError(f"{path}: row {row}: the image is not the one its column sha256 names")
