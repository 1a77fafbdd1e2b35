"""`load` returns a checkpoint exactly as it was saved: the newest undamaged one, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store_shards import files, run_folder
from stylemill.store.checkpoints import Checkpoint, clear, load, save_inputs, save_progress
from stylemill.store.paths import RunPaths

EXPECT = {"fingerprint": "f", "order": ("a", "b")}
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "latents": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
    "step_count": np.array(7, dtype=np.int64),  # a scalar stays a scalar
    "noise": np.array([np.nan, np.inf, -0.0], dtype=np.float64),
    "half": np.ones((2, 0, 3), dtype=np.float16),
    "mask": np.array([True, False]),
}


def save(paths: RunPaths, *steps: int, attempt: str = "one", **meta: object) -> str:
    inputs = save_inputs(paths, 0, attempt, {"clean": np.ones(2, np.float32)}, {"items": [attempt]})
    for step in steps:
        arrays = {**ARRAYS, "step": np.array(step)}
        save_progress(paths, 0, step, attempt, arrays, {**EXPECT, "losses": [0.5, float("nan")], **meta}, inputs)
    return inputs


def load_checkpoint(paths: RunPaths) -> Checkpoint:
    checkpoint = load(paths, 0, EXPECT)
    assert checkpoint is not None
    return checkpoint


def names(paths: RunPaths) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[0] for path in paths.checkpoints(0).iterdir())


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    assert load(paths, 0, EXPECT) is None
    inputs = save(paths, 5, 10)
    checkpoint = load_checkpoint(paths)
    assert (checkpoint.step, checkpoint.inputs_name, checkpoint.inputs_meta) == (10, inputs, {"items": ["one"]})
    assert checkpoint.meta["losses"][0] == 0.5
    assert checkpoint.inputs["clean"].tolist() == [1, 1]
    for name, array in ARRAYS.items():
        loaded = checkpoint.arrays[name]
        assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(loaded, array)
        assert loaded.flags.writeable
    assert not files(paths.tmp)


def test_the_two_newest_progress_files_and_the_inputs_are_kept(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 5, 10, 15, 20)
    assert names(paths) == ["inputs-one", "progress-00015-one", "progress-00020-one"]
    clear(paths, 0)
    clear(paths, 0)
    assert load(paths, 0, EXPECT) is None
    assert not paths.checkpoints(0).exists()


def test_after_any_damage_the_checkpoint_before_is_loaded(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 5, 10)
    newest = next(paths.checkpoints(0).glob("progress-00010-*"))
    data = newest.read_bytes()
    for length in range(len(data)):
        newest.write_bytes(data[:length])
        assert load_checkpoint(paths).step == 5
        assert not newest.exists()
    for position in range(0, len(data), 7):
        newest.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert load_checkpoint(paths).step == 5
    newest.write_bytes(data)
    assert load_checkpoint(paths).step == 10


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_progress_without_its_inputs_is_not_loaded(tmp_path: Path, damage: str) -> None:
    paths = run_folder(tmp_path)
    inputs = paths.checkpoints(0) / save(paths, 5, 10)
    inputs.unlink() if damage == "missing" else inputs.write_bytes(inputs.read_bytes()[:-1])
    assert load(paths, 0, EXPECT) is None
    assert names(paths) == []
    save(paths, 5, attempt="two")
    assert load_checkpoint(paths).inputs_meta == {"items": ["two"]}


def test_progress_is_loaded_with_the_inputs_of_its_own_attempt(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 10, attempt="one")
    save(paths, 5, attempt="two")
    assert load_checkpoint(paths).inputs_meta == {"items": ["one"]}
    save(paths, 15, attempt="two")
    assert load_checkpoint(paths).inputs_meta == {"items": ["two"]}


def test_a_checkpoint_of_another_job_or_shard_is_quarantined(tmp_path: Path) -> None:
    paths = run_folder(tmp_path, shards=2)
    save(paths, 5)
    save(paths, 10, attempt="other", fingerprint="g")
    paths.checkpoints(1).mkdir()
    for path in paths.checkpoints(0).iterdir():
        (paths.checkpoints(1) / path.name).write_bytes(path.read_bytes())
    assert load_checkpoint(paths).step == 5
    assert load(paths, 1, EXPECT) is None
    assert "another fingerprint" in (paths.quarantine / "reasons.txt").read_text()
    assert "another shard" in (paths.quarantine / "reasons.txt").read_text()


def test_saving_the_same_checkpoint_twice_is_no_error(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 5)
    save(paths, 5)
    assert names(paths) == ["inputs-one", "progress-00005-one"]
