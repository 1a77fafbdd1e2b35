"""Settings of the inputs: where images may come from, what one may cost, and how it is fitted to the model's grid."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stylemill.config.base import StrictModel

Fit = Literal["crop", "pad", "stretch", "keep"]
Side = Annotated[int, Field(ge=64, le=8192)]  # pixels

# A mask's labels are its grey values or palette indices as they are; an RGB colour is this plus 0xRRGGBB.
COLOUR_LABEL = 1 << 24


def label_name(label: int) -> str:
    """A label as a message shows it: a number, or the colour that it is."""
    return str(label) if label < COLOUR_LABEL else f"#{label - COLOUR_LABEL:06x}"


class InputSettings(StrictModel):
    """Where images may come from and what one may cost: decides which rows fail, never a byte of one that succeeds."""

    remote_only: bool = False  # no file of this machine is read: for manifests that others wrote
    allow_private_addresses: bool = False  # http(s) hosts of the own network; those of cloud metadata stay refused
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 178_956_970  # Pillow's own limit; 0.7 GB decoded
    max_bytes: Annotated[int, Field(ge=1, le=2**32)] = 512 * 2**20  # a file is held whole in memory
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0  # seconds of one download, from asking to its last byte
    retries: Annotated[int, Field(ge=0, le=20)] = 3  # downloads tried beyond the first before the attempt fails
    cache_mb: Annotated[int, Field(ge=0)] = 256  # of downloaded files, kept in the memory of each worker


DEFAULT_INPUT_SETTINGS = InputSettings()


class ImageSettings(StrictModel):
    """How inputs are brought onto the model's grid."""

    size: Annotated[
        Side | tuple[Side, Side], Field(description="a number of pixels or [width, height], each 64 to 8192")
    ] = 512
    fit: Fit = "crop"  # keep: of each image its own size and shape, scaled down where it exceeds `size`
    style_size: Annotated[
        Side | tuple[Side, Side] | None, Field(description="a number of pixels or [width, height], each 64 to 8192")
    ] = None  # of style images; None: as `size`

    @field_validator("size", "style_size", mode="before")
    @classmethod
    def _list_is_a_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def width_height(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def style_width_height(self) -> tuple[int, int]:
        size = self.size if self.style_size is None else self.style_size
        return (size, size) if isinstance(size, int) else size
