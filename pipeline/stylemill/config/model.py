"""Settings of the model: its name, precision and attention layers, LoRAs and ControlNets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stylemill.config.base import StrictModel

DType = Literal["auto", "float16", "bfloat16", "float32", "float64"]
EMBEDDED = "demo"  # the name of the model that comes with the package; a folder of this name is ./demo
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


class ControlNet(StrictModel):
    """A ControlNet that denoising sees: a diffusers folder or hub id. Its place in the job's list is its control's."""

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    scale: Annotated[float, Field(ge=0)] = 1.0  # of what it adds to the UNet
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the share of the steps before it acts
    end: Annotated[float, Field(gt=0, le=1)] = 1.0  # and after which it acts no more

    @model_validator(mode="after")
    def _makes_sense(self) -> ControlNet:
        if self.start >= self.end:
            raise ValueError(f"controlnet start {self.start} is not before its end {self.end}")
        return self

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts at a step, by the rule of diffusers' pipelines."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


class Lora(StrictModel):
    """A LoRA that is added to the model's weights: a .safetensors file, or a folder or hub id with such a file."""

    name: Annotated[str, Field(min_length=1)]
    file: str | None = None  # of the folder or hub id; None: pytorch_lora_weights.safetensors, or the only one
    revision: str | None = None
    scale: float = 1.0


class ModelSettings(StrictModel):
    """A diffusers model: a folder, a hub id or a .safetensors checkpoint. A plain string in the YAML is its `name`."""

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None  # of a hub id; what a run was planned with is a commit
    config: str | None = None  # of a single checkpoint file: folder or hub id with the configuration of its family
    dtype: DType = "auto"  # float16 on CUDA, float32 on a CPU
    layers: Annotated[  # self-attention layers whose features are used, numbered as they run; None: the last six
        tuple[int | str, ...] | None,
        Field(description="numbers of self-attention layers from 0 to 999, a range such as 10-15, or names of modules"),
    ] = None
    loras: tuple[Lora, ...] = ()  # added to the weights, in this order
    controlnet: tuple[ControlNet, ...] = ()  # seen while denoising, in the order of the rows' control images

    @field_validator("layers", mode="before")
    @classmethod
    def _ranges_are_numbers(cls, value: Any) -> Any:
        given = [value] if isinstance(value, int | str) else value
        if not isinstance(given, list | tuple):
            return value
        return tuple(layer for one in given for layer in _range(one))

    @field_validator("controlnet", "loras", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        return tuple({"name": one} if isinstance(one, str) else one for one in given)

    @model_validator(mode="after")
    def _pins_fit_the_name(self) -> ModelSettings:
        single = self.name.endswith(CHECKPOINT_SUFFIXES)
        if self.config is not None and not single:
            raise ValueError(f"config {self.config!r} is for a single checkpoint file; {self.name!r} has its own")
        if self.revision is not None and single:
            raise ValueError(f"revision {self.revision!r} is for a hub id, not for the file {self.name!r}")
        return self


def _range(layers: Any) -> Sequence[Any]:
    """The numbers of a range such as "10-15"; anything else as it is."""
    ends = re.fullmatch(r"(\d{1,3})\s*-\s*(\d{1,3})", layers) if isinstance(layers, str) else None
    if ends is None:
        return [layers]
    first, last = map(int, ends.groups())
    if first > last:
        raise ValueError(f"range {layers} runs backwards")
    return range(first, last + 1)
