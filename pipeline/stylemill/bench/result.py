"""What `stylemill bench` measured: the content of its JSON file, which `stylemill plan --bench` reads. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from stylemill.config.base import StrictModel
from stylemill.errors import JobError

FORMAT: Final = 2  # of the JSON. Files of another one are not read: measuring again is easier. 1 had no number.
MAX_FILE_BYTES = 1 << 20
WRITTEN_BY = "give a file that `stylemill bench --json FILE` wrote"

Tile = tuple[int, int]  # contents × styles
Positive = Annotated[float, Field(gt=0)]


class BenchRow(StrictModel):
    """One micro-batch in lockstep, or one pair at a time (`naive`). None: not measured, or not known."""

    way: Literal["lockstep", "naive"]
    micro_batch: Annotated[int, Field(ge=1)]
    error: str | None = None  # instead of all that follows
    denoise_ms: Positive | None = None  # of each call, a pair
    features_ms: Positive | None = None
    gradient_ms: Positive | None = None
    step_seconds: Positive | None = None  # of a step of the tile, as the run took it
    step_calls_seconds: Positive | None = None  # of the calls that such a step needs, by the three figures above
    seconds_per_image: Positive | None = None  # of a whole run
    images_per_second: Positive | None = None
    times_naive: float | None = None  # images a second over those of `naive`
    tflops: float | None = None
    utilisation: float | None = None  # tflops over the device's rate of matrix products
    peak_gib: float | None = None
    passes: dict[str, float] = Field(default_factory=dict)  # of the UNet, a pair and step, by kind
    images_lost: int = 0  # latents or images became NaN or Inf

    @model_validator(mode="after")
    def _check_complete(self) -> BenchRow:
        times = (self.denoise_ms, self.features_ms, self.gradient_ms, self.step_seconds, self.step_calls_seconds)
        if self.error is None and None in (*times, self.seconds_per_image, self.images_per_second):
            raise ValueError("a row has all of its times, or an error")
        return self


class BenchResult(StrictModel):
    """All that a call of `stylemill bench` measured, and on what."""

    format: Literal[2] = FORMAT
    date: str
    device: str  # the name of a GPU, or cpu
    capability: str
    threads: int  # CPU threads
    versions: dict[str, str]
    model: str
    random_weights: bool
    unet_parameters: int
    latent_channels: int
    pixels_per_latent: int
    dtype: str
    compiled: bool  # the calls of the UNet, but never those of `naive`
    deterministic: bool  # gradients, but never those of `naive`
    size: int  # pixels
    tile: Tile
    preset: str
    sampling: dict[str, Any]
    rates: dict[str, float]  # of the device; empty where the operations of the UNet are not known
    encode_seconds: Positive  # of an image of this size, by the VAE
    decode_seconds: Positive
    rows: list[BenchRow] = Field(default_factory=list)


def read_bench_result(path: Path) -> BenchResult:
    """The content of a file that `stylemill bench --json` wrote. Raises JobError if it is another file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise JobError(f"--bench {path}: cannot be read: {error.strerror or error}; {WRITTEN_BY}") from None
    if len(data) > MAX_FILE_BYTES:
        raise JobError(f"--bench {path}: is larger than {MAX_FILE_BYTES:,} bytes; {WRITTEN_BY}")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise JobError(f"--bench {path}: is not JSON: {error}; {WRITTEN_BY}") from None
    if not (isinstance(values, dict) and {"versions", "device", "rows"} <= values.keys()):
        raise JobError(f"--bench {path}: is JSON, but not of `stylemill bench`; {WRITTEN_BY}")
    again = f"measure again: stylemill bench --json {path}"
    if (found := values.get("format", 1)) != FORMAT:
        raise JobError(f"--bench {path}: has format {found}, and this version of stylemill reads {FORMAT}; {again}")
    try:
        return BenchResult.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        raise JobError(
            f"--bench {path}: {place}: {problem['msg'].removeprefix('Value error, ')}; the file was edited or"
            f" damaged, {again}"
        ) from None
