"""Pairs to measure with: a tile of contents × styles, made up of random images."""

from __future__ import annotations

import numpy as np

from stylemill.bench.result import Tile
from stylemill.engine import InputImage, Pair


def random_images(count: int, size: int) -> list[InputImage]:
    """Different images of size × size pixels, of large patches with noise."""
    rng = np.random.default_rng(0)
    patches = [np.kron(rng.integers(30, 226, (8, 8, 3)), np.ones((size // 8, size // 8, 1))) for _ in range(count)]
    noisy = [patch + rng.integers(-30, 30, patch.shape) for patch in patches]
    return [InputImage(f"image {number}", pixels.astype(np.uint8)) for number, pixels in enumerate(noisy)]


def tile_pairs(tile: Tile, size: int) -> list[Pair]:
    """Every content of the tile with every style, size × size pixels."""
    contents, styles = tile
    images = random_images(contents + styles, size)
    return [Pair((style,), (size, size), content) for content in images[:contents] for style in images[contents:]]
