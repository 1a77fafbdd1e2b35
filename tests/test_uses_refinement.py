"""Refinement of the VAE's decoder on each style: against the oracle, with the cache of a run, and undone afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import oracle
import stylemill
from stylemill.config.model import DType
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, InputImage, Pair, SampleState
from stylemill.engine.unet.decoder_refinement import RecentDecoders, copied_decoder, fine_tune_decoder
from stylemill.errors import StorageError
from stylemill.store import decoder_cache
from stylemill.store.decoder_cache import RunDecoders
from stylemill.store.paths import RunPaths
from stylemill.store.run_file import create_run_folder

SIZE = (64, 64)
REFINED = Sampling(steps=1, refine_decoder_steps=3)
PLAIN = Sampling(steps=1)


def image(number: int) -> InputImage:
    random = np.random.default_rng(number)
    pixels = np.kron(random.integers(30, 226, (4, 4, 3)), np.ones((16, 16, 1))) + random.integers(-30, 30, (64, 64, 3))
    return InputImage(f"image {number}", pixels.astype(np.uint8))


CONTENT, STYLES = image(1), [image(11), image(12)]
FIRST, SECOND = Pair((STYLES[0],), SIZE, CONTENT), Pair((STYLES[1], STYLES[0]), SIZE, CONTENT)
SHARD = [FIRST, SECOND, Pair((STYLES[0],), SIZE, seed=3), Pair((STYLES[1],), SIZE)]


@pytest.fixture(scope="module")
def engine(engine32: Engine) -> Engine:
    return Engine(engine32.model)  # with its own RecentDecoders


@pytest.fixture(scope="module")
def state(engine: Engine) -> SampleState:
    return last(engine)


@pytest.fixture(scope="module")
def images(engine: Engine, state: SampleState) -> list[Any]:
    return engine.decode(state, Cache())


def load(folder: Path, dtype: DType) -> Engine:
    return Engine.load(folder, dtype=dtype, device="cpu")


def last(engine: Engine, pairs: Sequence[Pair] = SHARD, settings: Sampling = REFINED) -> SampleState:
    *_, state = engine.sample(pairs, settings)
    return state


def same(actual: Sequence[Any], expected: Sequence[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(actual, expected, strict=True))


class Cache(dict[str, Any]):
    """A DecoderCache that records the keys it was given. An empty one is falsy, like any dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[str] = []

    def put(self, key: str, arrays: Any) -> None:
        self[key] = arrays
        self.stored.append(key)


# --- against the oracle --------------------------------------------------------------------------------------------


def test_a_refined_decoder_and_its_images_equal_the_oracle(folder: Path, model: oracle.Model) -> None:
    engine, cache = load(folder, "float64"), Cache()
    state = last(engine)
    images = engine.decode(state, cache)
    assert [key[:32] for key in cache.stored] == [STYLES[0].digest[:32], STYLES[1].digest[:32]]
    for pair, pixels, latents in zip(SHARD, images, state.latents, strict=True):
        style = pair.styles[0]  # the first of several decides
        naive, losses = oracle.refined(model, style.pixels, 3, 1e-4)
        assert losses[0] > losses[1] > losses[2]
        refined = next(arrays for key, arrays in cache.items() if key.startswith(style.digest[:32]))
        expected, original = naive.vae.decoder.state_dict(), engine.model.vae.decoder.state_dict()
        for name in original:
            actual = torch.from_numpy(refined[name]) if name in refined else original[name]
            torch.testing.assert_close(actual, expected[name], rtol=0, atol=1e-8)
        assert (
            np.abs(pixels.astype(int) - naive.decode(latents[None])).max() <= 1
        )  # values halfway between two integers may round to either


def test_fine_tuning_reduces_the_loss_and_returns_the_changed_tensors(engine: Engine) -> None:
    vae = engine.model.vae
    target = torch.from_numpy(STYLES[0].pixels / 127.5 - 1).float().permute(2, 0, 1)[None]
    latent = vae.encode(target).latent_dist.mean

    def distance() -> float:
        with torch.no_grad():
            return float((vae.decode(latent).sample - target).abs().mean())

    before = distance()
    with copied_decoder(vae, torch.float32):
        assert fine_tune_decoder(vae, latent, target, 0, 1e-3) == {}
        changed = fine_tune_decoder(vae, latent, target, 20, 1e-4)
        assert distance() < 0.9 * before
        assert set(changed) <= set(vae.decoder.state_dict())
    assert distance() == before


# --- the model's own decoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_original_decoder_is_restored_and_the_refined_one_is_float32(folder: Path, dtype: DType) -> None:
    engine, cache = load(folder, dtype), Cache()
    vae, state = engine.model.vae, last(engine)
    modules = vae.decoder, vae.post_quant_conv
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    plain = engine.decode(last(engine, settings=PLAIN))
    assert not same(engine.decode(state, cache), plain)
    assert all(array.dtype == np.float32 for arrays in cache.values() for array in arrays.values())
    assert (vae.decoder, vae.post_quant_conv) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert same(engine.decode(last(engine, settings=PLAIN)), plain)


def test_the_original_decoder_is_restored_after_an_error(
    engine: Engine, state: SampleState, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingCache(Cache):
        def put(self, key: str, arrays: Any) -> None:
            raise KeyboardInterrupt

    original = engine.model.vae.decoder
    with pytest.raises(KeyboardInterrupt):
        engine.decode(state, FailingCache())
    assert engine.model.vae.decoder is original
    engine.decode(state)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.decode(state, Cache())
    assert engine.model.vae.decoder is original
    assert same(engine.decode(state), images)  # from the engine's RecentDecoders


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_each_pair_of_a_shard_equals_the_pair_alone(engine: Engine, images: list[Any]) -> None:
    assert same(images, [engine.decode(last(engine, [pair]), Cache())[0] for pair in SHARD])


def test_an_unreadable_style_fails_its_pairs_and_no_decoder_is_refined_on_it(engine: Engine, images: list[Any]) -> None:
    cache, pairs = Cache(), [Pair((InputImage("unreadable", None),), SIZE), *SHARD[1:]]
    first, *others = engine.decode(last(engine, pairs), cache)
    assert first is None
    assert same(others, images[1:])
    assert len(cache.stored) == 2


def test_a_refined_decoder_with_nan_fails_its_pairs(engine: Engine) -> None:
    state = last(engine, settings=REFINED.model_copy(update={"refine_decoder_lr": 1e36}))
    assert engine.decode(state, Cache()) == [None] * 4
    assert sorted(state.failures) == [0, 1, 2, 3]
    assert "refine_decoder_lr" in state.failures[0].message


def test_tiling_changes_the_image_and_not_the_refinement(engine: Engine, state: SampleState) -> None:
    cache, tiled = Cache(), Cache()
    plain = engine.decode(state, cache)
    wrapped = engine.decode(replace(state, inputs=replace(state.inputs, tiling="both")), tiled)
    assert not same(plain, wrapped)
    assert cache.keys() == tiled.keys()
    for key, arrays in cache.items():
        assert all(np.array_equal(array, tiled[key][name]) for name, array in arrays.items())


# --- checkpoint and cache ------------------------------------------------------------------------------------------


def test_a_restored_state_decodes_to_the_same_bytes_without_reading_images(
    engine: Engine, state: SampleState, images: list[Any]
) -> None:
    (arrays, facts), (progress, progress_facts) = state.export_inputs(), state.export_progress()
    kept = {name: array for name, array in arrays.items() if name.startswith("pixels")}
    assert sorted(array.size for array in kept.values()) == [0, 64 * 64 * 3, 64 * 64 * 3]  # empty for the content
    assert all(array.dtype == np.uint8 for array in kept.values())
    assert not any(name.startswith("pixels") for name in last(engine, settings=PLAIN).export_inputs()[0])
    facts, progress_facts = json.loads(json.dumps(facts)), json.loads(json.dumps(progress_facts))
    restored = SampleState.restore(arrays, facts, progress, progress_facts)
    assert list(engine.sample([], REFINED, restored)) == []
    assert same(engine.decode(restored, Cache()), images)


def test_recent_decoders_keeps_those_used_last() -> None:
    recent = RecentDecoders(2)
    for key in "ab":
        recent.put(key, {})
    assert recent.get("a") == {}
    recent.put("c", {})
    assert [key for key in "abc" if recent.get(key) is not None] == ["a", "c"]


def paths_of(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run", 1)
    create_run_folder(paths)
    return paths


def damaged(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], damaged, lambda _: b""])
def test_a_damaged_file_of_the_runs_cache_is_made_again_with_equal_bytes(
    engine: Engine, state: SampleState, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    paths = paths_of(tmp_path)
    decoded = engine.decode(state, RunDecoders(paths, "one"))
    files = {path.name: path.read_bytes() for path in paths.decoders_folder.iterdir()}
    assert [name[:32] for name in sorted(files)] == sorted(style.digest[:32] for style in STYLES)
    assert same(engine.decode(state, RunDecoders(paths, "two")), decoded)

    name = min(files)
    (paths.decoders_folder / name).write_bytes(damage(files[name]))
    assert same(engine.decode(state, RunDecoders(paths, "three")), decoded)
    assert {path.name: path.read_bytes() for path in paths.decoders_folder.iterdir()} == files
    assert list(paths.tmp.iterdir()) == []


def test_the_runs_cache_is_used(
    engine: Engine, state: SampleState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = paths_of(tmp_path)
    decoded = engine.decode(state, RunDecoders(paths, "one"))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: 1 / 0)
    assert same(engine.decode(state, RunDecoders(paths, "two")), decoded)
    longer = replace(state, inputs=replace(state.inputs, refine_steps=4))
    with pytest.raises(ZeroDivisionError):
        engine.decode(longer, RunDecoders(paths, "two"))


def test_decoding_works_when_the_cache_cannot_be_written(
    engine: Engine,
    state: SampleState,
    images: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> bool:
        raise StorageError("the disk is full")

    monkeypatch.setattr(decoder_cache, "publish_bytes", full)
    assert same(engine.decode(state, RunDecoders(paths_of(tmp_path), "one")), images)
    assert "the disk is full" in caplog.text


# --- a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_refines_each_style_once_and_removes_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (CONTENT, *STYLES):
        Image.fromarray(given.pixels).save(tmp_path / f"{given.name}.png")
    styles = [f"{style.name}.png" for style in (STYLES[0], STYLES[1], STYLES[1], STYLES[0])]
    pq.write_table(pa.table({"content": [f"{CONTENT.name}.png"] * 4, "style": styles}), tmp_path / "pairs.parquet")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"manifest: pairs.parquet\nmodel: {folder}\noutput: run\nimage: {{size: 64}}\nshards: {{pairs_per_shard: 2}}\n"
        "sampling: {steps: 1, refine_decoder_steps: 2}\ncluster: {micro_batch: 1}\n"
    )
    stored, put = [], RunDecoders.put

    def counting(self: RunDecoders, key: str, arrays: Any) -> None:
        stored.append(key)
        put(self, key, arrays)

    monkeypatch.setattr(RunDecoders, "put", counting)
    assert stylemill.run(job, inline=True, quiet=True).exit_code == 0
    assert len(stored) == len(set(stored)) == 2  # two shards, the same two styles
    assert not (tmp_path / "run" / "cache").exists()
    assert stylemill.verify(tmp_path / "run", deep=True).ok


def test_a_refinement_rate_without_refinement_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"refine_decoder_lr.*refine_decoder_steps"):
        Sampling(refine_decoder_lr=1e-3)
