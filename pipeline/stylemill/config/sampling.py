"""Sampling settings and the presets table. Torch-free: the job file and the engine share it.

Source of methods, symbols and published values: attention distillation, arXiv 2502.20235.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stylemill.config.base import StrictModel
from stylemill.config.schedulers import SCHEDULERS, refuse_scheduler

Method = Literal["guided", "gradient", "optimization", "kv_injection"]
Init = Literal["auto", "noise", "content"]
Tiling = Literal["none", "x", "y", "both"]


class Sampling(StrictModel):
    """How every pair of a job is sampled. Names follow diffusers; λ of the paper is `content_weight`.

    Methods: `guided`, denoising with a fresh Adam at every timestep; `gradient`, the same with z − η∇L instead of
    Adam; `optimization`, no denoising and one Adam for the run; `kv_injection`, the older method, which replaces K, V
    (and, where λ is above 0, Q) while denoising and follows no gradient. What belongs to another method's descent
    (iterations, learning_rate) may stand beside it, so that one job file serves all by its `method`.
    """

    method: Method = "guided"
    steps: Annotated[int, Field(ge=1, le=999)] = 50
    iterations: Annotated[int, Field(ge=0, le=100)] = 1  # Adam steps at a timestep
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    content_weight: Annotated[float, Field(ge=0)] = 0.25  # λ, 0: no content; a manifest column overrides it per row
    content_schedule: tuple[float, float] = (1.0, 1.0)  # factors on λ at the first and last step, linear between
    scheduler: str = "ddim"  # a name of scheduler_names.SCHEDULERS; lcm and tcd go with LoRAs for few steps
    eta: Annotated[float, Field(ge=0, le=1)] | None = None  # noise that ddim, tcd add; None: 0 and 0.3
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  # classifier-free guidance; 1 or less is off
    adain: bool = False  # before each guided step's descent, or injection, z takes the statistics of its styles
    query_scale: Annotated[float, Field(gt=0)] = 1.0  # Q · scale in the ideal attention; 1.5 sharpens the match
    layer_weights: tuple[float, ...] | None = None  # of the layers used, in running order; None: 1 each
    start_step: Annotated[int, Field(ge=0)] = 0  # first step that is guided
    end_step: Annotated[int, Field(ge=1)] | None = None  # first step that is guided no more; None: guided to the end
    init: Init = "auto"  # auto: the content latent for optimization, noise otherwise
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the noise laid on the content when denoising starts there
    tiling: Tiling = "none"  # output whose left and right (x), upper and lower (y) edges continue each other
    window: Annotated[int, Field(ge=8)] | None = None  # side, in latents, of the windows a larger output is made in
    window_stride: Annotated[int, Field(ge=1)] = 8  # latents from one window to the next
    refine_decoder_steps: Annotated[int, Field(ge=0)] = 0  # fine-tune the VAE's decoder on each style; published: 75
    refine_decoder_lr: Annotated[float, Field(gt=0, le=1)] = 1e-4  # of that Adam
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("content_schedule", "layer_weights", mode="before")
    @classmethod
    def _list_is_a_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        if reason := refuse_scheduler(name):
            raise ValueError(reason)
        return name

    @model_validator(mode="after")
    def _scheduler_can_do_it(self) -> Sampling:
        kind = SCHEDULERS[self.scheduler]
        if self.steps > kind.most_steps:
            raise ValueError(f"scheduler {self.scheduler} has {kind.most_steps} timesteps, not steps {self.steps}")
        if self.eta is not None and not kind.takes_eta:
            raise ValueError(f"eta {self.eta} belongs to schedulers ddim and tcd, not to scheduler {self.scheduler}")
        if self.eta is not None and self.method == "optimization":
            raise ValueError(f"eta {self.eta} acts while denoising, and method optimization does not denoise")
        if self.window is not None and (kind.draws or kind.history or self.eta):
            what = f"eta {self.eta} adds noise" if self.eta else f"scheduler {self.scheduler} keeps noise or history"
            raise ValueError(f"window {self.window} cuts a latent anew at each step, and {what} for whole ones")
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> Sampling:
        end = self.steps if self.end_step is None else self.end_step
        if self.start_step >= min(end, self.steps):
            last = "steps" if self.end_step is None or self.steps <= end else "end_step"
            raise ValueError(f"start_step {self.start_step} leaves no guided step before {last} {min(end, self.steps)}")
        if self.strength < 1 and self.init != "content":
            raise ValueError(f"strength {self.strength} belongs to init: content, not to init: {self.init}")
        if self.strength < 1 and self.method == "optimization":
            raise ValueError(f"strength {self.strength} lays noise on the content, method optimization starts at it")
        if self.first_step >= min(end, self.steps):
            raise ValueError(
                f"strength {self.strength} starts at step {self.first_step}, guidance ends at end_step {end}"
            )
        if any(value < 0 for value in (*self.content_schedule, *(self.layer_weights or ()))):
            raise ValueError("content_schedule and layer_weights take numbers of 0 or more")
        if self.layer_weights is not None and not any(self.layer_weights):
            raise ValueError("layer_weights without one above 0 leave nothing to follow; iterations: 0 is no guidance")
        if not any(self.content_schedule):
            raise ValueError("content_schedule without a number above 0 is content_weight: 0, and is to be said so")
        if self.method == "optimization" and not self.iterations:
            raise ValueError("iterations 0 leave method optimization nothing to do, for it does not denoise")
        if self.method == "optimization":
            for name, value, off in (("adain", self.adain, False), ("guidance_scale", self.guidance_scale, 1.0)):
                if value > off:
                    raise ValueError(f"{name} {value} acts while denoising, and method optimization does not denoise")
        if self.window is not None:
            if self.method != "guided":
                raise ValueError(f"window {self.window} belongs to method guided, not to method {self.method}")
            if self.window_stride > self.window:
                raise ValueError(f"window_stride {self.window_stride} leaves gaps between windows of {self.window}")
        elif self.window_stride != 8:
            raise ValueError(f"window_stride {self.window_stride} has no meaning without window")
        if self.refine_decoder_lr != 1e-4 and not self.refine_decoder_steps:
            raise ValueError(f"refine_decoder_lr {self.refine_decoder_lr} has no meaning with refine_decoder_steps 0")
        if self.method == "kv_injection":
            for name, given in (
                ("layer_weights", self.layer_weights is not None),
                ("content_schedule", self.content_schedule != (1.0, 1.0)),
            ):
                if given:
                    raise ValueError(f"{name} acts on losses, and method kv_injection has none")
        return self

    @property
    def first_step(self) -> int:
        """The step that sampling begins with: 0, or later when it begins at a content that is noised in part."""
        denoises_content = self.init == "content" and self.method != "optimization"
        return min(self.steps - 1, self.steps - round(self.steps * self.strength)) if denoises_content else 0

    def guides(self, step: int) -> bool:
        """Whether this step is pulled towards style and content."""
        return self.start_step <= step < (self.steps if self.end_step is None else self.end_step)

    @property
    def guided_steps(self) -> int:
        """How many steps are pulled towards style and content."""
        return sum(map(self.guides, range(self.first_step, self.steps)))

    def window_starts(self, size: int, axis: Literal["x", "y"]) -> list[int]:
        """Where windows begin along an axis of `size` latents: every stride, the last one moved inside, or wrapped."""
        if self.window is None or size <= self.window:
            return [0]
        if self.tiling in (axis, "both"):
            return list(range(0, size, self.window_stride))
        last = size - self.window
        return [min(start, last) for start in range(0, last + self.window_stride, self.window_stride)]

    def content_factor(self, step: int) -> float:
        """What λ is multiplied with at a step."""
        first, last = self.content_schedule
        return first + (last - first) * step / max(self.steps - 1, 1)


# Published settings for Stable Diffusion 1.5 at 512² (the last: SDXL at 1024²). One line each, to compare by eye.
_COLUMNS = ("method", "steps", "iterations", "learning_rate", "content_weight", "guidance_scale", "adain")
# fmt: off
_ROWS: dict[str, tuple[Any, ...]] = {
    #                         method        steps iter  lr     λ     CFG  AdaIN
    "style-transfer":       ("optimization", 200,  1, 0.05,  0.25,  1.0, False),
    "guided-transfer":      ("guided",        50,  1, 0.05,  0.25,  1.0, False),
    "texture":              ("optimization", 300,  1, 0.05,  0.0,   1.0, False),
    "texture-fast":         ("guided",        50,  3, 0.05,  0.0,   1.0, False),
    "texture-expansion":    ("guided",        50,  2, 0.05,  0.0,   1.0, False),  # and in windows, see below
    "text-to-image":        ("guided",        50,  3, 0.015, 0.0,   7.5, True),
    "text-to-image-sdxl":   ("guided",        50,  2, 0.015, 0.0,   7.0, True),
    "kv-injection":         ("kv_injection",  50,  1, 0.05,  0.25,  1.0, False),
    "few-steps":            ("optimization",  28,  3, 0.25,  0.33,  1.0, False),  # and scheduler lcm, see below
}
# fmt: on
PRESETS: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}
PRESETS["texture-expansion"] |= {"window": 64, "window_stride": 8}
PRESETS["few-steps"] |= {"scheduler": "lcm"}  # with LCM-LoRA; with Hyper-SD: tcd, rate 0.15, λ 0.38
DEFAULT_PRESET = "guided-transfer"
