"""The job: one strict model of the YAML file. Every key of a job file is a field here; there are no others."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from stylemill.config.paths import absolute
from stylemill.config.sampling import DEFAULT_PRESET, PRESETS, ControlNet, DType, Fit, Frozen, Inputs, Lora, Sampling
from stylemill.config.yaml import LARGEST, load_yaml
from stylemill.errors import JobError
from stylemill.models.single_file import CHECKPOINT_SUFFIXES

# The description of a field that takes values of two kinds is what a message says was expected.
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=64, le=8192)]  # pixels


class Model(Frozen):
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
    def _pins_fit_the_name(self) -> Model:
        single = self.name.endswith(CHECKPOINT_SUFFIXES)
        if self.config is not None and not single:
            raise ValueError(f"config {self.config!r} is for a single checkpoint file; {self.name!r} has its own")
        if self.revision is not None and single:
            raise ValueError(f"revision {self.revision!r} is for a hub id, not for the file {self.name!r}")
        return self


class Image(Frozen):
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


class Shards(Frozen):
    """How rows are cut into shards and how images are stored."""

    pairs_per_shard: Annotated[Count | Auto, Field(description="a number of pairs, 1 or more, or auto")] = "auto"
    image_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Annotated[int, Field(ge=1, le=100)] = 95  # jpeg and webp


class Checkpoint(Frozen):
    every_steps: Count = 5


class Cluster(Frozen):
    """Where and how wide the job runs. Worker count never changes a byte of the output; threads, micro_batch and
    feature_budget_mb may."""

    address: str | None = None  # None: Ray starts and stops on this machine with the run
    workers: Annotated[Count | Auto, Field(description="a number of workers, 1 or more, or auto")] = "auto"
    gpus_per_worker: Annotated[
        Annotated[float, Field(ge=0)] | Auto, Field(description="a number of GPUs, 0 or more, or auto")
    ] = "auto"
    threads: Count = 1  # CPU threads of one worker
    micro_batch: Annotated[
        Count | Auto, Field(description="a number of pairs in one UNet call, 1 or more, or auto")
    ] = "auto"
    feature_budget_mb: Count = 4096  # features held at once; a shard above it works in blocks
    # Seconds without news after which a worker counts as hanging: in a step, unless the slowest one before it was
    # already a twentieth of that; and in the first step, or while it loads, reads, decodes or writes.
    step_timeout: Annotated[float, Field(gt=0)] = 600.0
    stage_timeout: Annotated[float, Field(gt=0)] = 3600.0


class Job(Frozen):
    """A whole job. Paths in a job file are relative to the file's folder; `Job.load` makes them absolute."""

    name: str
    manifest: str
    output: str  # a folder, or s3://bucket/folder
    model: Model
    preset: str | None = DEFAULT_PRESET
    sampling: Sampling = Sampling()
    images_per_pair: Annotated[int, Field(ge=1, le=10_000)] = 1  # of each manifest row, each from noise of its own
    image: Image = Image()
    inputs: Inputs = Inputs()
    shards: Shards = Shards()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    retries: Annotated[int, Field(ge=0)] = 3  # attempts a shard has beyond its first, per start
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5

    @field_validator("model", mode="before")
    @classmethod
    def _name_is_a_model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def slot_size(self, pixels_per_latent: int) -> tuple[int, int]:
        """The largest width and height, in pixels, that the UNet sees at once: an output's, or a window's."""
        width, height = self.image.width_height
        side = self.sampling.window * pixels_per_latent if self.sampling.window else max(width, height)
        return min(width, side), min(height, side)

    @model_validator(mode="after")
    def _sizes_make_sense(self) -> Job:
        if self.image.fit == "keep" and self.sampling.tiling != "none" and self.sampling.window is not None:
            raise ValueError(
                f"image.fit keep gives outputs many sizes, and sampling.tiling {self.sampling.tiling} in windows"
                f" (sampling.window {self.sampling.window}) needs one"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _preset_below_sampling(cls, values: Any) -> Any:
        """`sampling` overrides the preset key by key, so the resolved job needs no preset to be read again."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", DEFAULT_PRESET)
        if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
            raise ValueError(f"preset {preset!r} is not one of: {', '.join(PRESETS)}")
        given = values.get("sampling") or {}
        if isinstance(given, Sampling) or preset is None or not isinstance(given, dict):
            return values
        return {**values, "sampling": {**PRESETS[preset], **given}}

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        if self.model.controlnet and self.sampling.method == "optimization":
            raise ValueError("model.controlnet acts while denoising, and sampling.method optimization does not denoise")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> Job:
        """Read a YAML job file; `overrides` maps dotted keys (`sampling.steps`) to values that win over the file.

        Raises JobError naming the file, the key and what is allowed there.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise JobError(f"{path}: larger than {LARGEST:,} bytes; that is no job file")
            text = data.decode("utf-8")
        except FileNotFoundError:
            raise JobError(f"{path}: no such job file") from None
        except UnicodeDecodeError as error:
            raise JobError(f"{path}: not a text file in UTF-8: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise JobError(f"{path}: the job file cannot be read: {error.strerror or error}") from error
        values = load_yaml(text, str(path))
        if not isinstance(values, dict):
            raise JobError(f"{path}: a job file holds keys and values such as 'manifest: pairs.parquet'")
        values.setdefault("name", path.stem)
        given = dict(overrides or {})
        try:
            absolute(values, path.absolute().parent)
            absolute(given, Path.cwd())
        except (ValueError, RuntimeError) as error:  # a NUL character; the home folder of an unknown user
            raise JobError(f"{path}: manifest, output and model must be paths: {error}") from None
        for key, value in given.items():
            set_dotted(values, key, value)
        return cls.parse(values, str(path), frozenset(given))

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "job", overridden: frozenset[str] = frozenset()) -> Job:
        """Validate plain values, naming `where` they came from in any JobError; `overridden` keys came from flags."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            complaints = dict(_complaint(problem, values) for problem in error.errors())
        lines = [
            f"{where}{', overridden by a flag' if key in overridden else ''}: {words}"
            for key, words in complaints.items()
        ]
        raise JobError("\n".join(lines))


def _range(layers: Any) -> Sequence[Any]:
    """The numbers of a range such as "10-15"; anything else as it is."""
    ends = re.fullmatch(r"(\d{1,3})\s*-\s*(\d{1,3})", layers) if isinstance(layers, str) else None
    if ends is None:
        return [layers]
    first, last = map(int, ends.groups())
    if first > last:
        raise ValueError(f"range {layers} runs backwards")
    return range(first, last + 1)


def set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        if parent == "model" and isinstance(inner, str):
            inner = {"name": inner}
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    values[last] = value


# --- what pydantic found, in words for a user who knows only the keys of the file -------------------------------------


def _complaint(problem: Any, values: dict[str, Any]) -> tuple[str, str]:
    """The dotted key of a problem and what to say of it. Each member of a union complains; a key is named once."""
    kind, location = problem["type"], [str(part) for part in problem["loc"] if not isinstance(part, int)]
    keys, allowed = _known_part(location)
    if kind in ("extra_forbidden", "invalid_key"):
        unknown = str(problem["loc"][-1])
        near = difflib.get_close_matches(unknown, allowed, n=1) or _elsewhere(unknown)
        meant = f"did you mean '{near[0]}'? " if near else ""
        return ".".join([*keys, unknown]), (
            f"unknown key '{'.'.join([*keys, unknown])}'; {meant}allowed here: {', '.join(allowed)}"
        )
    key = ".".join(keys)
    if kind == "missing" and keys == location:  # else a place of a list
        return key, f"key '{key}' is missing; a job names at least {', '.join(_REQUIRED)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        return key, message
    given: Any = values
    field = None
    fields = Job.model_fields
    for part in keys:
        given = given.get(part) if isinstance(given, dict) else given
        field = fields[part]
        fields = _fields(field.annotation)
    if field is not None and field.description:
        message = f"expected {field.description}"
    elif kind == "value_error" and isinstance(given, dict):  # of several keys together, which it names
        return key, f"{key}: {message}"
    elif kind == "model_type":
        message = f"expected keys below it: {', '.join(fields)}"
    elif kind == "string_type":
        message = "expected text, if need be in quotes"
    elif kind == "bool_type":
        message = "expected true or false"
    return key, f"{key}: {message.replace('Input should be', 'expected')}, not {reprlib.repr(given)}"


def _known_part(location: list[str]) -> tuple[list[str], list[str]]:
    """The keys of a job that a location begins with, before union members and indices, and what may stand below."""
    keys: list[str] = []
    fields = Job.model_fields
    for part in location:
        if part not in fields:
            break
        keys.append(part)
        fields = _fields(fields[part].annotation)
    return keys, list(fields)


def _fields(annotation: Any) -> dict[str, Any]:
    if get_origin(annotation) is tuple:  # of models, any number of them
        annotation = get_args(annotation)[0]
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}


def _elsewhere(unknown: str) -> list[str]:
    """Keys of this name that belong below another."""
    return [f"{name}.{unknown}" for name, field in Job.model_fields.items() if unknown in _fields(field.annotation)]


_REQUIRED = [name for name, field in Job.model_fields.items() if field.is_required() and name != "name"]
