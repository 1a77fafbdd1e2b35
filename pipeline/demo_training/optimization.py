"""What training of both parts shares: averaged weights, a schedule of rates, a line on the terminal."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch


def tell(name: str, step: int, steps: int, losses: list[float], begun: float, more: str = "") -> None:
    pace = (time.monotonic() - begun) / (step + 1)
    print(f"{name} {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f} {more} {pace:.2f} s/step", flush=True)


def averaged(model: Any) -> Any:
    """An exponential average of the weights that follows fast at first: 0.99 after 100 steps, 0.998 at most."""

    def move(mean: torch.Tensor, value: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        decay = min(0.998, (1 + float(count)) / (10 + float(count)))
        return decay * mean + (1 - decay) * value

    return torch.optim.swa_utils.AveragedModel(model, avg_fn=move)


def set_rate(adam: torch.optim.Optimizer, step: int, steps: int, rate: float) -> None:
    """A short rise, then a cosine down to a fiftieth."""
    rise = min(1.0, (step + 1) / 50)
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in adam.param_groups:
        group["lr"] = rate * rise * fall
