"""Sampling settings and the presets table. Torch-free: the job file and the engine share it.

Source of methods, symbols and published values: attention distillation, arXiv 2502.20235.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["guided", "optimization"]
Fit = Literal["crop", "pad", "stretch"]
DType = Literal["auto", "float16", "bfloat16", "float32", "float64"]


class Frozen(BaseModel):
    """A closed set of typed fields: an unknown key or a mistyped value is an error, never a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(Frozen):
    """How every pair of a job is sampled. Names follow diffusers; λ of the paper is `content_weight`."""

    method: Method = "guided"
    steps: Annotated[int, Field(ge=1, le=999)] = 50
    iterations: Annotated[int, Field(ge=0, le=100)] = 1  # Adam steps at a timestep
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    content_weight: Annotated[float, Field(ge=0)] = 0.25  # λ; a manifest column of this name overrides it per row
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  # classifier-free guidance; 1 or less is off
    adain: bool = False
    start_step: Annotated[int, Field(ge=0)] = 0  # first step that is guided; 0: all of them
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


# Published settings for Stable Diffusion 1.5 at 512² (the last: SDXL at 1024²). One line each, to compare by eye.
_COLUMNS = ("method", "steps", "iterations", "learning_rate", "content_weight", "guidance_scale", "adain")
# fmt: off
_ROWS: dict[str, tuple[Any, ...]] = {
    #                         method        steps iter  lr     λ     CFG  AdaIN
    "style-transfer":       ("optimization", 200,  1, 0.05,  0.25,  1.0, False),
    "guided-transfer":      ("guided",        50,  1, 0.05,  0.25,  1.0, False),
    "texture":              ("optimization", 300,  1, 0.05,  0.0,   1.0, False),
    "texture-fast":         ("guided",        50,  3, 0.05,  0.0,   1.0, False),
    "text-to-image":        ("guided",        50,  3, 0.015, 0.0,   7.5, True),
    "text-to-image-sdxl":   ("guided",        50,  2, 0.015, 0.0,   7.0, True),
}
# fmt: on
PRESETS: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}
DEFAULT_PRESET = "guided-transfer"


def cpu_micro_batch(size: tuple[int, int]) -> int:
    """Pairs in one UNet call on a CPU, for images of `size` pixels: 8 at 256² and below, 2 at 512².

    Measured by benchmarks/throughput.py: a call with more to do gains nothing more, and takes more memory.
    """
    width, height = size
    return max(1, min(8, 8 * 256**2 // (width * height)))
