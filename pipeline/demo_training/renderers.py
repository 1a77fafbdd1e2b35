"""How a scene is painted, printed, laid or woven: from a field of colour to another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

from demo_training.float_images import (
    SIDE,
    Field,
    Random,
    cloud,
    coloured,
    field_of,
    grey,
    grid,
    image_of,
    paint_of,
    palette,
    soft,
)


def as_it_is(random: Random, scene: Field) -> Field:
    return soft(scene, random.uniform(0.3, 1.5)) if random.random() < 0.5 else scene


def strokes(random: Random, scene: Field) -> Field:
    """Oil paint: strokes along a flow, the broad ones below, each with bristles and a lit edge."""
    canvas = image_of(soft(scene, 6))
    draw = ImageDraw.Draw(canvas)
    flow = cloud(random, 2.4) * random.uniform(2, 8)
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
                draw.line(ends, fill=paint_of(shade), width=int(width / bristles) + 1)
    return field_of(canvas)


def cells(random: Random, count: int) -> tuple[NDArray[np.int64], Field, NDArray[np.float64]]:
    """The nearest of jittered points, how far the edge to the next is, and the points."""
    across = int(np.sqrt(count)) + 1
    pace = SIDE / across
    rows, columns = np.mgrid[-1 : across + 1, -1 : across + 1]
    points = (
        np.stack([columns, rows], -1).reshape(-1, 2) + 0.5 + random.uniform(-0.38, 0.38, ((across + 2) ** 2, 2))
    ) * pace
    x, y = grid()
    home_x, home_y = (x / pace).astype(int), (y / pace).astype(int)
    best = np.full((2, SIDE, SIDE), 1e9)
    index = np.zeros((SIDE, SIDE), int)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            which = (home_y + dy + 1) * (across + 2) + home_x + dx + 1
            far = np.hypot(x - points[which, 0], y - points[which, 1])
            nearer = far < best[0]
            best[1] = np.where(nearer, best[0], np.minimum(best[1], far))
            index = np.where(nearer, which, index)
            best[0] = np.minimum(best[0], far)
    return index, (best[1] - best[0]).astype(np.float32), points


def mosaic(random: Random, scene: Field) -> Field:
    index, edge, points = cells(random, int(random.choice([150, 400, 900, 1600])))
    at = np.clip(points.astype(int), 0, SIDE - 1)
    colours = scene[at[:, 1], at[:, 0]] + random.normal(0, 0.06, (len(points), 1))
    grout = palette(random, 3)[random.choice([0, 2])]
    seam = np.clip(edge / random.uniform(1, 3) - 0.3, 0, 1)[..., None]
    return np.asarray(colours[index] * (0.85 + 0.15 * cloud(random, 0.8)[..., None]) * seam + grout * (1 - seam))


def hatching(random: Random, scene: Field) -> Field:
    """Lines of ink over paper, denser where it is dark; one direction, two or three."""
    x, y = grid()
    tone = grey(scene)
    paper, ink = (0.85 + 0.15 * palette(random, 3)[2]), palette(random, 4)[0] * 0.6
    wobble = 6 * cloud(random, 2)
    cover = np.zeros((SIDE, SIDE), np.float32)
    pace, angle = random.uniform(4, 9), random.uniform(0, np.pi)
    for layer in range(random.integers(1, 4)):
        turn = angle + layer * random.uniform(0.6, 1.4)
        phase = (x * np.cos(turn) + y * np.sin(turn) + wobble) / pace
        line = abs(phase % 1 - 0.5) * 2
        dark = np.clip(1.1 - tone - 0.25 * layer, 0, 1)
        cover = np.maximum(cover, np.clip((dark - line) * pace / 2, 0, 1))
    wash = random.choice([0.0, 0.5]) * scene + (1 - random.choice([0.0, 0.5])) * paper
    return np.asarray(np.clip(wash, 0, 1) * (1 - cover[..., None]) + ink * cover[..., None])


def halftone(random: Random, scene: Field) -> Field:
    x, y = grid()
    tone = grey(scene)
    colours, pace, angle = palette(random, 5), random.uniform(5, 12), random.uniform(0, np.pi)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / pace, (y * np.cos(angle) - x * np.sin(angle)) / pace
    far = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    cover = np.clip((np.sqrt(1 - tone) * 0.68 - far) * pace, 0, 1)[..., None]
    paper = colours[4] if random.random() < 0.5 else soft(scene, 12) * 0.5 + 0.5
    return np.asarray(paper * (1 - cover) + colours[0] * cover)


def dots(random: Random, scene: Field) -> Field:
    """Pointillism: dabs of colours that only together are the colour of the scene."""
    canvas = image_of(soft(scene, 8) * 0.6 + 0.3)
    draw = ImageDraw.Draw(canvas)
    size = random.uniform(2, 5)
    spread = random.uniform(0.05, 0.2)
    for cx, cy in random.uniform(0, SIDE, (int(1.6 * (SIDE / size / 1.6) ** 2), 2)):
        colour = scene[min(int(cy), SIDE - 1), min(int(cx), SIDE - 1)] + random.normal(0, spread, 3)
        r = size * random.uniform(0.6, 1.1)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=paint_of(colour))
    return field_of(canvas)


def woodcut(random: Random, scene: Field) -> Field:
    """Few flat colours with carved lines along the tone."""
    tone = grey(soft(scene, 4)) + 0.06 * (cloud(random, 1.2) - 0.5)
    steps = int(random.integers(3, 6))
    level = np.clip((tone * steps).astype(int), 0, steps - 1)
    flat = palette(random, steps)[level]
    line = abs((tone * steps * random.choice([1, 2, 3])) % 1 - 0.5)
    carved = np.clip((0.09 - line) * 14, 0, 1)[..., None]
    return np.asarray(flat * (1 - carved) + palette(random, 3)[0] * 0.5 * carved)


def watercolour(random: Random, scene: Field) -> Field:
    """Washes that let the paper through, darker at their edges, granulated."""
    wet = soft(scene, random.uniform(3, 8))
    shift = (cloud(random, 1.7) - 0.5) * 24
    x, y = grid()
    wet = wet[np.clip(y + shift, 0, SIDE - 1).astype(int), np.clip(x - shift, 0, SIDE - 1).astype(int)]
    level = np.floor(wet * 5 + 0.25 * cloud(random, 1.5)[..., None]) / 5
    rim = np.hypot(*np.gradient(grey(soft(level, 1.2))))
    grain = 1 - 0.12 * cloud(random, 0.5)
    washed = 0.35 + 0.65 * (0.6 * level + 0.4 * wet)
    return np.asarray(np.clip(washed * grain[..., None] - 2.2 * rim[..., None], 0, 1))


def facets(random: Random, scene: Field) -> Field:
    """Stained glass and low-polygon planes: flat cells, with or without lead between."""
    index, edge, points = cells(random, int(random.choice([40, 120, 300])))
    at = np.clip(points.astype(int), 0, SIDE - 1)
    colours = scene[at[:, 1], at[:, 0]] + random.normal(0, 0.12, (len(points), 1))
    flat = np.clip(colours[index] * random.uniform(0.9, 1.3), 0, 1)
    if random.random() < 0.6:
        flat = flat * np.clip(edge / random.uniform(1.5, 4), 0, 1)[..., None]
    return np.asarray(flat)


def waves(random: Random, scene: Field) -> Field:
    """Bands that bend around a flow: marbled paper, wood, zebra, ripples."""
    x, y = grid()
    bend = cloud(random, random.uniform(1.6, 2.4)) * random.uniform(2, 9)
    angle = random.uniform(0, np.pi)
    across = (x * np.cos(angle) + y * np.sin(angle)) / random.uniform(15, 60)
    band = 0.5 + 0.5 * np.sin(2 * np.pi * (across + bend))
    if random.random() < 0.5:
        band = np.clip((band - 0.5) * random.uniform(2, 8) + 0.5, 0, 1)
    share = random.uniform(0.5, 1)
    return np.asarray(share * coloured(band.astype(np.float32), palette(random, 4)) + (1 - share) * scene)


def weave(random: Random, scene: Field) -> Field:
    """Cloth and tiles: threads over and under, or squares with a pattern in each."""
    x, y = grid()
    pace = random.uniform(6, 20)
    u, v = x / pace, y / pace
    over = ((u.astype(int) + v.astype(int)) % 2).astype(np.float32)
    bulge = np.where(over > 0, np.sin(np.pi * (u % 1)), np.sin(np.pi * (v % 1)))
    cut = (
        np.clip((v.astype(int) + 0.5) * pace, 0, SIDE - 1).astype(int),
        np.clip((u.astype(int) + 0.5) * pace, 0, SIDE - 1).astype(int),
    )
    colours = palette(random, 4)
    threads = np.where(over[..., None] > 0, scene[cut], 0.5 * scene[cut] + 0.5 * colours[random.integers(4)])
    return np.asarray(threads * (0.45 + 0.55 * bulge[..., None]))


def chalk(random: Random, scene: Field) -> Field:
    """Pastel: broken colour on toothed paper."""
    tooth = cloud(random, random.uniform(0.1, 0.5))
    paper = palette(random, 3)[random.integers(3)]
    smeared = soft(scene, 2)
    cover = np.clip((grey(smeared) * 0.6 + 0.7 - tooth) * 4, 0, 1)[..., None]
    return np.asarray(paper * (1 - cover) + smeared * cover)


MANNERS: tuple[tuple[str, Callable[[Random, Field], Field]], ...] = (
    ("a photo", as_it_is),
    ("an oil painting", strokes),
    ("a mosaic", mosaic),
    ("a hatching", hatching),
    ("a halftone print", halftone),
    ("a photo", as_it_is),
    ("a painting of dots", dots),
    ("a woodcut", woodcut),
    ("a watercolour", watercolour),
    ("stained glass", facets),
    ("a photo", as_it_is),
    ("marbled paper", waves),
    ("a weave", weave),
    ("a pastel", chalk),
    ("an oil painting", strokes),
)
