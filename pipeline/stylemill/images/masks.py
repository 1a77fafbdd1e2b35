"""Label images: masks whose pixel values name regions. They are read exactly and move as the image they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stylemill.config.inputs import COLOUR_LABEL, DEFAULT_INPUT_SETTINGS, Fit, InputSettings
from stylemill.errors import ImageError, StorageError
from stylemill.images.decode import open_image
from stylemill.images.fit import placement
from stylemill.images.read import read_bytes

UNLABELLED = -1  # padding

_LOSSY = ("JPEG", "JPEG2000", "AVIF")


def load_labels(
    path: str | None,
    data: bytes | None,
    base: str | Path,
    size: tuple[int, int],
    fit: Fit,
    image: tuple[int, int] | None = None,
    limits: InputSettings = DEFAULT_INPUT_SETTINGS,
) -> NDArray[np.int32]:
    """Read a label image of any resolution -> (H, W) labels, brought to `size` (width, height) by nearest neighbour.

    A palette index or a grey value is a label as it is, 0 or more, and so is a colour whose channels are equal; any
    other colour is `COLOUR_LABEL` + 0xRRGGBB. `image` is the size of the image that it belongs to, before fitting: each
    pixel of the result shows the label of the very place that the image shows there. What `pad` adds is UNLABELLED.

    Raises ImageError where the mask can never be read or has another shape than its image, TransientError where trying
    again may help.
    """
    name, data = read_bytes(path, data, base, limits)
    try:
        opened = open_image(data, name, limits.max_pixels, min_side=1)
        labels = _labels(opened, name)
    except MemoryError as error:
        raise StorageError(f"{name}: not enough memory to decode it; give the worker more memory") from error
    height, width = labels.shape
    if image is not None and not _same_shape((width, height), image):
        raise ImageError(
            f"{name}: the mask is {width}×{height} and its image {image[0]}×{image[1]}; a mask may have another "
            "resolution, but must have its image's aspect ratio"
        )
    place = placement(image or (width, height), size, fit)
    (whole_width, whole_height), (left, upper, right, lower) = image or (width, height), place.box
    columns = _taken(size[0], place.corner[0], place.inner[0], left / whole_width, right / whole_width, width)
    rows = _taken(size[1], place.corner[1], place.inner[1], upper / whole_height, lower / whole_height, height)
    fitted = labels[np.maximum(rows, 0)[:, None], np.maximum(columns, 0)]
    fitted[rows < 0], fitted[:, columns < 0] = UNLABELLED, UNLABELLED
    return fitted


def _taken(count: int, corner: int, inner: int, first: float, last: float, pixels: int) -> NDArray[np.int64]:
    """Which of `pixels` the centre of each of `count` positions falls on, of the stretch from `first` to `last`.

    The stretch, given as shares of the whole, lies on `inner` positions from `corner`; −1 beside them.
    """
    along = (np.arange(count) + 0.5 - corner) / inner
    found = np.clip(np.floor((first + along * (last - first)) * pixels), 0, pixels - 1).astype(np.int64)
    return np.where((along > 0) & (along < 1), found, -1)


def _same_shape(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether both have one aspect ratio, up to the pixel that rounding a side may cost either of them."""
    (mask_width, mask_height), (width, height) = mask, image
    return abs(mask_width * height - mask_height * width) <= max(mask_width, mask_height, width, height)


def _labels(image: Image.Image, name: str) -> NDArray[np.int32]:
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
