"""Attention distillation on a resident model, all pairs of a shard in lockstep. Knows no files of a run and no Ray."""

from stylemill.engine.engine import Engine
from stylemill.engine.inputs import Pair
from stylemill.engine.noise import Noise
from stylemill.engine.state import SampleState
from stylemill.images.input_image import InputImage, LabelImage, Pixels

__all__ = ["Engine", "InputImage", "LabelImage", "Noise", "Pair", "Pixels", "SampleState"]
