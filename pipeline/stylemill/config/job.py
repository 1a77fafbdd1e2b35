"""The job: one strict model of the YAML file. Every key of a job file is a field here; there are no others."""

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
from stylemill.config.yaml import LARGEST, load_yaml
from stylemill.errors import JobError

# The description of a field that takes values of two kinds is what a message says was expected.
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]


class ShardSettings(StrictModel):
    """How rows are cut into shards and how images are stored."""

    pairs_per_shard: Annotated[Count | Auto, Field(description="a number of pairs, 1 or more, or auto")] = "auto"
    image_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Annotated[int, Field(ge=1, le=100)] = 95  # jpeg and webp


class CheckpointSettings(StrictModel):
    every_steps: Count = 5


class ClusterSettings(StrictModel):
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


class Job(StrictModel):
    """A whole job. Paths in a job file are relative to the file's folder; `Job.load` makes them absolute."""

    name: str
    manifest: str
    output: str  # a folder, or s3://bucket/folder
    model: ModelSettings
    preset: str | None = DEFAULT_PRESET
    sampling: Sampling = Sampling()
    images_per_pair: Annotated[int, Field(ge=1, le=10_000)] = 1  # of each manifest row, each from noise of its own
    image: ImageSettings = ImageSettings()
    inputs: InputSettings = InputSettings()
    shards: ShardSettings = ShardSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
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
            make_paths_absolute(values, path.absolute().parent)
            make_paths_absolute(given, Path.cwd())
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
            problems = dict(describe_problem(problem, values, cls) for problem in error.errors())
        lines = [
            f"{where}{', overridden by a flag' if key in overridden else ''}: {words}"
            for key, words in problems.items()
        ]
        raise JobError("\n".join(lines))


def set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        if parent == "model" and isinstance(inner, str):
            inner = {"name": inner}
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    values[last] = value
