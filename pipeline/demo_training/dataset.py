"""The training pictures as tensors, and random batches of crops from them."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import Pool
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from demo_training.pictures import SIDE, picture, textures

TEXTURE_SHARE = 0.05  # crops of textures for each drawn picture


def _draw(task: tuple[int, int]) -> tuple[Any, str]:
    return picture(*task)


def draw_dataset(seed: int, count: int) -> tuple[torch.Tensor, list[str]]:
    """`count` drawn pictures and some crops of textures, (N, 3, SIDE, SIDE) uint8, and their captions."""
    with Pool() as workers:
        drawn = workers.map(_draw, [(seed, number) for number in range(count)], chunksize=16)
    random = np.random.default_rng([seed, 1 << 32])
    photos = textures()
    for number in range(int(count * TEXTURE_SHARE)):
        pixels, caption = photos[number % len(photos)]
        side = int(random.integers(min(200, min(pixels.shape[:2])), min(pixels.shape[:2]) + 1))
        top, left = (int(random.integers(0, length - side + 1)) for length in pixels.shape[:2])
        crop = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
        scaled = F.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        drawn.append((scaled.permute(1, 2, 0).round().byte().numpy(), caption))
    return torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2), [text for _, text in drawn]


def augment(images: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """A uint8 batch in -1..1, with random flips, permuted or inverted colours, and changed lightness."""
    images = images.float() / 127.5 - 1
    if random.random() < 0.5:
        images = images.flip(-1)
    if random.random() < 0.5:
        images = images[:, list(random.permutation(3))]
    if random.random() < 0.15:
        images = -images
    gain = torch.from_numpy(random.uniform(0.7, 1.1, (len(images), 1, 1, 1))).float()
    return (images * gain + torch.from_numpy(random.normal(0, 0.1, (len(images), 1, 1, 1))).float()).clamp(-1, 1)


def random_crops(images: torch.Tensor, batch: int, side: int, random: np.random.Generator) -> Iterator[torch.Tensor]:
    """Yield batches of crops at many scales, (batch, 3, side, side) in -1..1, without end."""
    while True:
        crops = []
        for number in random.integers(0, len(images), batch):
            size = side if random.random() < 0.5 else int(random.integers(side // 2, SIDE + 1))
            top, left = random.integers(0, SIDE - size + 1, 2)
            crop = images[number, :, top : top + size, left : left + size][None].float()
            if size != side:
                crop = F.interpolate(crop, (side, side), mode="bilinear", antialias=True)
            crops.append(augment(crop, random))
        yield torch.cat(crops)
