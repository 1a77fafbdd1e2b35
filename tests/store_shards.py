"""Small real shards for the tests of the store: 4 rows each, with images of 4 × 3 pixels."""

from __future__ import annotations

import faulthandler
import hashlib
import io
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path

import pyarrow as pa
from PIL import Image

from stylemill.store.parquet import Failure, output_schema, write_failures, write_shard
from stylemill.store.paths import RunPaths
from stylemill.store.records import Record
from stylemill.store.run_file import RunFile, create_run_folder

ROWS = 4
FINGERPRINT = "f" * 64
Attempt = tuple[Record, Path | None, Path | None]


def run_folder(folder: Path, shards: int = 1) -> RunPaths:
    paths = RunPaths(folder / "run", shards)
    create_run_folder(paths)
    file = RunFile({}, FINGERPRINT, shards * ROWS, shards, ROWS, {"manifest": "pairs.parquet"}, {})
    paths.job.write_bytes(file.to_bytes())
    return paths


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (row % 256, 100, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def table(rows: Collection[int], fingerprint: str = FINGERPRINT, model: str = "demo") -> pa.Table:
    carried = pa.schema([pa.field("tags", pa.list_(pa.field("element", pa.string())))])
    images = {row: png(row) for row in rows}
    return pa.Table.from_pylist(
        [
            {
                "pair_id": f"pair-{row}",
                "row": row,
                "image": {"bytes": images[row], "path": f"pair-{row}.png"},
                "style": "style.png",
                "width": 4,
                "height": 3,
                "sha256": hashlib.sha256(images[row]).hexdigest(),
                "model": model,
                "tags": ["a", "b"],
            }
            for row in rows
        ],
        schema=output_schema(carried, style_is_list=False, fingerprint=fingerprint),
    )


def failures_of(rows: Collection[int]) -> list[Failure]:
    return [Failure(row, f"pair-{row}", "read", "ImageError", "zero bytes") for row in rows]


def attempt(
    paths: RunPaths,
    name: str,
    shard: int = 0,
    failed: Collection[int] = (),
    fingerprint: str = FINGERPRINT,
    **columns: str,
) -> Attempt:
    """The arguments of a worker's `commit`. `failed` are row numbers."""
    rows = range(shard * ROWS, (shard + 1) * ROWS)
    ok = [row for row in rows if row not in failed]
    data = write_shard(paths, shard, name, table(ok, fingerprint, **columns)) if ok else None
    failures = write_failures(paths, shard, name, failures_of(failed), fingerprint) if failed else None
    record = Record(
        shard=shard,
        fingerprint=fingerprint,
        first_row=rows.start,
        stop_row=rows.stop,
        attempt=name,
        timings={"read": 0.5},
    )
    return record, data, failures


def retry_attempt(paths: RunPaths, ok: Collection[int], failed: Collection[int] = (), shard: int = 0) -> Attempt:
    """The arguments of a worker's `commit` for generation 1 of a shard."""
    data = write_shard(paths, shard, "again", table(ok), 1) if ok else None
    failures = write_failures(paths, shard, "again", failures_of(failed), FINGERPRINT, 1) if failed else None
    rows = range(shard * ROWS, (shard + 1) * ROWS)
    record = Record(shard, FINGERPRINT, rows.start, rows.stop, attempt="again", generation=1)
    return record, data, failures


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in `folder` and its subfolders, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns its exit code, negative for the signal that killed it."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # an intended segfault needs no trace
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(module: object, names: Collection[str], call: int) -> None:
    """Kill the process with SIGKILL just before its `call`th call (from 0) of the named functions."""
    calls = iter(range(1 << 30))

    def killing(real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return wrapper

    for name in names:
        setattr(module, name, killing(getattr(module, name)))
