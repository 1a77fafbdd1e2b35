"""Numbers for how much an image has of a style and of a content. Images are (H, W, 3) uint8; numpy only.

Style: sliced Wasserstein distances between the colours of two images, and between their patches at three scales (Rabin
et al. 2011; as texture statistics: Heitz et al. 2021). Content: the correlation of edge maps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Samples = NDArray[np.float64]  # (samples, dimensions)

DIRECTIONS = 96
PATCH = 7  # side, in pixels
SAMPLES = 4096  # pixels or patches of an image, at each scale
SCALES = 3  # each has half the side of the one before


def colour_distance(a: Pixels, b: Pixels) -> float:
    """Distance between the colours of two images, where 1 is the distance from black to white."""
    return sliced_wasserstein(_unit(a).reshape(-1, 3), _unit(b).reshape(-1, 3))


def patch_distance(a: Pixels, b: Pixels) -> float:
    """Distance between the patches of two images, each patch without its mean colour: the mean over the scales."""
    distances = []
    for scale in range(SCALES):
        scaled_a, scaled_b = _downscaled(_unit(a), scale), _downscaled(_unit(b), scale)
        if min(*scaled_a.shape[:2], *scaled_b.shape[:2]) < 2 * PATCH:
            break
        distances.append(sliced_wasserstein(_patches(scaled_a), _patches(scaled_b)))
    return float(np.mean(distances))


def edge_agreement(a: Pixels, b: Pixels) -> float:
    """Correlation of two images' smoothed edge strength: 1 for equal images, about 0 for unrelated ones."""
    return float(np.corrcoef(_edges(a).ravel(), _edges(b).ravel())[0, 1])


def sliced_wasserstein(a: Samples, b: Samples) -> float:
    """1-Wasserstein distance of the projections to random directions, which are always the same: the mean of them."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((a.shape[1], DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    count = min(len(a), len(b), SAMPLES)
    sorted_a, sorted_b = (np.sort(_subset(samples, count) @ directions, axis=0) for samples in (a, b))
    return float(np.abs(sorted_a - sorted_b).mean())


def _subset(samples: Samples, count: int) -> Samples:
    return samples[np.linspace(0, len(samples) - 1, count).astype(int)]


def _unit(pixels: Pixels) -> Any:
    return pixels.astype(np.float64) / 255


def _downscaled(image: Any, scale: int) -> Any:
    for _ in range(scale):
        height, width = (length // 2 * 2 for length in image.shape[:2])
        image = image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    return image


def _patches(image: Any) -> Samples:
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH), (0, 1))
    flat = windows.reshape(-1, 3, PATCH * PATCH)
    subset = _subset(flat, min(SAMPLES, len(flat)))
    centred = subset - subset.mean(2, keepdims=True)
    return np.asarray(centred.reshape(len(centred), -1))


def _edges(pixels: Pixels) -> Any:
    grey = _blur(_unit(pixels).mean(2), 1.5)
    down, right = np.gradient(grey)
    return _blur(np.hypot(down, right), 2.5)


def _blur(image: Any, sigma: float) -> Any:
    reach = int(3 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for _ in range(2):
        padded = np.pad(image, [(reach, reach), (0, 0)], mode="edge")
        image = sum(weight * padded[place : place + len(image)] for place, weight in enumerate(weights)).T
    return image
