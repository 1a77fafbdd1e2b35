"""The schedulers of diffusers that a job may name, and why the others are refused. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SchedulerKind:
    """How a scheduler runs in lockstep: all pairs of a shard take a step together, and a run may resume at any step."""

    scheduler: str  # class in diffusers
    options: dict[str, Any] = field(default_factory=dict)  # of its configuration
    draws: bool = False  # adds noise in its steps
    history: int = 0  # number of earlier predictions of clean latents that a step uses
    sigmas: bool = False  # its latents are x + σ n; those of the others √ᾱ x + √(1−ᾱ) n, as the UNet takes them
    takes_eta: bool = False  # has a parameter for the amount of noise it adds
    max_steps: int = 999


# The spacing of the paper. With another one, a step of DDIM would not end at the next timestep.
_LEADING = {"timestep_spacing": "leading"}
_DISTILLED = {"original_inference_steps": 50}  # LCM and TCD take their timesteps from these

SCHEDULERS: dict[str, SchedulerKind] = {
    "ddim": SchedulerKind("DDIMScheduler", _LEADING, takes_eta=True),
    "lcm": SchedulerKind("LCMScheduler", _DISTILLED, draws=True, max_steps=50),
    "tcd": SchedulerKind("TCDScheduler", _DISTILLED, draws=True, takes_eta=True, max_steps=50),
    "ddpm": SchedulerKind("DDPMScheduler", _LEADING, draws=True),
    "euler": SchedulerKind("EulerDiscreteScheduler", _LEADING, sigmas=True),
    "euler_ancestral": SchedulerKind("EulerAncestralDiscreteScheduler", _LEADING, sigmas=True, draws=True),
    "deis": SchedulerKind("DEISMultistepScheduler", _LEADING, history=2),
    "dpmpp": SchedulerKind("DPMSolverMultistepScheduler", _LEADING, history=2),
    "dpmpp_sde": SchedulerKind(
        "DPMSolverMultistepScheduler", {**_LEADING, "algorithm_type": "sde-dpmsolver++"}, history=2, draws=True
    ),
}

_UNDOES = "takes steps from latents that it stored before the gradient steps, and so undoes them"
_TWICE = "calls the UNet twice a step, the second time at latents without gradient steps"
_OTHER_NOISE = "is for models trained with another kind of noise than Stable Diffusion"
REFUSED: dict[str, str] = {
    "pndm": _UNDOES,
    "unipc": _UNDOES,
    "sasolver": _UNDOES,
    "dpmpp_singlestep": _UNDOES,
    "heun": _TWICE,
    "kdpm2": _TWICE,
    "kdpm2_ancestral": _TWICE,
    "dpmpp_2s_sde": "draws its noise as one path over the whole run (torchsde), which cannot be resumed",
    "lms": "integrates with SciPy, which stylemill does not need otherwise",
    "ipndm": _OTHER_NOISE,
    "edm_euler": _OTHER_NOISE,
    "edm_dpmpp": _OTHER_NOISE,
    "flow_euler": _OTHER_NOISE,
    "flow_heun": _OTHER_NOISE,
    "cm": _OTHER_NOISE,
}


def scheduler_problem(name: str) -> str | None:
    """Why a job may not name this scheduler; None if it may."""
    known = ", ".join(SCHEDULERS)
    if name in REFUSED:
        return f"scheduler {name} is refused: it {REFUSED[name]}; use one of: {known}"
    return None if name in SCHEDULERS else f"scheduler {name} is not one of: {known}"
