"""The job: one strict model of the YAML file. Its fields are all keys that a job file may have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from stylemill.config.base import StrictModel
from stylemill.config.inputs import ImageSettings, InputSettings
from stylemill.config.model import ModelSettings
from stylemill.config.paths import make_paths_absolute
from stylemill.config.sampling import DEFAULT_PRESET, PRESETS, Sampling
from stylemill.config.validation_messages import describe_problem
from stylemill.config.yaml import load_yaml
from stylemill.errors import JobError

MAX_FILE_BYTES = 1 << 20  # of a job file

# Fields that take two types have a description: error messages say that it was expected.
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]


class ShardSettings(StrictModel):
    """How rows are divided into shards, and how output images are stored."""

    pairs_per_shard: Annotated[Count | Auto, Field(description="a number of pairs, 1 or more, or auto")] = "auto"
    image_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Annotated[int, Field(ge=1, le=100)] = 95  # jpeg and webp


class CheckpointSettings(StrictModel):
    every_steps: Count = 5


class ClusterSettings(StrictModel):
    """Where the job runs, and with how many workers.

    The number of workers never changes a byte of the output; threads, micro_batch, feature_budget_mb, compile and
    deterministic may.
    """

    address: str | None = None  # of a Ray cluster; None: Ray starts and stops with the run, on this machine
    workers: Annotated[Count | Auto, Field(description="a number of workers, 1 or more, or auto")] = "auto"
    gpus_per_worker: Annotated[
        Annotated[float, Field(ge=0)] | Auto,
        Field(description="a whole number of GPUs, a part of one in steps of 0.0001, or auto"),
    ] = "auto"
    threads: Count = 1  # CPU threads of one worker
    micro_batch: Annotated[
        Count | Auto, Field(description="a number of pairs in one UNet call, 1 or more, or auto")
    ] = "auto"
    feature_budget_mb: Count = 4096  # features in memory at once; a larger shard is sampled in blocks
    compile: bool = False  # the UNet, by torch.compile: fewer and faster kernels on a GPU, after minutes of compiling
    deterministic: bool = True  # false: faster gradients on a GPU, whose low bits differ each time
    # Seconds without progress after which a worker is killed. step_timeout: in a sampling step, or 20 times the slowest
    # step before it where that is longer. stage_timeout: in any other stage, and in the first step.
    step_timeout: Annotated[float, Field(gt=0)] = 600.0
    stage_timeout: Annotated[float, Field(gt=0)] = 3600.0

    @field_validator("gpus_per_worker")
    @classmethod
    def _check_gpus(cls, value: float | Auto) -> float | Auto:
        if isinstance(value, float) and not (value.is_integer() if value >= 1 else value == round(value, 4)):
            raise ValueError("Ray would refuse it")
        return value


class Job(StrictModel):
    """A whole job. Paths in a job file are relative to its folder; `Job.load` makes them absolute."""

    name: str
    manifest: str
    output: str  # a folder, or s3://bucket/folder
    model: ModelSettings
    preset: str | None = DEFAULT_PRESET
    sampling: Sampling = Sampling()
    images_per_pair: Annotated[int, Field(ge=1, le=10_000)] = (
        1  # output rows of each manifest row, with different noise
    )
    image: ImageSettings = ImageSettings()
    inputs: InputSettings = InputSettings()
    shards: ShardSettings = ShardSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
    retries: Annotated[int, Field(ge=0)] = 3  # further attempts at each shard, for each start of the run
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5

    @field_validator("model", mode="before")
    @classmethod
    def _name_to_model_settings(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def unet_call_size(self, pixels_per_latent: int) -> tuple[int, int]:
        """The largest width and height, in pixels, in one UNet call: those of an output image or of a window."""
        width, height = self.image.width_height
        side = self.sampling.window * pixels_per_latent if self.sampling.window else max(width, height)
        return min(width, side), min(height, side)

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """`sampling` overrides the preset key by key. A resolved job has every key, so its preset has no effect."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", DEFAULT_PRESET)
        if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
            raise ValueError(f"preset {preset!r} is not one of: {', '.join(PRESETS)}")
        sampling = values.get("sampling") or {}
        if isinstance(sampling, Sampling) or preset is None or not isinstance(sampling, dict):
            return values
        return {**values, "sampling": {**PRESETS[preset], **sampling}}

    @model_validator(mode="after")
    def _check_sizes(self) -> Job:
        if self.image.fit == "keep" and self.sampling.tiling != "none" and self.sampling.window is not None:
            raise ValueError(
                f"image.fit keep gives outputs of several sizes, and sampling.tiling {self.sampling.tiling} with"
                f" sampling.window {self.sampling.window} needs a single one"
            )
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> Job:
        limit = 2**63 - self.images_per_pair
        if self.sampling.seed > limit:
            raise ValueError(
                f"sampling.seed {self.sampling.seed} with images_per_pair {self.images_per_pair} gives an image a seed"
                f" beyond 2^63 - 1; the largest sampling.seed is {limit}"
            )
        return self

    @model_validator(mode="after")
    def _check_controlnet(self) -> Job:
        if self.model.controlnet and self.sampling.method == "optimization":
            raise ValueError("model.controlnet acts while denoising, and sampling.method optimization does not denoise")
        if self.model.controlnet and self.sampling.reuse_prediction:
            raise ValueError(
                "model.controlnet acts while denoising, and sampling.reuse_prediction takes predictions made without it"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> Job:
        """Read a YAML job file. `overrides` maps dotted keys (`sampling.steps`) to values that replace the file's.

        Raises JobError with the file, the key, and the values allowed there.
        """
        path = Path(path)
        values = load_yaml(_read_text(path), str(path))
        if not isinstance(values, dict):
            raise JobError(f"{path}: a job file has keys and values such as 'manifest: pairs.parquet'")
        values.setdefault("name", path.stem)
        overrides = dict(overrides or {})
        try:
            make_paths_absolute(values, path.absolute().parent)
            make_paths_absolute(overrides, Path.cwd())
        except (ValueError, RuntimeError) as error:  # a NUL character; the home folder of an unknown user
            raise JobError(f"{path}: manifest, output and model must be paths: {error}") from None
        for key, value in overrides.items():
            set_dotted(values, key, value)
        return cls.parse(values, str(path), frozenset(overrides))

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "job", overridden: frozenset[str] = frozenset()) -> Job:
        """Validate plain values. Raises JobError with `where` they come from; `overridden` keys come from flags."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = dict(describe_problem(problem, values, cls) for problem in error.errors())
        lines = [
            f"{where}{', overridden by a flag' if key in overridden else ''}: {message}"
            for key, message in problems.items()
        ]
        raise JobError("\n".join(lines))


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise JobError(f"{path}: is larger than {MAX_FILE_BYTES:,} bytes, the limit of a job file")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: not a text file in UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise JobError(f"{path}: the job file cannot be read: {error.strerror or error}") from error


def set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value at a dotted key (`sampling.steps`), in place."""
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        if parent == "model" and isinstance(inner, str):
            inner = {"name": inner}
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    values[last] = value
