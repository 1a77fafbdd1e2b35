"""Sampling settings and the table of presets. Imports no torch: the job file and the engine share it.

Source of methods, symbols and published values: attention distillation, arXiv 2502.20235.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from stylemill.config.base import StrictModel
from stylemill.config.schedulers import SCHEDULERS, scheduler_problem

Method = Literal["guided", "gradient", "optimization", "kv_injection"]
Init = Literal["auto", "noise", "content"]
Tiling = Literal["none", "x", "y", "both"]


class SamplingPasses(NamedTuple):
    """UNet passes in all steps: of a pair (of each of its windows), and of an image whose features are read."""

    denoise: int
    gradient: int
    features: int


class Sampling(StrictModel):
    """How each pair of a job is sampled. Names follow diffusers; the paper's λ is `content_weight`.

    Methods: `guided`, denoising with a fresh Adam at every timestep; `gradient`, the same with z − η∇L instead of
    Adam; `optimization`, one Adam for the whole run and no denoising; `kv_injection`, which replaces K and V (and Q
    where λ is above 0) while denoising, and computes no gradient. Settings that a method does not use (iterations,
    learning_rate) may be given, so that one job file works with every `method`.
    """

    method: Method = "guided"
    steps: Annotated[int, Field(ge=1, le=999)] = 50
    iterations: Annotated[int, Field(ge=0, le=100)] = 1  # gradient steps at a timestep
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    content_weight: Annotated[float, Field(ge=0)] = 0.25  # λ; 0: no content loss; a manifest column overrides it
    content_schedule: tuple[float, float] = (1.0, 1.0)  # factors on λ at the first and last step, linear between
    scheduler: str = "ddim"  # a key of schedulers.SCHEDULERS; lcm and tcd need a LoRA for few steps
    eta: Annotated[float, Field(ge=0, le=1)] | None = None  # noise that ddim and tcd add; None: 0 and 0.3
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  # classifier-free guidance; 1 or less is off
    adain: bool = False  # before the gradient steps or injection of a timestep, z takes the statistics of its styles
    query_scale: Annotated[float, Field(gt=0)] = 1.0  # factor on Q in the ideal attention; 1.5 sharpens the match
    layer_weights: tuple[float, ...] | None = None  # of the layers used, in running order; None: 1 each
    start_step: Annotated[int, Field(ge=0)] = 0  # the first guided step
    end_step: Annotated[int, Field(ge=1)] | None = None  # the first step after the guided ones; None: all are guided
    guided_every: Annotated[int, Field(ge=1)] = 1  # of the steps between these two, only every n-th is guided
    reuse_prediction: bool = False  # after a guided step, denoise with the ε that its last gradient pass computed
    init: Init = "auto"  # auto: the content latent for optimization, noise otherwise
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the noise added to the content where init is content
    tiling: Tiling = "none"  # output whose left and right (x) or upper and lower (y) edges continue each other
    window: Annotated[int, Field(ge=8)] | None = None  # side, in latents, of the windows of a larger output
    window_stride: Annotated[int, Field(ge=1)] = 8  # latents from one window to the next
    refine_decoder_steps: Annotated[int, Field(ge=0)] = 0  # fine-tunes the VAE's decoder on each style; published: 75
    refine_decoder_lr: Annotated[float, Field(gt=0, le=1)] = 1e-4  # learning rate of that fine-tuning
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("content_schedule", "layer_weights", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler_name(cls, name: str) -> str:
        if problem := scheduler_problem(name):
            raise ValueError(problem)
        return name

    @model_validator(mode="after")
    def _check_scheduler_options(self) -> Sampling:
        kind = SCHEDULERS[self.scheduler]
        if self.steps > kind.max_steps:
            raise ValueError(
                f"steps {self.steps} is above {kind.max_steps}, the most that scheduler {self.scheduler} has"
            )
        if self.eta is not None and not kind.takes_eta:
            raise ValueError(f"eta {self.eta} is for the schedulers ddim and tcd, not for scheduler {self.scheduler}")
        if self.eta is not None and self.method == "optimization":
            raise ValueError(f"eta {self.eta} acts while denoising, and method optimization does not denoise")
        if self.window is not None and (kind.draws or kind.history or self.eta):
            cause = f"eta {self.eta} adds noise" if self.eta else f"scheduler {self.scheduler} keeps noise or history"
            raise ValueError(
                f"window {self.window} cuts a latent into windows at each step, but {cause} for whole latents"
            )
        return self

    @model_validator(mode="after")
    def _check_guided_steps(self) -> Sampling:
        end = self.steps if self.end_step is None else self.end_step
        if self.start_step >= min(end, self.steps):
            last = "steps" if self.end_step is None or self.steps <= end else "end_step"
            raise ValueError(f"start_step {self.start_step} leaves no guided step before {last} {min(end, self.steps)}")
        if self.strength < 1 and self.init != "content":
            raise ValueError(f"strength {self.strength} is for init: content, not for init: {self.init}")
        if self.strength < 1 and self.method == "optimization":
            raise ValueError(f"strength {self.strength} adds noise to the content, but method optimization adds none")
        if self.first_step >= min(end, self.steps):
            raise ValueError(
                f"strength {self.strength} starts at step {self.first_step}, and end_step {end} ends the guided steps"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Sampling:
        if any(value < 0 for value in (*self.content_schedule, *(self.layer_weights or ()))):
            raise ValueError("content_schedule and layer_weights take numbers of 0 or more")
        if self.layer_weights is not None and not any(self.layer_weights):
            raise ValueError("layer_weights need a number above 0; to turn the gradient steps off, set iterations: 0")
        if not any(self.content_schedule):
            raise ValueError(
                "content_schedule needs a number above 0; to turn the content loss off, set content_weight: 0"
            )
        return self

    @model_validator(mode="after")
    def _check_options_of_the_method(self) -> Sampling:
        if self.method == "optimization":
            if not self.iterations:
                raise ValueError("iterations 0 makes method optimization do nothing, since it does not denoise")
            for name, value, off in (("adain", self.adain, False), ("guidance_scale", self.guidance_scale, 1.0)):
                if value > off:
                    raise ValueError(f"{name} {value} acts while denoising, and method optimization does not denoise")
            if self.guided_every > 1:
                raise ValueError(
                    f"guided_every {self.guided_every} leaves steps in which method optimization does nothing;"
                    " to take fewer steps, lower steps"
                )
        if self.refine_decoder_lr != 1e-4 and not self.refine_decoder_steps:
            raise ValueError(f"refine_decoder_lr {self.refine_decoder_lr} has no effect with refine_decoder_steps 0")
        if self.method == "kv_injection":
            if self.layer_weights is not None:
                raise ValueError("layer_weights are factors on losses, and method kv_injection has none")
            if self.content_schedule != (1.0, 1.0):
                raise ValueError("content_schedule is a factor on a loss, and method kv_injection has none")
        return self

    @model_validator(mode="after")
    def _check_reuse_of_predictions(self) -> Sampling:
        if not self.reuse_prediction:
            return self
        if self.method in ("optimization", "kv_injection"):
            raise ValueError(f"reuse_prediction is for methods guided and gradient, not for method {self.method}")
        if not self.iterations:
            raise ValueError("reuse_prediction takes the prediction of a gradient step, and iterations 0 takes none")
        if self.guidance_scale > 1:
            raise ValueError(
                f"reuse_prediction takes the prediction for the empty prompt alone, and guidance_scale"
                f" {self.guidance_scale} needs two"
            )
        if self.window is not None:
            raise ValueError(
                f"reuse_prediction takes the prediction for whole latents, and window {self.window} predicts in windows"
            )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Sampling:
        if self.window is None:
            if self.window_stride != 8:
                raise ValueError(f"window_stride {self.window_stride} has no effect without window")
            return self
        if self.method != "guided":
            raise ValueError(f"window {self.window} is for method guided, not for method {self.method}")
        if self.window_stride > self.window:
            raise ValueError(f"window_stride {self.window_stride} leaves gaps between windows of {self.window}")
        return self

    @property
    def first_step(self) -> int:
        """The step at which sampling begins: 0, or a later one where it begins at a partly noised content."""
        denoises_content = self.init == "content" and self.method != "optimization"
        return min(self.steps - 1, self.steps - round(self.steps * self.strength)) if denoises_content else 0

    def guides(self, step: int) -> bool:
        """Whether a step is guided: followed by gradient steps on the losses, or done with injected K and V.

        The first guided step is the later of `start_step` and `first_step`.
        """
        first, end = max(self.start_step, self.first_step), self.steps if self.end_step is None else self.end_step
        return first <= step < end and (step - first) % self.guided_every == 0

    def reuses(self, step: int) -> bool:
        """Whether a step denoises with the prediction of the last gradient pass of the step before it."""
        return self.reuse_prediction and self.guides(step - 1)

    def step_kind(self, step: int) -> tuple[bool, bool]:
        """Steps of one kind make the same UNet passes, so that they take about the same time."""
        return self.guides(step), self.reuses(step)

    @property
    def guided_steps(self) -> int:
        """The number of guided steps."""
        return sum(map(self.guides, range(self.first_step, self.steps)))

    @property
    def passes(self) -> SamplingPasses:
        """The UNet passes of a run."""
        optimizes, injects = self.method == "optimization", self.method == "kv_injection"
        copies, steps = 2 if self.guidance_scale > 1 else 1, range(self.first_step, self.steps)
        iterations = 0 if injects else self.iterations
        feature_steps = self.guided_steps if injects or iterations else 0
        return SamplingPasses(
            denoise=0 if optimizes else (len(steps) - sum(map(self.reuses, steps))) * copies,
            gradient=iterations * feature_steps,
            features=feature_steps,
        )

    def window_starts(self, size: int, axis: Literal["x", "y"]) -> list[int]:
        """The first latents of the windows along an axis of `size` latents.

        Windows begin every `window_stride` latents. The last one is moved inside, or wraps around where the axis is
        tiled.
        """
        if self.window is None or size <= self.window:
            return [0]
        if self.tiling in (axis, "both"):
            return list(range(0, size, self.window_stride))
        last = size - self.window
        return [min(start, last) for start in range(0, last + self.window_stride, self.window_stride)]

    def content_factor(self, step: int) -> float:
        """The factor on λ at a step."""
        first, last = self.content_schedule
        return first + (last - first) * step / max(self.steps - 1, 1)


# Published settings for Stable Diffusion 1.5 at 512²; for text-to-image-sdxl, for SDXL at 1024².
_COLUMNS = ("method", "steps", "iterations", "learning_rate", "content_weight", "guidance_scale", "adain")
# fmt: off
_ROWS: dict[str, tuple[Any, ...]] = {
    #                         method        steps iter  lr     λ     CFG  AdaIN
    "style-transfer":       ("optimization", 200,  1, 0.05,  0.25,  1.0, False),
    "guided-transfer":      ("guided",        50,  1, 0.05,  0.25,  1.0, False),
    "texture":              ("optimization", 300,  1, 0.05,  0.0,   1.0, False),
    "texture-fast":         ("guided",        50,  3, 0.05,  0.0,   1.0, False),
    "texture-expansion":    ("guided",        50,  2, 0.05,  0.0,   1.0, False),  # and windows, below
    "text-to-image":        ("guided",        50,  3, 0.015, 0.0,   7.5, True),
    "text-to-image-sdxl":   ("guided",        50,  2, 0.015, 0.0,   7.0, True),
    "kv-injection":         ("kv_injection",  50,  1, 0.05,  0.25,  1.0, False),
    "few-steps":            ("optimization",  28,  3, 0.25,  0.33,  1.0, False),  # and scheduler lcm, below
}
# fmt: on
PRESETS: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}
PRESETS["texture-expansion"] |= {"window": 64, "window_stride": 8}
PRESETS["few-steps"] |= {"scheduler": "lcm"}  # with LCM-LoRA; with Hyper-SD: tcd, learning rate 0.15, λ 0.38
DEFAULT_PRESET = "guided-transfer"
