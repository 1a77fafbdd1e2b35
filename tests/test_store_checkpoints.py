"""A checkpoint comes back exactly as it was saved, or an older one does, or none: never something else."""

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
    "step_count": np.array(7, dtype=np.int64),  # a scalar stays one
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


def found(paths: RunPaths) -> Checkpoint:
    checkpoint = load(paths, 0, EXPECT)
    assert checkpoint is not None
    return checkpoint


def names(paths: RunPaths) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[0] for path in paths.checkpoints(0).iterdir())


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    assert load(paths, 0, EXPECT) is None
    inputs = save(paths, 5, 10)
    checkpoint = found(paths)
    assert (checkpoint.step, checkpoint.inputs_name, checkpoint.inputs_meta) == (10, inputs, {"items": ["one"]})
    assert checkpoint.meta["losses"][0] == 0.5
    assert checkpoint.inputs["clean"].tolist() == [1, 1]
    for name, array in ARRAYS.items():
        back = checkpoint.arrays[name]
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)
        assert back.flags.writeable
    assert not files(paths.tmp)


def test_the_newest_two_are_kept_and_the_inputs(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 5, 10, 15, 20)
    assert names(paths) == ["inputs-one", "progress-00015-one", "progress-00020-one"]
    clear(paths, 0)
    clear(paths, 0)
    assert load(paths, 0, EXPECT) is None
    assert not paths.checkpoints(0).exists()


def test_any_truncation_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 5, 10)
    newest = next(paths.checkpoints(0).glob("progress-00010-*"))
    whole = newest.read_bytes()
    for length in range(len(whole)):
        newest.write_bytes(whole[:length])
        assert found(paths).step == 5
        assert not newest.exists()
    for place in range(0, len(whole), 7):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert found(paths).step == 5
    newest.write_bytes(whole)
    assert found(paths).step == 10


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_progress_without_its_inputs_is_none(tmp_path: Path, damage: str) -> None:
    paths = run_folder(tmp_path)
    inputs = paths.checkpoints(0) / save(paths, 5, 10)
    inputs.unlink() if damage == "missing" else inputs.write_bytes(inputs.read_bytes()[:-1])
    assert load(paths, 0, EXPECT) is None
    assert names(paths) == []
    save(paths, 5, attempt="two")
    assert found(paths).inputs_meta == {"items": ["two"]}


def test_progress_is_joined_to_the_inputs_it_was_made_from(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 10, attempt="one")
    save(paths, 5, attempt="two")
    assert found(paths).inputs_meta == {"items": ["one"]}
    save(paths, 15, attempt="two")
    assert found(paths).inputs_meta == {"items": ["two"]}


def test_that_of_another_job_or_shard_is_set_aside(tmp_path: Path) -> None:
    paths = run_folder(tmp_path, shards=2)
    save(paths, 5)
    save(paths, 10, attempt="other", fingerprint="g")
    paths.checkpoints(1).mkdir()
    for path in paths.checkpoints(0).iterdir():
        (paths.checkpoints(1) / path.name).write_bytes(path.read_bytes())
    assert found(paths).step == 5
    assert load(paths, 1, EXPECT) is None
    assert "another fingerprint" in (paths.quarantine / "reasons.txt").read_text()
    assert "another shard" in (paths.quarantine / "reasons.txt").read_text()


def test_saving_the_same_twice_is_no_error(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    save(paths, 5)
    save(paths, 5)
    assert names(paths) == ["inputs-one", "progress-00005-one"]
