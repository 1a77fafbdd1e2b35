"""Training pictures: random scenes, drawn by numpy and Pillow and rendered in many techniques.

Together with the textures of scikit-image (`textures`), they are all the training data of the demo model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from demo_training.float_images import (
    SIDE,
    FloatImage,
    Generator,
    apply_palette,
    fractal_noise,
    palette,
    pixel_coordinates,
)
from demo_training.renderers import RENDERERS


def picture(seed: int, number: int) -> tuple[NDArray[np.uint8], str]:
    """Picture `number` of `seed`, (SIDE, SIDE, 3), and its caption, which names the technique.

    The same arguments always give the same picture.
    """
    random = np.random.default_rng([seed, number])
    scene = SCENES[random.choice(len(SCENES), p=SCENE_SHARES)](random)
    caption, render = RENDERERS[number % len(RENDERERS)]
    rendered = render(random, scene)
    if random.random() < 0.3:  # uneven light
        rendered = rendered * (0.75 + 0.5 * fractal_noise(random, 2.2)[..., None])
    if random.random() < 0.3:
        rendered = rendered + random.normal(0, random.uniform(0.01, 0.05), rendered.shape)
    return (np.clip(rendered, 0, 1) * 255 + 0.5).astype(np.uint8), caption


def textures() -> list[tuple[NDArray[np.uint8], str]]:
    """Public-domain and CC0 pictures of scikit-image, (H, W, 3) each, with captions; none is in the quickstart."""
    from skimage import data

    names = ("brick", "grass", "gravel", "hubble_deep_field", "moon", "retina", "clock", "cell")
    pictures = []
    for name in names:
        pixels = np.asarray(getattr(data, name)())
        colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        pictures.append((np.ascontiguousarray(colour[..., :3]), "a photo"))
    return pictures


# --- scenes -----------------------------------------------------------------------------------------------------------


def clouds(random: Generator) -> FloatImage:
    return apply_palette(fractal_noise(random, random.uniform(1.0, 2.2)), palette(random))


def gradients(random: Generator) -> FloatImage:
    x, y = pixel_coordinates()
    angle = random.uniform(0, 2 * np.pi)
    tone = (np.cos(angle) * x + np.sin(angle) * y) / SIDE
    if random.random() < 0.5:
        tone = np.hypot(x - random.uniform(0, SIDE), y - random.uniform(0, SIDE)) / SIDE
    return apply_palette(np.clip(tone % 1, 0, 1), palette(random, 4))


def landscape(random: Generator) -> FloatImage:
    """A sky, several hills one behind the other, and in most cases a sun."""
    x, y = pixel_coordinates()
    scene = apply_palette(np.clip(y / SIDE * 0.9 + 0.2 * fractal_noise(random, 2), 0, 1), palette(random, 3)[::-1])
    if random.random() < 0.6:
        distance = np.hypot(x - random.uniform(40, SIDE - 40), y - random.uniform(20, 140))
        scene += np.clip(random.uniform(20, 45) - distance, 0, 1)[..., None] * palette(random, 3)[-1]
    colours = palette(random, 6)
    for depth, height in enumerate(np.sort(random.uniform(0.3, 0.9, random.integers(2, 6)))):
        line = height * SIDE - 60 * fractal_noise(random, 1.6)[0] * (1 - height / 2)
        ground = colours[depth % 6] * (0.6 + 0.6 * fractal_noise(random, random.uniform(0.6, 1.5))[..., None])
        scene = np.where((y > line[None])[..., None], ground, scene)
    return np.clip(scene, 0, 1)


def leaves(random: Generator) -> FloatImage:
    """Dead leaves, which have the statistics of photos: overlapping shapes of all sizes, flat, shaded or striped."""
    x, y = pixel_coordinates()
    scene = apply_palette(fractal_noise(random, 1.8), palette(random, 3))
    colours = palette(random, 8)
    for size in np.sort(8 / random.uniform(0.05, 1, random.integers(25, 70)))[::-1]:
        cx, cy, angle, flatness = (
            random.uniform(0, SIDE),
            random.uniform(0, SIDE),
            random.uniform(0, np.pi),
            random.uniform(0.3, 1),
        )
        reach = int(size) + 2
        rows = slice(max(0, int(cy) - reach), min(SIDE, int(cy) + reach))
        columns = slice(max(0, int(cx) - reach), min(SIDE, int(cx) + reach))
        if rows.stop - rows.start < 1 or columns.stop - columns.start < 1:
            continue
        u = (x[rows, columns] - cx) * np.cos(angle) + (y[rows, columns] - cy) * np.sin(angle)
        v = (y[rows, columns] - cy) * np.cos(angle) - (x[rows, columns] - cx) * np.sin(angle)
        shape = np.hypot(u, v / flatness) if random.random() < 0.6 else np.maximum(abs(u), abs(v) / flatness)
        inside = np.clip(size - shape, 0, 1)[..., None]
        light = 1 + random.uniform(-0.6, 0.6) * (u + v)[..., None] / size / 2
        colour = colours[random.integers(8)] * light
        if random.random() < 0.3:
            colour = colour * (0.8 + 0.4 * (np.sin(u * random.uniform(0.2, 1.5)) > 0)[..., None])
        scene[rows, columns] = scene[rows, columns] * (1 - inside) + np.clip(colour, 0, 1) * inside
    return scene


def solids(random: Generator) -> FloatImage:
    """Balls and boxes with shadows, lit by one lamp, on a table in front of a wall."""
    x, y = pixel_coordinates()
    colours = palette(random, 6)
    table = random.uniform(0.4, 0.8) * SIDE
    scene = np.where(
        (y > table)[..., None],
        colours[4] * (0.5 + 0.5 * y / SIDE)[..., None],
        colours[1] + 0.15 * fractal_noise(random, 2)[..., None],
    )
    lamp = random.uniform(-1, 1)
    for cy in np.sort(random.uniform(0.3, 1, random.integers(2, 7))) * SIDE:
        cx, size = random.uniform(0, SIDE), random.uniform(15, 80)
        colour = colours[random.integers(6)]
        shadow = np.exp(-(((x - cx + lamp * size) / size) ** 2 + ((y - cy - size * 0.8) / (0.3 * size)) ** 2))
        scene *= (1 - 0.6 * shadow)[..., None]
        u, v = (x - cx) / size, (y - cy) / size
        if random.random() < 0.6:
            depth = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
            light = np.clip(0.25 + 0.75 * (0.6 * depth - 0.5 * v + 0.5 * lamp * u), 0, 1)
            gloss = np.clip((0.5 * lamp * u - 0.55 * v + 0.62 * depth), 0, 1) ** 25
            inside = np.clip((1 - np.hypot(u, v)) * size, 0, 1)
            ball = colour * light[..., None] + gloss[..., None] * 0.8
        else:
            inside = np.clip((1 - np.maximum(abs(u), abs(v))) * size, 0, 1)
            ball = colour * (0.7 + 0.3 * lamp * np.sign(u + 0.3))[..., None]
        scene = scene * (1 - inside[..., None]) + ball * inside[..., None]
    return np.clip(scene, 0, 1).astype(np.float32)


SCENES: tuple[Callable[[Generator], FloatImage], ...] = (clouds, gradients, landscape, leaves, solids)
SCENE_SHARES = (0.15, 0.05, 0.25, 0.35, 0.2)
