"""Settings of the model: its name, precision and attention layers, LoRAs and ControlNets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stylemill.config.base import StrictModel

DType = Literal["auto", "float16", "bfloat16", "float32", "float64"]
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


class ControlNet(StrictModel):
    """A ControlNet, used while denoising: a diffusers folder or hub id.

    The job's list of ControlNets has the order of a row's control images.
    """

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    scale: Annotated[float, Field(ge=0)] = 1.0  # factor on what it adds to the UNet
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the fraction of the steps at which it begins to act
    end: Annotated[float, Field(gt=0, le=1)] = 1.0  # the fraction of the steps at which it stops acting

    @model_validator(mode="after")
    def _check_range(self) -> ControlNet:
        if self.start >= self.end:
            raise ValueError(f"controlnet start {self.start} is not before its end {self.end}")
        return self

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts at `step` of `steps`, by the rule of diffusers' pipelines."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


class Lora(StrictModel):
    """A LoRA, added to the model's weights: a .safetensors file, or a folder or hub id that has one."""

    name: Annotated[str, Field(min_length=1)]
    file: str | None = None  # in the folder or hub id; None: pytorch_lora_weights.safetensors, or the only file
    revision: str | None = None
    scale: float = 1.0


class ModelSettings(StrictModel):
    """A diffusers model: a folder, a hub id or a .safetensors checkpoint. A plain string in the YAML is its `name`."""

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None  # of a hub id; a run records the commit it was planned with
    config: str | None = None  # for a single checkpoint file: folder or hub id with the configuration of its family
    dtype: DType = "auto"  # float16 if the first worker of the run has a GPU, else float32
    layers: Annotated[  # self-attention layers whose features are used, numbered in running order; None: the last six
        tuple[int | str, ...] | None,
        Field(description="numbers of self-attention layers from 0 to 999, a range such as 10-15, or names of modules"),
    ] = None
    loras: tuple[Lora, ...] = ()  # added to the weights, in this order
    controlnet: tuple[ControlNet, ...] = ()  # used while denoising, in the order of the rows' control images

    @field_validator("layers", mode="before")
    @classmethod
    def _expand_ranges(cls, value: Any) -> Any:
        items = [value] if isinstance(value, int | str) else value
        if not isinstance(items, list | tuple):
            return value
        return tuple(layer for item in items for layer in _expand_range(item))

    @field_validator("controlnet", "loras", mode="before")
    @classmethod
    def _to_tuple_of_settings(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple({"name": item} if isinstance(item, str) else item for item in items)

    @model_validator(mode="after")
    def _check_options_of_the_name(self) -> ModelSettings:
        single_file = self.name.endswith(CHECKPOINT_SUFFIXES)
        if self.config is not None and not single_file:
            raise ValueError(f"config {self.config!r} is for a single checkpoint file; {self.name!r} has its own")
        if self.revision is not None and single_file:
            raise ValueError(f"revision {self.revision!r} is for a hub id, not for the file {self.name!r}")
        return self


def _expand_range(layers: Any) -> Sequence[Any]:
    """The numbers of a range such as "10-15"; any other value unchanged, in a list."""
    ends = re.fullmatch(r"(\d{1,3})\s*-\s*(\d{1,3})", layers) if isinstance(layers, str) else None
    if ends is None:
        return [layers]
    first, last = map(int, ends.groups())
    if first > last:
        raise ValueError(f"range {layers} ends before it begins")
    return range(first, last + 1)
