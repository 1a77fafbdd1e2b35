"""The automatic number of pairs in a shard: what sharing saves, and what uneven shards cost, for the whole run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stylemill.config.job import Job
from stylemill.manifest import Manifest, Row, open_manifest
from stylemill.manifest.tile_order import TileOrder
from stylemill.planning.cost import Cost, count_cost
from stylemill.planning.shard_size import GRADIENT, MAX_PAIRS_PER_SHARD, choose_pairs_per_shard, fastest_size

Pairs = Iterator[tuple[int, int]]  # the numbers of content and style


def _product(contents: int, styles: int, tile: tuple[int, int] | None = None) -> Pairs:
    """The pairs of a product, in the order in which `manifest build` writes them."""
    order = TileOrder.of(contents, styles, tile[0] * tile[1] if tile else 64, tile)
    return map(order.pair, range(len(order)))


def _sample(contents: int, styles: int, count: int) -> Pairs:
    order = TileOrder.of(contents, styles, 64)
    return map(order.pair, sorted(random.Random(0).sample(range(len(order)), count)))


@pytest.fixture(scope="module")
def manifest_of(tmp_path_factory) -> Callable[[str, Pairs], Manifest]:
    """Writes a manifest of these pairs, once for each name."""
    folder = tmp_path_factory.mktemp("manifests")

    def write(name: str, pairs: Pairs) -> Manifest:
        path = folder / f"{name}.parquet"
        if not path.exists():
            contents, styles = zip(*pairs, strict=True)
            columns = {"content": [f"c{c}" for c in contents], "style": [f"s{s}" for s in styles]}
            pq.write_table(pa.table(columns), path, row_group_size=64)
        return open_manifest(path)

    return write


def _job(workers: int, **sampling: object) -> Job:
    return Job.parse(
        {
            "name": "test",
            "manifest": "pairs.parquet",
            "output": "run",
            "model": "demo",
            "sampling": {"steps": 6, **sampling},
            "cluster": {"workers": workers, "gpus_per_worker": 0},
        }
    )


JOBS: dict[str, Callable[[], Pairs]] = {
    "3 × 6": lambda: _product(3, 6),
    "6 × 3": lambda: _product(6, 3),
    "18 × 1": lambda: _product(18, 1),
    "1 × 18": lambda: _product(1, 18),
    "5 × 5": lambda: _product(5, 5),
    "5 × 5 in tiles of 16 × 16": lambda: _product(5, 5, (16, 16)),
    "64 × 64": lambda: _product(64, 64),
    "64 × 64 in tiles of 16 × 16": lambda: _product(64, 64, (16, 16)),
    "1000 × 100": lambda: _product(1000, 100),
    "zip of 1000": lambda: ((number, number) for number in range(1000)),
    "1000 of 300 × 300": lambda: _sample(300, 300, 1000),
}


@pytest.mark.parametrize(
    ("pairs", "sizes"),
    [  # by number of workers
        ("3 × 6", {1: 18, 2: 9, 4: 5, 8: 3}),
        ("6 × 3", {1: 18, 2: 9, 4: 5, 8: 3}),
        ("18 × 1", {1: 18, 2: 9, 4: 5, 8: 3}),
        ("1 × 18", {1: 18, 2: 9, 4: 5, 8: 3}),
        ("5 × 5", {1: 25, 2: 13, 4: 7, 8: 4}),
        ("5 × 5 in tiles of 16 × 16", {1: 25, 2: 13, 4: 7, 8: 4}),
        ("64 × 64", {1: 256, 2: 256, 4: 205, 8: 128, 64: 32}),
        ("64 × 64 in tiles of 16 × 16", {1: 256, 2: 256, 4: 256, 8: 128, 64: 32}),
        ("1000 × 100", {1: 256, 8: 256, 64: 224}),
        ("zip of 1000", {1: 250, 2: 50, 8: 25, 64: 8}),
        ("1000 of 300 × 300", {1: 255, 2: 168, 8: 25, 64: 8}),
    ],
)
def test_the_size_of_shards(manifest_of, pairs, sizes):
    manifest = manifest_of(pairs, JOBS[pairs]())
    assert {workers: choose_pairs_per_shard(_job(workers), manifest, None) for workers in sizes} == sizes


@pytest.mark.slow
def test_a_million_rows_for_a_thousand_workers(manifest_of):
    manifest = manifest_of("1000 × 1000", _product(1000, 1000))
    assert choose_pairs_per_shard(_job(1000), manifest, None) == 200


def _costs(job: Job, rows: list[Row], size: int) -> list[Cost]:
    return [count_cost(job, [rows[start : start + size]], None) for start in range(0, len(rows), size)]


@pytest.mark.parametrize("workers", [2, 8])
@pytest.mark.parametrize("pairs", [name for name in JOBS if name != "1000 × 100"])
def test_hardly_any_other_size_with_as_many_and_as_even_shards_makes_fewer_passes(manifest_of, pairs, workers):
    manifest, job = manifest_of(pairs, JOBS[pairs]()), _job(workers)
    rows = list(manifest.rows())

    def passes(size: int) -> int:
        return sum(cost.with_sharing for cost in _costs(job, rows, size))

    chosen = choose_pairs_per_shard(job, manifest, None)
    shards = -(-len(rows) // chosen)
    even = -(-len(rows) // shards)
    others = [size for size in range(even, even + even // 8 + 1) if -(-len(rows) // size) == shards]
    assert passes(chosen) <= 1.01 * min(map(passes, others))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("pairs", list(JOBS)[:6])
def test_hardly_any_size_is_done_before_the_chosen_one(manifest_of, pairs, workers):
    """By the passes of each shard, handed out one at a time to the worker that is free first."""
    manifest, job = manifest_of(pairs, JOBS[pairs]()), _job(workers)
    rows = list(manifest.rows())

    def done(size: int) -> int:
        free = [0] * workers
        for cost in _costs(job, rows, size):
            free.sort()
            free[0] += cost.denoise + GRADIENT * cost.gradient + cost.shared_features
        return max(free)

    best = min(map(done, range(1, len(rows) + 1)))
    assert done(choose_pairs_per_shard(job, manifest, None)) <= 1.1 * best


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 1000), st.integers(512, 10_000), st.floats(0, 2))
def test_a_large_job_has_about_four_shards_for_each_worker(
    workers: int, pairs_of_a_worker: int, images_of_a_pair: float
):
    """So that a slow worker, or one that died, does not keep the others waiting for long."""
    rows = workers * pairs_of_a_worker
    square = [2 * pairs**0.5 for pairs in range(MAX_PAIRS_PER_SHARD + 1)]  # of a perfect tile
    for images in (square, [images_of_a_pair * pairs for pairs in range(MAX_PAIRS_PER_SHARD + 1)]):
        size = fastest_size(rows, workers, 4, 1, images)
        assert -(-rows // size) >= 3.9 * workers


def test_without_shared_features_shards_are_small(manifest_of):
    """With nothing to share, only the overhead of a shard speaks against small ones."""
    manifest = manifest_of("64 × 64", JOBS["64 × 64"]())
    assert choose_pairs_per_shard(_job(8, iterations=0), manifest, None) < 128
