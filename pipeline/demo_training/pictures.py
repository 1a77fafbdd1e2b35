"""Pictures to learn from, drawn by numpy and Pillow alone: scenes, and the same painted, printed, laid and woven.

`picture(seed, number)` is a pure function; together with the textures that scikit-image ships (`textures`), these
are all that the demo model has ever seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from demo_training.float_images import (
    SIDE,
    Field,
    Random,
    cloud,
    coloured,
    grid,
    palette,
)
from demo_training.renderers import MANNERS


def picture(seed: int, number: int) -> tuple[NDArray[np.uint8], str]:
    """Picture `number` of `seed`, (SIDE, SIDE, 3), and its caption: how it is made."""
    random = np.random.default_rng([seed, number])
    scene = SCENES[random.choice(len(SCENES), p=SCENE_SHARES)](random)
    caption, render = MANNERS[number % len(MANNERS)]
    painted = render(random, scene)
    if random.random() < 0.3:  # the light of a camera, or varnish
        painted = painted * (0.75 + 0.5 * cloud(random, 2.2)[..., None])
    if random.random() < 0.3:
        painted = painted + random.normal(0, random.uniform(0.01, 0.05), painted.shape)
    return (np.clip(painted, 0, 1) * 255 + 0.5).astype(np.uint8), caption


def textures() -> list[tuple[NDArray[np.uint8], str]]:
    """The public-domain and CC0 pictures of scikit-image that the quickstart does not show, (H, W, 3) each."""
    from skimage import data

    names = ("brick", "grass", "gravel", "hubble_deep_field", "moon", "retina", "clock", "cell")
    pictures = []
    for name in names:
        pixels = np.asarray(getattr(data, name)())
        colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        pictures.append((np.ascontiguousarray(colour[..., :3]), "a photo"))
    return pictures


# --- scenes -----------------------------------------------------------------------------------------------------------


def clouds(random: Random) -> Field:
    return coloured(cloud(random, random.uniform(1.0, 2.2)), palette(random))


def gradients(random: Random) -> Field:
    x, y = grid()
    angle = random.uniform(0, 2 * np.pi)
    tone = (np.cos(angle) * x + np.sin(angle) * y) / SIDE
    if random.random() < 0.5:
        tone = np.hypot(x - random.uniform(0, SIDE), y - random.uniform(0, SIDE)) / SIDE
    return coloured(np.clip(tone % 1, 0, 1), palette(random, 4))


def landscape(random: Random) -> Field:
    """A sky, hills one behind the other, perhaps a sun and its light on water."""
    x, y = grid()
    scene = coloured(np.clip(y / SIDE * 0.9 + 0.2 * cloud(random, 2), 0, 1), palette(random, 3)[::-1])
    if random.random() < 0.6:
        far = np.hypot(x - random.uniform(40, SIDE - 40), y - random.uniform(20, 140))
        scene += np.clip(random.uniform(20, 45) - far, 0, 1)[..., None] * palette(random, 3)[-1]
    colours = palette(random, 6)
    for depth, height in enumerate(np.sort(random.uniform(0.3, 0.9, random.integers(2, 6)))):
        line = height * SIDE - 60 * cloud(random, 1.6)[0] * (1 - height / 2)
        ground = colours[depth % 6] * (0.6 + 0.6 * cloud(random, random.uniform(0.6, 1.5))[..., None])
        scene = np.where((y > line[None])[..., None], ground, scene)
    return np.clip(scene, 0, 1)


def leaves(random: Random) -> Field:
    """Dead leaves: things that hide each other, in all sizes, each flat, shaded or textured, as in photographs."""
    x, y = grid()
    scene = coloured(cloud(random, 1.8), palette(random, 3))
    colours = palette(random, 8)
    for size in np.sort(8 / random.uniform(0.05, 1, random.integers(25, 70)))[::-1]:
        cx, cy, turn, flat = (
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
        u = (x[rows, columns] - cx) * np.cos(turn) + (y[rows, columns] - cy) * np.sin(turn)
        v = (y[rows, columns] - cy) * np.cos(turn) - (x[rows, columns] - cx) * np.sin(turn)
        shape = np.hypot(u, v / flat) if random.random() < 0.6 else np.maximum(abs(u), abs(v) / flat)
        inside = np.clip(size - shape, 0, 1)[..., None]
        light = 1 + random.uniform(-0.6, 0.6) * (u + v)[..., None] / size / 2
        colour = colours[random.integers(8)] * light
        if random.random() < 0.3:
            colour = colour * (0.8 + 0.4 * (np.sin(u * random.uniform(0.2, 1.5)) > 0)[..., None])
        scene[rows, columns] = scene[rows, columns] * (1 - inside) + np.clip(colour, 0, 1) * inside
    return scene


def solids(random: Random) -> Field:
    """Balls and boxes in the light of one lamp, with shadows, on a table before a wall."""
    x, y = grid()
    colours = palette(random, 6)
    table = random.uniform(0.4, 0.8) * SIDE
    scene = np.where(
        (y > table)[..., None],
        colours[4] * (0.5 + 0.5 * y / SIDE)[..., None],
        colours[1] + 0.15 * cloud(random, 2)[..., None],
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


SCENES: tuple[Callable[[Random], Field], ...] = (clouds, gradients, landscape, leaves, solids)
SCENE_SHARES = (0.15, 0.05, 0.25, 0.35, 0.2)
