"""Fields of colour, and noise, palettes and softness for them."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SIDE = 320  # pixels of a picture

Field = NDArray[np.float32]  # (SIDE, SIDE) in 0..1, or (SIDE, SIDE, 3)
Random = np.random.Generator


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
