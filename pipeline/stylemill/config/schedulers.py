"""Which of diffusers' schedulers a job may name, and why the others are refused. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SchedulerKind:
    """What lockstep must know of a scheduler: all pairs of a shard take its steps together, and any step may be the
    first one after a restart."""

    scheduler: str  # class in diffusers
    options: dict[str, Any] = field(default_factory=dict)
    draws: bool = False  # adds noise in its steps
    history: int = 0  # earlier predictions of clean latents that a step uses
    sigmas: bool = False  # its latents are x + σ n; the others' √ᾱ x + √(1−ᾱ) n, as the UNet takes them
    takes_eta: bool = False  # how much noise it adds can be set
    most_steps: int = 999


# The spacing of the paper. With another, DDIM's step would not land on the timestep that comes next.
_LEADING = {"timestep_spacing": "leading"}
_DISTILLED = {"original_inference_steps": 50}  # LCM and TCD take their timesteps from these

SCHEDULERS: dict[str, SchedulerKind] = {
    "ddim": SchedulerKind("DDIMScheduler", _LEADING, takes_eta=True),
    "lcm": SchedulerKind("LCMScheduler", _DISTILLED, draws=True, most_steps=50),
    "tcd": SchedulerKind("TCDScheduler", _DISTILLED, draws=True, takes_eta=True, most_steps=50),
    "ddpm": SchedulerKind("DDPMScheduler", _LEADING, draws=True),
    "euler": SchedulerKind("EulerDiscreteScheduler", _LEADING, sigmas=True),
    "euler_ancestral": SchedulerKind("EulerAncestralDiscreteScheduler", _LEADING, sigmas=True, draws=True),
    "deis": SchedulerKind("DEISMultistepScheduler", _LEADING, history=2),
    "dpmpp": SchedulerKind("DPMSolverMultistepScheduler", _LEADING, history=2),
    "dpmpp_sde": SchedulerKind(
        "DPMSolverMultistepScheduler", {**_LEADING, "algorithm_type": "sde-dpmsolver++"}, history=2, draws=True
    ),
}

_UNDOES = "takes steps from latents that it kept from before the guidance, and so undoes it"
_TWICE = "asks the UNet twice a step, the second time at latents that no guidance has seen"
_OTHER_NOISE = "belongs to models trained with another kind of noise than Stable Diffusion's"
REFUSED: dict[str, str] = {
    "pndm": _UNDOES,
    "unipc": _UNDOES,
    "sasolver": _UNDOES,
    "dpmpp_singlestep": _UNDOES,
    "heun": _TWICE,
    "kdpm2": _TWICE,
    "kdpm2_ancestral": _TWICE,
    "dpmpp_2s_sde": "draws its noise as one path over the whole run (torchsde), which cannot be continued",
    "lms": "integrates with SciPy, which stylemill does not need otherwise",
    "ipndm": _OTHER_NOISE,
    "edm_euler": _OTHER_NOISE,
    "edm_dpmpp": _OTHER_NOISE,
    "flow_euler": _OTHER_NOISE,
    "flow_heun": _OTHER_NOISE,
    "cm": _OTHER_NOISE,
}


def refuse_scheduler(name: str) -> str | None:
    """Why a job may not name this scheduler; None if it may."""
    known = f"known: {', '.join(SCHEDULERS)}"
    if name in REFUSED:
        return f"scheduler {name} is refused: it {REFUSED[name]}; {known}"
    return None if name in SCHEDULERS else f"scheduler {name} is not one of those {known}"
