"""failures.parquet has exactly the rows without an image, and exists only where the files it comes from are valid."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from store_shards import ROWS, attempt, retry_attempt, run_folder
from stylemill.errors import DamagedError
from stylemill.store import failed_rows
from stylemill.store.commit import commit
from stylemill.store.compaction import compact
from stylemill.store.failed_rows import read_failed_rows, remove_failed_rows, write_failed_rows
from stylemill.store.ledger import Ledger
from stylemill.store.paths import RunPaths


def opened(paths: RunPaths) -> Ledger:
    ledger = Ledger(paths)
    ledger.refresh()
    return ledger


def with_generations(folder: Path) -> RunPaths:
    """Shard 0 was retried: row 1 succeeded, row 2 failed again. Half of the records are in a segment."""
    paths = run_folder(folder, shards=3)
    commit(paths, *attempt(paths, "a0", 0, failed=[1, 2]))
    commit(paths, *attempt(paths, "a1", 1))
    compact(paths, opened(paths), min_records=1)
    commit(paths, *retry_attempt(paths, [1], [2]))
    commit(paths, *attempt(paths, "a2", 2, failed=[8, 9, 11]))
    return paths


def test_it_has_each_row_without_an_image_once_in_row_groups_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_rows, "_ROWS_PER_GROUP", 3)
    paths = with_generations(tmp_path)
    write_failed_rows(paths, opened(paths))
    assert read_failed_rows(paths) == (2, 8, 9, 11)
    metadata = pq.read_metadata(paths.failed_rows)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [3, 1]
    with_image = pq.read_table(paths.data_folder, columns=["row"]).column("row").to_pylist()
    assert sorted([*with_image, 2, 8, 9, 11]) == list(range(3 * ROWS))
    assert not list(paths.tmp.iterdir())
    before = paths.failed_rows.stat()
    write_failed_rows(paths, opened(paths))
    assert paths.failed_rows.stat() == before, "it is written once"
    remove_failed_rows(paths)
    remove_failed_rows(paths)
    assert read_failed_rows(paths) is None


def test_it_is_written_again_where_a_generation_was_lost(tmp_path: Path) -> None:
    paths = with_generations(tmp_path)
    write_failed_rows(paths, opened(paths))
    paths.data(0, 1).unlink()
    write_failed_rows(paths, opened(paths))
    assert read_failed_rows(paths) == (1, 2, 8, 9, 11)


def test_it_is_removed_where_no_row_is_failed(tmp_path: Path) -> None:
    paths = run_folder(tmp_path, shards=1)
    commit(paths, *attempt(paths, "a0", 0))
    paths.failed_rows.write_bytes(b"of another time")
    write_failed_rows(paths, opened(paths))
    assert not paths.failed_rows.exists()


def test_it_is_not_written_where_a_failures_file_is_damaged(tmp_path: Path) -> None:
    paths = with_generations(tmp_path)
    ledger = opened(paths)
    os.truncate(paths.failures(2), 50)
    with pytest.raises(DamagedError):
        write_failed_rows(paths, ledger)
    assert not paths.failed_rows.exists()
    assert not list(paths.tmp.iterdir())


def test_it_does_not_exist_where_no_row_is_failed(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    commit(paths, *attempt(paths, "a0"))
    write_failed_rows(paths, opened(paths))
    assert not paths.failed_rows.exists()
