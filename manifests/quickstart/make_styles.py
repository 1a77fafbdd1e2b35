"""Draw the four style images of the quickstart: python manifests/quickstart/make_styles.py [FOLDER]

Needs numpy and Pillow. Each image is drawn at four times its size. The images are under CC0 1.0, like this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 320  # pixels of a finished image
LARGE = 4 * SIDE  # pixels while drawing

Colour = tuple[float, float, float]
Field = NDArray[np.float64]


def mix(a: Colour, b: Colour, t: float) -> Colour:
    t = min(max(t, 0.0), 1.0)
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def shade(colour: Colour, random: np.random.Generator, spread: float) -> tuple[int, int, int]:
    """A random colour near `colour`: lighter or darker, with each channel changed a little."""
    moved = np.array(colour) * (1 + random.normal(0, spread / 128)) + random.normal(0, spread / 2, 3)
    r, g, b = (int(v) for v in np.clip(moved, 0, 255))
    return r, g, b


def stroke(
    draw: ImageDraw.ImageDraw,
    line: Field,  # (points, 2)
    width: float,
    colour: Colour,
    random: np.random.Generator,
    spread: float = 14,
) -> None:
    """Draw a stroke of a flat brush: parallel bristles, each with its own colour and ends."""
    ahead = np.gradient(line, axis=0)
    across = np.stack([-ahead[:, 1], ahead[:, 0]], -1) / (np.linalg.norm(ahead, axis=1, keepdims=True) + 1e-9)
    base = shade(colour, random, spread)
    bristles = max(3, int(width / 3))
    for place in np.linspace(-0.5, 0.5, bristles):
        first, last = random.integers(0, 3), len(line) - random.integers(0, 3)
        if last - first > 1:
            points = (line + across * place * width)[first:last]
            light = 22 * (0.3 - place)  # thick paint, lit from one side
            paint = shade((base[0] + light, base[1] + light, base[2] + light), random, 9)
            draw.line([(x, y) for x, y in points], fill=paint, width=int(width / bristles) + 2, joint="curve")


def follow(field: Callable[[float, float], float], x: float, y: float, steps: int, pace: float) -> Field:
    """The line from (x, y) along the directions of `field`, which gives angles in radians; (steps, 2)."""
    line = [(x, y)]
    for _ in range(steps - 1):
        angle = field(x, y)
        x, y = x + pace * float(np.cos(angle)), y + pace * float(np.sin(angle))
        line.append((x, y))
    return np.array(line)


def night() -> Image.Image:
    """Thick oil paint: a night sky with swirls around its stars, over dark hills."""
    random = np.random.default_rng(11)
    stars = [(0.79, 0.19, 0.115), (0.30, 0.30, 0.075), (0.55, 0.47, 0.055), (0.10, 0.13, 0.05), (0.52, 0.10, 0.042)]
    stars.append((0.93, 0.50, 0.042))

    def hills(x: float) -> float:
        return 0.74 + 0.06 * float(np.sin(5 * x + 0.6)) - 0.10 * x + 0.02 * float(np.sin(17 * x))

    def flow(px: float, py: float) -> float:
        x, y = px / LARGE, py / LARGE
        if y > hills(x):
            return 0.35 * float(np.cos(5 * x + 0.6)) + 0.5 * float(np.sin(9 * y + 4 * x))
        u, v = 0.55, 0.22 * float(np.sin(7 * x + 2 * y))
        for cx, cy, r in stars:
            dx, dy = x - cx, y - cy
            pull = float(np.exp(-(dx * dx + dy * dy) / (2 * (2.0 * r) ** 2))) * 2.4
            distance = float(np.hypot(dx, dy)) + 1e-6
            u, v = u - pull * dy / distance, v + pull * dx / distance
        return float(np.arctan2(v, u))

    def paint(px: float, py: float) -> Colour:
        x, y = px / LARGE, py / LARGE
        if y > hills(x):
            depth = (y - hills(x)) / 0.3
            rows = 0.5 + 0.5 * float(np.sin(60 * depth + 8 * x))
            return mix(mix((28, 62, 92), (44, 96, 84), rows), (12, 28, 52), depth)
        wave = 0.5 + 0.5 * float(np.sin(11 * y + 5 * x + 2.2 * np.sin(6 * x - 3 * y)))
        colour = mix(mix((18, 38, 108), (34, 86, 168), wave), (120, 168, 196), 0.55 * wave * y)
        for cx, cy, r in stars:
            distance = float(np.hypot(x - cx, y - cy)) / r
            ring = 0.5 + 0.5 * float(np.cos(4.2 * distance))
            glow = float(np.exp(-((distance / 1.7) ** 2)))
            colour = mix(colour, mix((236, 160, 40), (250, 226, 130), ring), 1.25 * glow)
            if distance < 0.5:
                colour = (255, 246, 206)
        return colour

    picture = Image.new("RGB", (LARGE, LARGE), (16, 34, 88))
    draw = ImageDraw.Draw(picture)
    for count, width, steps in ((1400, 44.0, 12), (3600, 26.0, 12), (4200, 17.0, 10)):
        for x, y in random.uniform(-0.03 * LARGE, 1.03 * LARGE, (count, 2)):
            line = follow(flow, x, y, steps, width * 0.45)
            middle = line[len(line) // 2]
            stroke(draw, line, width * random.uniform(0.7, 1.2), paint(*middle), random)
    for cx, cy, r in stars:  # light strokes at the centres of the stars
        for _ in range(5):
            line = follow(flow, (cx + random.normal(0, 0.1 * r)) * LARGE, cy * LARGE, 5, 90 * r)
            stroke(draw, line, 260 * r, (255, 246, 206), random)
    return picture


def mosaic() -> Image.Image:
    """Glass tiles in rings around a sun, over a sea of scallops."""
    random = np.random.default_rng(5)
    cx, cy, tile = 0.5 * LARGE, 0.37 * LARGE, 34.0
    horizon = 0.66 * LARGE
    picture = Image.new("RGB", (LARGE, LARGE), (52, 44, 42))
    draw = ImageDraw.Draw(picture)

    def lay(centre: tuple[float, float], ring: int, width: float, colour: Callable[[float], Colour | None]) -> None:
        count = max(5, round(2 * np.pi * (ring + 0.5) * width / tile))
        for i in range(count):
            turn = (i + 0.5 * (ring % 2)) / count
            paint = colour(turn)
            if paint is None:
                continue
            gap, inner, outer = 0.06, (ring + 0.07) * width, (ring + 0.93) * width
            corners = []
            for radius, edge in ((inner, gap), (outer, gap), (outer, 1 - gap), (inner, 1 - gap)):
                angle = 2 * np.pi * (turn + (edge - 0.5) / count) - np.pi / 2
                reach = np.array([np.cos(angle), np.sin(angle)]) * radius
                corners.append(tuple(centre + reach + random.normal(0, 1.6, 2)))
            fill = shade(paint, random, 20)
            draw.polygon(corners, fill=fill)
            draw.line(corners[:2] + corners[1:3], fill=shade(mix(fill, (255, 255, 255), 0.35), random, 4), width=4)

    def sky(ring: int) -> Callable[[float], Colour | None]:
        def colour(turn: float) -> Colour | None:
            angle = 2 * np.pi * turn - np.pi / 2
            if cy + ring * tile * np.sin(angle) > horizon + tile:
                return None
            ray = np.cos(12 * 2 * np.pi * turn)
            if ring < 2:
                return (255, 240, 180)
            if ring < 6:
                return mix((252, 200, 60), (226, 96, 34), (ring - 2) / 3.5)
            if ring == 6:
                return (150, 34, 40)
            if ray > 0.15 + 0.055 * (ring - 7):
                return mix((244, 172, 48), (238, 120, 84), (ring - 7) / 8)
            return mix((26, 120, 140), (120, 196, 190), 0.5 + 0.5 * np.sin(0.9 * ring)) if ring < 17 else (24, 84, 128)

        return colour

    for ring in range(26):
        lay((cx, cy), ring, tile, sky(ring))
    sea = [(236, 240, 224), (64, 160, 190), (22, 92, 156), (120, 200, 204), (14, 52, 112)]
    row, radius = -1, 4 * tile
    while horizon + (row - 1) * radius / 2 < LARGE + radius:
        for column in range(-1, 6):
            centre = ((column + 0.5 * (row % 2)) * 2 * radius, horizon + radius + row * radius / 2)
            box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
            draw.ellipse(box, fill=(44, 40, 44))
            for ring in range(5):
                lay(centre, ring, radius / 5, lambda _, ring=ring: sea[4 - ring])  # type: ignore[misc]
        row += 1
    return picture


def woodblock() -> Image.Image:
    """A woodblock print: waves in Prussian blue on cream paper, a red sun, the grain of the wood."""
    random = np.random.default_rng(3)
    cream, indigo = (240, 226, 194), (22, 40, 84)
    picture = Image.new("RGB", (LARGE, LARGE), cream)
    draw = ImageDraw.Draw(picture)
    for y in range(LARGE // 2):  # bokashi: ink that fades down the sky
        draw.line([(0, y), (LARGE, y)], fill=shade(mix((206, 120, 92), cream, (y / (0.42 * LARGE)) ** 0.7), random, 0))
    draw.ellipse([0.60 * LARGE, 0.08 * LARGE, 0.86 * LARGE, 0.34 * LARGE], fill=(196, 52, 38))
    blues: list[Colour] = [(150, 186, 196), (104, 156, 184), (62, 118, 164), (38, 84, 140), (28, 60, 112)]
    x = np.linspace(-0.1, 1.1, 900)
    for layer in range(7):
        level, height, waves = 0.36 + 0.105 * layer, 0.055 + 0.008 * layer, 3.6 - 0.32 * layer
        phase = 2 * np.pi * (waves * x + 0.37 * layer + 0.13 * layer * layer)
        # Trochoids: round troughs and sharp crests that lean to the left.
        crest_x = x - 0.62 * height * np.sin(phase) - 0.035 * (1 + np.cos(phase)) ** 2 / 4
        crest_y = level - height * (np.cos(phase) + 0.35 * np.maximum(np.cos(phase), 0) ** 3)
        for band in range(9):  # lines that follow the crest, flatter with depth
            sink, flat = 0.017 * band * (1 + 0.12 * band), 0.90**band
            points = [
                (px * LARGE, (level + (py - level) * flat + sink) * LARGE)
                for px, py in zip(crest_x, crest_y, strict=True)
            ]
            fill = cream if band == 0 else blues[(band * 2 + layer) % 5] if band % 2 else mix(cream, blues[0], 0.25)
            solid = shade(fill, random, 2)
            draw.polygon([*points, (1.2 * LARGE, 1.3 * LARGE), (-0.2 * LARGE, 1.3 * LARGE)], fill=solid)
            draw.line(points, fill=indigo, width=7 if band == 0 else 4, joint="curve")
        for i in np.flatnonzero(np.cos(phase) > 0.55)[::3]:  # foam: drops on the crest
            ox, oy = crest_x[i] * LARGE, crest_y[i] * LARGE
            for _ in range(2):
                dx, dy = random.normal(-6, 13), -abs(random.normal(0, 15))
                r = random.uniform(4, 11)
                draw.ellipse(
                    [ox + dx - r, oy + dy - r, ox + dx + r, oy + dy + r], fill=(250, 244, 226), outline=indigo, width=3
                )
    grain = Image.fromarray(random.normal(128, 60, (LARGE // 3, LARGE // 80)).clip(0, 255).astype(np.uint8))
    grain = grain.resize((LARGE, LARGE), Image.Resampling.BICUBIC).point(lambda v: 226 + v * 0.228 // 2)
    return ImageChops.multiply(picture, Image.merge("RGB", [grain] * 3))


def meadow() -> Image.Image:
    """Short brush strokes of pure colours: poppies and cornflowers in long grass, under a bright sky."""
    random = np.random.default_rng(8)
    picture = Image.new("RGB", (LARGE, LARGE), (222, 206, 170))
    draw = ImageDraw.Draw(picture)

    def dab(x: float, y: float, size: float, angle: float, colour: Colour, spread: float = 22) -> None:
        line = follow(lambda px, py: angle + 0.006 * (px - x), x, y, 6, size * 0.42)
        stroke(draw, line, size * 0.62, colour, random, spread)

    sky: list[Colour] = [(134, 182, 222), (166, 204, 232), (236, 226, 222), (248, 214, 190), (196, 190, 226)]
    for x, y in random.uniform(0, 1, (2600, 2)) * (1.06 * LARGE, 0.44 * LARGE) - (0.03 * LARGE, 0.02 * LARGE):
        cloud = np.sin(7 * x / LARGE + 2.5 * np.sin(9 * y / LARGE)) > 0.25
        dab(
            x,
            y,
            random.uniform(18, 36),
            random.normal(-0.25, 0.25),
            sky[random.integers(2, 5) if cloud else random.integers(0, 2)],
        )
    trees: list[Colour] = [(66, 104, 112), (88, 128, 104), (62, 82, 120), (128, 146, 92)]
    for x in random.uniform(-0.02, 1.02, 900) * LARGE:
        top = 0.035 + 0.055 * abs(np.sin(8 * x / LARGE) + 0.4 * np.sin(23 * x / LARGE))
        y = (0.435 - top * random.uniform(0, 1)) * LARGE
        dab(x, y, random.uniform(14, 26), random.normal(-1.4, 0.3), trees[random.integers(4)])
    greens: list[Colour] = [(112, 152, 62), (156, 178, 76), (72, 122, 72), (206, 192, 92), (52, 98, 86)]
    flowers: list[Colour] = [
        (222, 44, 36),
        (240, 84, 48),
        (198, 24, 52),
        (92, 92, 196),
        (246, 238, 232),
        (250, 198, 60),
    ]
    for depth in np.sort(random.uniform(0, 1, 1400)):  # the ground, from the horizon to the front
        x, y = random.uniform(-0.03, 1.03) * LARGE, (0.425 + 0.6 * depth) * LARGE
        dab(
            x,
            y,
            16 + 44 * depth,
            random.normal(0.05, 0.2),
            mix((190, 190, 96), greens[random.integers(5)], 0.4 + depth),
        )
    for depth in np.sort(random.uniform(0, 1, 2600) ** 0.8):
        x, y = random.uniform(-0.03, 1.03) * LARGE, (0.45 + 0.6 * depth) * LARGE
        dab(x, y, 10 + 50 * depth, random.normal(-1.35, 0.35), greens[random.integers(5)])
    for depth in np.sort(random.uniform(0, 1, 900) ** 0.85):
        x, y, size = random.uniform(-0.03, 1.03) * LARGE, (0.435 + 0.58 * depth) * LARGE, 9 + 52 * depth
        if random.uniform() > 0.5 + 0.5 * np.sin(8 * x / LARGE + 11 * depth):
            continue  # flowers grow in groups
        colour = flowers[random.choice(6, p=[0.34, 0.2, 0.14, 0.16, 0.08, 0.08])]
        for petal in range(5):
            turn = 1.3 * petal
            dx, dy = 0.4 * size * np.cos(turn), 0.3 * size * np.sin(turn)
            dab(x + dx, y + dy, 0.75 * size, turn + 1.6, mix(colour, (255, 220, 190), 0.2 * (petal % 3)), 10)
    return picture


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "style")
    for make in (night, mosaic, woodblock, meadow):
        finished = make().filter(ImageFilter.SHARPEN).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        finished.save(folder / f"{make.__name__}.jpg", quality=88, subsampling=0)
