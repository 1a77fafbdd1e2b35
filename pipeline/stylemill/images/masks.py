"""Read masks: images whose pixel values are labels. Labels are read exactly, and are fitted as their image is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stylemill.config.inputs import COLOUR_LABEL, DEFAULT_INPUT_SETTINGS, Fit, InputSettings
from stylemill.errors import ImageError, StorageError
from stylemill.images.decode import open_image
from stylemill.images.fit import Placement, place_image
from stylemill.images.read import image_name, read_bytes

UNLABELLED = -1  # padding

_LOSSY = ("JPEG", "JPEG2000", "AVIF")


def load_labels(
    path: str | None,
    data: bytes | None,
    base: str | Path,
    size: tuple[int, int],
    fit: Fit,
    image_size: tuple[int, int] | None = None,
    inputs: InputSettings = DEFAULT_INPUT_SETTINGS,
) -> NDArray[np.int32]:
    """Read a mask of any resolution and fit it to `size` (width, height) by nearest neighbour -> (H, W) labels.

    A palette index or a grey value is a label, 0 or more, and so is a colour with equal channels. Any other colour is
    the label `COLOUR_LABEL` + 0xRRGGBB. `image_size` is the size of the mask's image before fitting: each pixel of the
    result has the label of the same place of the image. What `pad` adds is UNLABELLED. `path`, `data`, `base` and `fit`
    are those of `load_image`.

    Raises ImageError where the mask can never be read or has another shape than its image, TransientError where another
    attempt may help.
    """
    name = image_name(path, data)
    data = read_bytes(path, data, base, inputs)
    try:
        labels = _labels_of(open_image(data, name, inputs.max_pixels, min_side=1), name)
    except MemoryError as error:
        raise StorageError(f"{name}: not enough memory to decode it; give the worker more memory") from error
    height, width = labels.shape
    if image_size is not None and not _same_shape((width, height), image_size):
        raise ImageError(
            f"{name}: the mask is {width}×{height} and its image {image_size[0]}×{image_size[1]}; a mask may have "
            "another resolution, but must have its image's aspect ratio"
        )
    image_size = image_size or (width, height)
    return _fit_labels(labels, image_size, size, place_image(image_size, size, fit))


def _fit_labels(
    labels: NDArray[np.int32], image_size: tuple[int, int], size: tuple[int, int], placement: Placement
) -> NDArray[np.int32]:
    """The label at each pixel of the fitted image, (H, W)."""
    left, upper, right, lower = placement.box
    (image_width, image_height), (left_edge, upper_edge) = image_size, placement.corner
    (inner_width, inner_height), (height, width) = placement.inner, labels.shape
    columns = _nearest_pixels(size[0], left_edge, inner_width, left / image_width, right / image_width, width)
    rows = _nearest_pixels(size[1], upper_edge, inner_height, upper / image_height, lower / image_height, height)
    fitted = labels[np.maximum(rows, 0)[:, None], np.maximum(columns, 0)]
    fitted[rows < 0], fitted[:, columns < 0] = UNLABELLED, UNLABELLED
    return fitted


def _nearest_pixels(count: int, corner: int, inner: int, first: float, last: float, pixels: int) -> NDArray[np.int64]:
    """For each of `count` pixels of the result, along one axis, the pixel of the mask at its centre; (count,).

    The result shows the part from `first` to `last` of the mask's `pixels`, as fractions of the axis, in its `inner`
    pixels from `corner` on. The other pixels of the result are padding, −1 here.
    """
    position = (np.arange(count) + 0.5 - corner) / inner  # 0 to 1 within the part
    nearest = np.clip(np.floor((first + position * (last - first)) * pixels), 0, pixels - 1).astype(np.int64)
    return np.where((position > 0) & (position < 1), nearest, -1)


def _same_shape(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether both have one aspect ratio, where the sides of either may be rounded by one pixel."""
    (mask_width, mask_height), (width, height) = mask, image
    return abs(mask_width * height - mask_height * width) <= max(mask_width, mask_height, width, height)


def _labels_of(image: Image.Image, name: str) -> NDArray[np.int32]:
    """The labels of a decoded mask, (H, W). Raises ImageError where the format or mode does not keep labels exactly."""
    if image.format in _LOSSY:
        raise ImageError(f"{name}: a {image.format} does not keep labels exactly; save the mask as PNG")
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise ImageError(f"{name}: a mask with transparent pixels; give every pixel a label and save without alpha")
        image = image.convert(image.mode[:-1])
    if image.mode == "1":
        image = image.convert("L")
    values = np.asarray(image)
    if image.mode == "RGB":
        red, green, blue = (values[..., channel].astype(np.int32) for channel in range(3))
        grey = (red == green) & (green == blue)
        return np.where(grey, red, COLOUR_LABEL + (red << 16 | green << 8 | blue)).astype(np.int32)
    if image.mode not in ("P", "L") and not image.mode.startswith("I"):
        raise ImageError(f"{name}: a mask of mode {image.mode}; save it as a palette, grey or RGB image")
    if values.min() < 0 or values.max() >= COLOUR_LABEL:
        raise ImageError(f"{name}: labels from {values.min()} to {values.max()}; they must be 0 to {COLOUR_LABEL - 1}")
    return values.astype(np.int32)
