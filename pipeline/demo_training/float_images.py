"""Float images: palettes, noise, blur, and conversion to and from Pillow."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SIDE = 320  # of a picture, in pixels

FloatImage = NDArray[np.float32]  # (SIDE, SIDE) in 0..1, or (SIDE, SIDE, 3)
Generator = np.random.Generator


def palette(random: Generator, count: int = 6) -> NDArray[np.float32]:
    """Random colours around one hue, from dark to light: (count, 3)."""
    hue, spread = random.random(), random.choice([0.03, 0.08, 0.2, 0.5])
    mean_saturation = random.uniform(0.1, 1.0)
    colours = []
    for value in np.linspace(random.uniform(0.05, 0.3), random.uniform(0.75, 1.0), count):
        colour_hue = (hue + random.normal(0, spread) + (0.5 if random.random() < 0.2 else 0)) % 1
        saturation = float(np.clip(random.normal(mean_saturation, 0.2), 0, 1))
        colours.append(colorsys.hsv_to_rgb(colour_hue, saturation, float(value)))
    return np.array(colours, np.float32)


def fractal_noise(random: Generator, power: float, side: int = SIDE) -> FloatImage:
    """Noise (side, side) in 0..1 with a spectrum of 1 / frequency to the `power`."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(random.standard_normal((side, side))) / frequency**power
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (side, side))
    low, high = np.percentile(noise, [1, 99])
    return np.clip((noise - low) / (high - low), 0, 1).astype(np.float32)


def apply_palette(tone: FloatImage, colours: NDArray[np.float32]) -> FloatImage:
    """Map tones (SIDE, SIDE) in 0..1 to colours, interpolated between those of the palette (count, 3)."""
    position = tone * (len(colours) - 1)
    index = np.clip(position.astype(int), 0, len(colours) - 2)
    return colours[index] + (colours[index + 1] - colours[index]) * (position - index)[..., None]


def pixel_coordinates() -> tuple[FloatImage, FloatImage]:
    """x and y of each pixel, (SIDE, SIDE) each."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    return x, y


def luminance(colour: FloatImage) -> FloatImage:
    return np.asarray(colour @ np.array([0.3, 0.59, 0.11], np.float32))


def to_pil(colour: FloatImage) -> Image.Image:
    return Image.fromarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))


def from_pil(image: Image.Image) -> FloatImage:
    return np.asarray(image.convert("RGB"), np.float32) / 255


def to_rgb(colour: NDArray[np.float32]) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in np.clip(colour, 0, 1) * 255)
    return r, g, b


def blur(image: FloatImage, radius: float) -> FloatImage:
    return from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(radius)))
