"""Attention distillation on a resident model, for all pairs of a shard in lockstep. Uses neither run folders nor Ray.

Names are imported when they are first used, so the plan can import torch-free modules of this package without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylemill.engine.distances import Distances
    from stylemill.engine.engine import Engine
    from stylemill.engine.inputs import Pair
    from stylemill.engine.noise import Noise
    from stylemill.engine.state import SampleState
    from stylemill.images.input_image import InputImage, LabelImage, Pixels

__all__ = ["Distances", "Engine", "InputImage", "LabelImage", "Noise", "Pair", "Pixels", "SampleState"]

_MODULES = {
    "Distances": "stylemill.engine.distances",
    "Engine": "stylemill.engine.engine",
    "InputImage": "stylemill.images.input_image",
    "LabelImage": "stylemill.images.input_image",
    "Noise": "stylemill.engine.noise",
    "Pair": "stylemill.engine.inputs",
    "Pixels": "stylemill.images.input_image",
    "SampleState": "stylemill.engine.state",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'stylemill.engine' has no attribute {name!r}")
