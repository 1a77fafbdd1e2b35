"""Pictures to learn from, drawn by numpy and Pillow alone: scenes, and the same painted, printed, laid and woven.

`picture(seed, number)` is a pure function; together with the textures that scikit-image ships (`textures`), these
are all that the demo model has ever seen.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 320  # pixels of a picture

Field = NDArray[np.float32]  # (SIDE, SIDE) in 0..1, or (SIDE, SIDE, 3)
Random = np.random.Generator


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


# --- colours and fields -----------------------------------------------------------------------------------------------


def palette(random: Random, count: int = 6) -> NDArray[np.float32]:
    """Colours that go together, from dark to light, (count, 3)."""
    hue, spread = random.random(), random.choice([0.03, 0.08, 0.2, 0.5])
    rich = random.uniform(0.1, 1.0)
    colours = []
    for value in np.linspace(random.uniform(0.05, 0.3), random.uniform(0.75, 1.0), count):
        turned = (hue + random.normal(0, spread) + (0.5 if random.random() < 0.2 else 0)) % 1
        colours.append(colorsys.hsv_to_rgb(turned, float(np.clip(random.normal(rich, 0.2), 0, 1)), float(value)))
    return np.array(colours, np.float32)


def cloud(random: Random, power: float, side: int = SIDE) -> Field:
    """Noise whose spectrum falls with the frequency to `power`, stretched to 0..1."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(random.standard_normal((side, side))) / frequency**power
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, (side, side))
    low, high = np.percentile(field, [1, 99])
    return np.clip((field - low) / (high - low), 0, 1).astype(np.float32)


def coloured(tone: Field, colours: NDArray[np.float32]) -> Field:
    place = tone * (len(colours) - 1)
    index = np.clip(place.astype(int), 0, len(colours) - 2)
    return colours[index] + (colours[index + 1] - colours[index]) * (place - index)[..., None]


def grid() -> tuple[Field, Field]:
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    return x, y


def grey(colour: Field) -> Field:
    return np.asarray(colour @ np.array([0.3, 0.59, 0.11], np.float32))


def image_of(colour: Field) -> Image.Image:
    return Image.fromarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))


def field_of(image: Image.Image) -> Field:
    return np.asarray(image.convert("RGB"), np.float32) / 255


def paint_of(colour: NDArray[np.float32]) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in np.clip(colour, 0, 1) * 255)
    return r, g, b


def soft(field: Field, radius: float) -> Field:
    return field_of(image_of(field).filter(ImageFilter.GaussianBlur(radius)))


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


# --- manners ----------------------------------------------------------------------------------------------------------


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
