"""Renderers: functions from a scene to an image of it in some technique, such as oil paint, mosaic or halftone.

Scenes and images are (SIDE, SIDE, 3) in 0..1 and may exceed that range.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

from demo_training.float_images import (
    SIDE,
    FloatImage,
    Generator,
    apply_palette,
    blur,
    fractal_noise,
    from_pil,
    luminance,
    palette,
    pixel_coordinates,
    to_pil,
    to_rgb,
)


def unchanged(random: Generator, scene: FloatImage) -> FloatImage:
    """The scene itself, blurred a little in half of the cases."""
    return blur(scene, random.uniform(0.3, 1.5)) if random.random() < 0.5 else scene


def oil_paint(random: Generator, scene: FloatImage) -> FloatImage:
    """Brush strokes along a flow, broad ones below narrow ones, each with bristles and a lighter edge."""
    canvas = to_pil(blur(scene, 6))
    draw = ImageDraw.Draw(canvas)
    flow = fractal_noise(random, 2.4) * random.uniform(2, 8)
    scale = random.uniform(0.6, 1.6)
    for width, length, count in ((14, 42, 250), (7, 26, 900), (4, 16, 900)):
        width, length = width * scale, length * scale
        for cx, cy in random.uniform(0, SIDE, (int(count / scale**1.5), 2)):
            column, row = min(int(cx), SIDE - 1), min(int(cy), SIDE - 1)
            angle = flow[row, column]
            colour = scene[row, column] * random.uniform(0.8, 1.2) + random.normal(0, 0.03, 3)
            along = np.array([np.cos(angle), np.sin(angle)])
            across = np.array([-along[1], along[0]])
            bristles = max(2, int(width / 2.5))
            for place in np.linspace(-0.5, 0.5, bristles):
                half = along * length / 2 * random.uniform(0.75, 1)
                middle = np.array([cx, cy]) + across * place * width
                shade = colour + 0.12 * (0.3 - place) + random.normal(0, 0.025)
                ends = [tuple(middle - half), tuple(middle + half)]
                draw.line(ends, fill=to_rgb(shade), width=int(width / bristles) + 1)
    return from_pil(canvas)


def voronoi_cells(random: Generator, count: int) -> tuple[NDArray[np.int64], FloatImage, NDArray[np.float64]]:
    """Cells of jittered grid points: the cell of each pixel, its distance to the cell's edge, and the points (x, y)."""
    across = int(np.sqrt(count)) + 1
    spacing = SIDE / across
    rows, columns = np.mgrid[-1 : across + 1, -1 : across + 1]
    points = (
        np.stack([columns, rows], -1).reshape(-1, 2) + 0.5 + random.uniform(-0.38, 0.38, ((across + 2) ** 2, 2))
    ) * spacing
    x, y = pixel_coordinates()
    cell_x, cell_y = (x / spacing).astype(int), (y / spacing).astype(int)
    best = np.full((2, SIDE, SIDE), 1e9)
    index = np.zeros((SIDE, SIDE), int)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            candidate = (cell_y + dy + 1) * (across + 2) + cell_x + dx + 1
            distance = np.hypot(x - points[candidate, 0], y - points[candidate, 1])
            nearer = distance < best[0]
            best[1] = np.where(nearer, best[0], np.minimum(best[1], distance))
            index = np.where(nearer, candidate, index)
            best[0] = np.minimum(best[0], distance)
    return index, (best[1] - best[0]).astype(np.float32), points


def mosaic(random: Generator, scene: FloatImage) -> FloatImage:
    """Tiles of one colour each, with grout between them."""
    index, edge, points = voronoi_cells(random, int(random.choice([150, 400, 900, 1600])))
    at = np.clip(points.astype(int), 0, SIDE - 1)
    colours = scene[at[:, 1], at[:, 0]] + random.normal(0, 0.06, (len(points), 1))
    grout = palette(random, 3)[random.choice([0, 2])]
    seam = np.clip(edge / random.uniform(1, 3) - 0.3, 0, 1)[..., None]
    return np.asarray(
        colours[index] * (0.85 + 0.15 * fractal_noise(random, 0.8)[..., None]) * seam + grout * (1 - seam)
    )


def hatching(random: Generator, scene: FloatImage) -> FloatImage:
    """Ink lines on paper in one to three directions, denser in dark places."""
    x, y = pixel_coordinates()
    tone = luminance(scene)
    paper, ink = (0.85 + 0.15 * palette(random, 3)[2]), palette(random, 4)[0] * 0.6
    wobble = 6 * fractal_noise(random, 2)
    cover = np.zeros((SIDE, SIDE), np.float32)
    spacing, angle = random.uniform(4, 9), random.uniform(0, np.pi)
    for layer in range(random.integers(1, 4)):
        turn = angle + layer * random.uniform(0.6, 1.4)
        phase = (x * np.cos(turn) + y * np.sin(turn) + wobble) / spacing
        line = abs(phase % 1 - 0.5) * 2
        dark = np.clip(1.1 - tone - 0.25 * layer, 0, 1)
        cover = np.maximum(cover, np.clip((dark - line) * spacing / 2, 0, 1))
    wash = random.choice([0.0, 0.5]) * scene + (1 - random.choice([0.0, 0.5])) * paper
    return np.asarray(np.clip(wash, 0, 1) * (1 - cover[..., None]) + ink * cover[..., None])


def halftone(random: Generator, scene: FloatImage) -> FloatImage:
    """Dots on a rotated grid, larger in dark places."""
    x, y = pixel_coordinates()
    tone = luminance(scene)
    colours, spacing, angle = palette(random, 5), random.uniform(5, 12), random.uniform(0, np.pi)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / spacing, (y * np.cos(angle) - x * np.sin(angle)) / spacing
    distance = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    cover = np.clip((np.sqrt(1 - tone) * 0.68 - distance) * spacing, 0, 1)[..., None]
    paper = colours[4] if random.random() < 0.5 else blur(scene, 12) * 0.5 + 0.5
    return np.asarray(paper * (1 - cover) + colours[0] * cover)


def pointillism(random: Generator, scene: FloatImage) -> FloatImage:
    """Dots of different colours whose mean is the colour of the scene."""
    canvas = to_pil(blur(scene, 8) * 0.6 + 0.3)
    draw = ImageDraw.Draw(canvas)
    size = random.uniform(2, 5)
    spread = random.uniform(0.05, 0.2)
    for cx, cy in random.uniform(0, SIDE, (int(1.6 * (SIDE / size / 1.6) ** 2), 2)):
        colour = scene[min(int(cy), SIDE - 1), min(int(cx), SIDE - 1)] + random.normal(0, spread, 3)
        r = size * random.uniform(0.6, 1.1)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=to_rgb(colour))
    return from_pil(canvas)


def woodcut(random: Generator, scene: FloatImage) -> FloatImage:
    """Few flat colours with carved lines where the tone changes."""
    tone = luminance(blur(scene, 4)) + 0.06 * (fractal_noise(random, 1.2) - 0.5)
    steps = int(random.integers(3, 6))
    level = np.clip((tone * steps).astype(int), 0, steps - 1)
    flat = palette(random, steps)[level]
    line = abs((tone * steps * random.choice([1, 2, 3])) % 1 - 0.5)
    carved = np.clip((0.09 - line) * 14, 0, 1)[..., None]
    return np.asarray(flat * (1 - carved) + palette(random, 3)[0] * 0.5 * carved)


def watercolour(random: Generator, scene: FloatImage) -> FloatImage:
    """Transparent, granular areas of colour with darker edges."""
    wet = blur(scene, random.uniform(3, 8))
    shift = (fractal_noise(random, 1.7) - 0.5) * 24
    x, y = pixel_coordinates()
    wet = wet[np.clip(y + shift, 0, SIDE - 1).astype(int), np.clip(x - shift, 0, SIDE - 1).astype(int)]
    level = np.floor(wet * 5 + 0.25 * fractal_noise(random, 1.5)[..., None]) / 5
    rim = np.hypot(*np.gradient(luminance(blur(level, 1.2))))
    grain = 1 - 0.12 * fractal_noise(random, 0.5)
    washed = 0.35 + 0.65 * (0.6 * level + 0.4 * wet)
    return np.asarray(np.clip(washed * grain[..., None] - 2.2 * rim[..., None], 0, 1))


def stained_glass(random: Generator, scene: FloatImage) -> FloatImage:
    """Flat cells, with or without dark lines between them."""
    index, edge, points = voronoi_cells(random, int(random.choice([40, 120, 300])))
    at = np.clip(points.astype(int), 0, SIDE - 1)
    colours = scene[at[:, 1], at[:, 0]] + random.normal(0, 0.12, (len(points), 1))
    flat = np.clip(colours[index] * random.uniform(0.9, 1.3), 0, 1)
    if random.random() < 0.6:
        flat = flat * np.clip(edge / random.uniform(1.5, 4), 0, 1)[..., None]
    return np.asarray(flat)


def marbling(random: Generator, scene: FloatImage) -> FloatImage:
    """Bands that are bent by noise, as in marbled paper and wood."""
    x, y = pixel_coordinates()
    bend = fractal_noise(random, random.uniform(1.6, 2.4)) * random.uniform(2, 9)
    angle = random.uniform(0, np.pi)
    across = (x * np.cos(angle) + y * np.sin(angle)) / random.uniform(15, 60)
    band = 0.5 + 0.5 * np.sin(2 * np.pi * (across + bend))
    if random.random() < 0.5:
        band = np.clip((band - 0.5) * random.uniform(2, 8) + 0.5, 0, 1)
    share = random.uniform(0.5, 1)
    return np.asarray(share * apply_palette(band.astype(np.float32), palette(random, 4)) + (1 - share) * scene)


def weave(random: Generator, scene: FloatImage) -> FloatImage:
    """Cloth: threads alternately over and under each other."""
    x, y = pixel_coordinates()
    spacing = random.uniform(6, 20)
    u, v = x / spacing, y / spacing
    over = ((u.astype(int) + v.astype(int)) % 2).astype(np.float32)
    bulge = np.where(over > 0, np.sin(np.pi * (u % 1)), np.sin(np.pi * (v % 1)))
    cut = (
        np.clip((v.astype(int) + 0.5) * spacing, 0, SIDE - 1).astype(int),
        np.clip((u.astype(int) + 0.5) * spacing, 0, SIDE - 1).astype(int),
    )
    colours = palette(random, 4)
    threads = np.where(over[..., None] > 0, scene[cut], 0.5 * scene[cut] + 0.5 * colours[random.integers(4)])
    return np.asarray(threads * (0.45 + 0.55 * bulge[..., None]))


def pastel(random: Generator, scene: FloatImage) -> FloatImage:
    """Colour on rough paper, with gaps where the paper is low."""
    tooth = fractal_noise(random, random.uniform(0.1, 0.5))
    paper = palette(random, 3)[random.integers(3)]
    smeared = blur(scene, 2)
    cover = np.clip((luminance(smeared) * 0.6 + 0.7 - tooth) * 4, 0, 1)[..., None]
    return np.asarray(paper * (1 - cover) + smeared * cover)


RENDERERS: tuple[tuple[str, Callable[[Generator, FloatImage], FloatImage]], ...] = (
    ("a photo", unchanged),
    ("an oil painting", oil_paint),
    ("a mosaic", mosaic),
    ("a hatching", hatching),
    ("a halftone print", halftone),
    ("a photo", unchanged),
    ("a painting of dots", pointillism),
    ("a woodcut", woodcut),
    ("a watercolour", watercolour),
    ("stained glass", stained_glass),
    ("a photo", unchanged),
    ("marbled paper", marbling),
    ("a weave", weave),
    ("a pastel", pastel),
    ("an oil painting", oil_paint),
)
