"""The training of both parts: averaged weights, the schedule of the learning rate, and progress lines."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch


def print_progress(name: str, step: int, steps: int, losses: list[float], started: float, note: str = "") -> None:
    """Print one line; `started` is `time.monotonic()` at the first step."""
    seconds = (time.monotonic() - started) / (step + 1)
    print(f"{name} {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f} {note} {seconds:.2f} s/step", flush=True)


def averaged_model(model: Any) -> Any:
    """An exponential average of the weights, with a decay that rises to 0.92 after 100 steps and to 0.998 at most."""

    def update(mean: torch.Tensor, value: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        decay = min(0.998, (1 + float(count)) / (10 + float(count)))
        return decay * mean + (1 - decay) * value

    return torch.optim.swa_utils.AveragedModel(model, avg_fn=update)


def set_learning_rate(adam: torch.optim.Optimizer, step: int, steps: int, rate: float) -> None:
    """Set the learning rate: a linear warm-up over 50 steps, then a cosine from `rate` to a fiftieth of it."""
    warm_up = min(1.0, (step + 1) / 50)
    decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in adam.param_groups:
        group["lr"] = rate * warm_up * decay
