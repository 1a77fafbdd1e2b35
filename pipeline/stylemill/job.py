"""The job: one strict model of the YAML file. Every key of a job file is a field here; there are no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from stylemill.errors import JobError
from stylemill.settings import DEFAULT_PRESET, PRESETS, DType, Fit, Frozen, Sampling

Auto = Literal["auto"]


class Model(Frozen):
    """A diffusers model: a folder or a hub id. A plain string in the YAML is its `name`."""

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: DType = "auto"  # float16 on CUDA, float32 on a CPU
    layers: tuple[int, ...] | None = None  # self-attention layers in running order; None: the last six

    @field_validator("layers", mode="before")
    @classmethod
    def _list_is_a_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Image(Frozen):
    """How inputs are brought onto the model's grid."""

    size: Annotated[int, Field(ge=64, le=8192)] | tuple[int, int] = 512  # pixels; a pair is width, height
    fit: Fit = "crop"

    @field_validator("size", mode="before")
    @classmethod
    def _list_is_a_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def width_height(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Shards(Frozen):
    """How rows are cut into shards and how images are stored."""

    pairs_per_shard: Annotated[int, Field(ge=1)] | Auto = "auto"
    image_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Annotated[int, Field(ge=1, le=100)] = 95  # jpeg and webp


class Checkpoint(Frozen):
    every_steps: Annotated[int, Field(ge=1)] = 5


class Cluster(Frozen):
    """Where and how wide the job runs. Worker count never changes a byte of the output; the last three may."""

    address: str | None = None  # None: Ray starts and stops on this machine with the run
    workers: Annotated[int, Field(ge=1)] | Auto = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = "auto"
    threads: Annotated[int, Field(ge=1)] = 1  # CPU threads of one worker
    micro_batch: Annotated[int, Field(ge=1)] | Auto = "auto"  # pairs in one UNet call
    feature_budget_mb: Annotated[int, Field(ge=1)] = 4096  # features held at once; a shard above it works in blocks


class Job(Frozen):
    """A whole job. Paths in a job file are relative to the file's folder; `Job.load` makes them absolute."""

    name: str
    manifest: str
    output: str
    model: Model
    preset: str | None = DEFAULT_PRESET
    sampling: Sampling = Sampling()
    image: Image = Image()
    shards: Shards = Shards()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    retries: Annotated[int, Field(ge=0)] = 3  # attempts a shard has beyond its first, per start
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5

    @field_validator("model", mode="before")
    @classmethod
    def _name_is_a_model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _preset_below_sampling(cls, values: Any) -> Any:
        """`sampling` overrides the preset key by key, so the resolved job needs no preset to be read again."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", DEFAULT_PRESET)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not one of: {', '.join(PRESETS)}")
        given = values.get("sampling") or {}
        if isinstance(given, Sampling) or preset is None or not isinstance(given, dict):
            return values
        return {**values, "sampling": {**PRESETS[preset], **given}}

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        if self.sampling.start_step >= self.sampling.steps:
            raise ValueError(
                f"sampling.start_step {self.sampling.start_step} leaves no guided step of {self.sampling.steps}"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> Job:
        """Read a YAML job file; `overrides` maps dotted keys (`sampling.steps`) to values that win over the file.

        Raises JobError naming the file, the key and what is allowed there.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise JobError(f"{path}: no such job file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"{path}: cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise JobError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise JobError(f"{path}: a job file holds keys and values such as 'manifest: pairs.parquet'")
        values.setdefault("name", path.stem)
        _absolute(values, path.absolute().parent)
        given = dict(overrides or {})
        _absolute(given, Path.cwd())
        for key, value in given.items():
            _set_dotted(values, key, value)
        return cls.parse(values, str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "job") -> Job:
        """Validate plain values, naming `where` they came from in any JobError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise JobError("\n".join(_explain(where, problem) for problem in error.errors())) from None


def _is_local(reference: str) -> bool:
    return re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+://", reference) is None


def _absolute(values: dict[str, Any], base: Path) -> None:
    for key in ("manifest", "output"):
        if isinstance(values.get(key), str) and values[key] and _is_local(values[key]):
            values[key] = str((base / values[key]).resolve())
    model = values.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    # Hub ids look like relative paths: only a leading dot or slash, or a folder that is there, makes it a path.
    if isinstance(name, str) and (name.startswith((".", "/", "~")) or (base / name).is_dir()):
        name = str((base / Path(name).expanduser()).resolve())
        values["model"] = {**model, "name": name} if isinstance(model, dict) else name


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        if parent == "model" and isinstance(inner, str):
            inner = {"name": inner}
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    values[last] = value


def _explain(where: str, problem: Any) -> str:
    # pydantic adds the tried type of a union to the location; the user only knows the keys of the file.
    keys = [str(part) for part in problem["loc"] if not re.search(r"[\[(-]|^(int|float|str|tuple)$", str(part))]
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        known = Job.model_fields
        for part in keys[:-1]:
            known = known[part].annotation.model_fields  # type: ignore[union-attr]
        return f"{where}: unknown key '{key}'; allowed here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}: key '{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {key + ': ' if key else ''}{message}" + (f", not {problem['input']!r}" if key else "")
