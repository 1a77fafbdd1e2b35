"""Encode output images."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode_image(pixels: NDArray[np.uint8], image_format: Literal["png", "jpeg", "webp"], quality: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB without metadata: the same pixels and settings give the same bytes.

    `quality` is 1 to 100, for jpeg and webp; png is lossless. A jpeg is stored as 4:4:4, so that fine strokes keep
    their colour.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 6},
        "jpeg": {"quality": quality, "subsampling": "4:4:4"},
        "webp": {"quality": quality, "method": 4},
    }
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, image_format, **options[image_format])
    return buffer.getvalue()
