"""Settings of the inputs: where images may come from, how large they may be, and how they are fitted to the grid."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stylemill.config.base import StrictModel

Fit = Literal["crop", "pad", "stretch", "keep"]
Side = Annotated[int, Field(ge=64, le=8192)]  # pixels

# The labels of a mask are its grey values or palette indices. An RGB colour is the label COLOUR_LABEL + 0xRRGGBB.
COLOUR_LABEL = 1 << 24


def label_name(label: int) -> str:
    """A label of a mask as messages show it: a number, or a colour such as #ff0000."""
    return str(label) if label < COLOUR_LABEL else f"#{label - COLOUR_LABEL:06x}"


class InputSettings(StrictModel):
    """Where images may come from and how large they may be. Decides which rows fail, never a byte of the others."""

    remote_only: bool = False  # reads no file of this machine: for manifests from others
    allow_private_addresses: bool = False  # http(s) hosts of private networks; cloud metadata stays refused
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 178_956_970  # Pillow's own limit; 0.7 GB decoded
    max_bytes: Annotated[int, Field(ge=1, le=2**32)] = 512 * 2**20  # of one file, which is in memory as a whole
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0  # seconds for one download, all redirects together
    retries: Annotated[int, Field(ge=0, le=20)] = 3  # further tries of one download before the attempt fails
    cache_mb: Annotated[int, Field(ge=0)] = 256  # of downloaded files, in the memory of each worker


DEFAULT_INPUT_SETTINGS = InputSettings()


class ImageSettings(StrictModel):
    """How images are fitted to the model's grid."""

    size: Annotated[
        Side | tuple[Side, Side], Field(description="a number of pixels or [width, height], each 64 to 8192")
    ] = 512
    fit: Fit = "crop"  # keep: each image keeps its shape, and its size where it does not exceed `size`
    style_size: Annotated[
        Side | tuple[Side, Side] | None, Field(description="a number of pixels or [width, height], each 64 to 8192")
    ] = None  # of style images; None: `size`

    @field_validator("size", "style_size", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def width_height(self) -> tuple[int, int]:
        """Of content and output images, in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def style_width_height(self) -> tuple[int, int]:
        """Of style images, in pixels."""
        size = self.size if self.style_size is None else self.style_size
        return (size, size) if isinstance(size, int) else size
