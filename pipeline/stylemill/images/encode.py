"""Encode output images."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode_image(pixels: NDArray[np.uint8], image_format: Literal["png", "jpeg", "webp"], quality: int) -> bytes:
    """(H, W, 3) uint8 RGB as a file: the same pixels and settings give the same bytes, without metadata.

    `quality`, 1 to 100, is for jpeg (stored 4:4:4, so that fine strokes keep their colour) and webp; png is lossless.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 6},
        "jpeg": {"quality": quality, "subsampling": "4:4:4"},
        "webp": {"quality": quality, "method": 4},
    }
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, image_format, **options[image_format])
    return buffer.getvalue()
