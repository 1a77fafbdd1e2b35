"""The state of a shard while it is sampled: all that a checkpoint holds and that a restored run needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stylemill.config.sampling import Tiling
from stylemill.engine.batching import PairKind, uses_content
from stylemill.engine.unet.text import Text

Arrays = dict[str, npt.NDArray[Any]]
PER_PAIR = ("latents", "moments", "history", "predictions")  # fields of SampleState, without "_of"
_LOST = (
    "latents became NaN or Inf in step {step}; lower learning_rate or content_weight, or set model.dtype to bfloat16 or"
    " float32 if it is float16"
)


@dataclass(frozen=True)
class PairInputs:
    """One pair as numbers of images, texts, masks and control images in `ShardInputs`, with its λ."""

    content: int | None
    styles: tuple[int, ...]
    prompt: int
    negative: int
    content_weight: float
    shape: tuple[int, int, int]  # of its latents: (C, h, w)
    slot: bool = True  # False: its sizes are unknown, so no micro-batch holds it
    masks: tuple[int, ...] = ()  # none; or the content's, then one for each style
    controls: tuple[int, ...] = ()  # one for each ControlNet of the model
    identity: str = ""  # key of the noise of its steps

    @property
    def uses_content(self) -> bool:
        return uses_content(self.content is not None, self.content_weight)

    @property
    def feature_images(self) -> set[int]:
        """The images whose features this pair needs."""
        return {*self.styles} if self.content is None or not self.uses_content else {self.content, *self.styles}


def styles_and_contents(pairs: Iterable[PairInputs]) -> tuple[set[int], set[int]]:
    """The images whose K and V the pairs need, as styles, and those whose Q, as contents. An image may be in both."""
    pairs = list(pairs)
    contents = {pair.content for pair in pairs if pair.content is not None and pair.uses_content}
    return {style for pair in pairs for style in pair.styles}, contents


@dataclass(frozen=True)
class ShardInputs:
    """What does not change while a shard is sampled: clean latents of its unique images, encoded texts, conditions."""

    pairs: list[PairInputs]
    images: list[Tensor]  # (C, h, w) each
    digests: list[str]
    texts: list[Text]  # texts[0] is the null prompt
    starts: list[Tensor] = field(default_factory=list)  # initial noise (C, h, w) of each pair without a content
    tiling: Tiling = "none"  # of the decoded images
    window: int | None = None  # side, in latents, of the windows that larger outputs are sampled in
    masks: list[Tensor] = field(default_factory=list)  # labels on a latent grid (h, w), int32
    controls: list[Tensor] = field(default_factory=list)  # control images (3, H, W), uint8
    pixels: list[Tensor] = field(default_factory=list)  # of images that a decoder is refined on, (H, W, 3) uint8
    refine_steps: int = 0  # of the VAE's decoder on a style; 0: no refinement, and `pixels` is empty
    refine_rate: float = 0.0

    @property
    def conditions(self) -> dict[str, list[Tensor]]:
        """Tensors that only some shards have, by their names in a checkpoint."""
        return {"start": self.starts, "mask": self.masks, "control": self.controls, "pixels": self.pixels}

    @property
    def null_text(self) -> Text:
        return self.texts[0]

    def kinds(self) -> list[PairKind | None]:
        """The kind of each pair, for `batching.micro_batches`."""
        return [self._kind(pair) if pair.slot else None for pair in self.pairs]

    def _kind(self, pair: PairInputs) -> PairKind:
        styles = tuple(tuple(self.images[style].shape) for style in pair.styles)
        return PairKind(pair.shape, styles, pair.uses_content, bool(pair.masks))


@dataclass(frozen=True)
class PairFailure:
    """Why a pair has no image: the stage at which it failed (encode | sample | decode), and the message."""

    stage: str
    message: str


@dataclass
class SampleState:
    """The pairs of a shard after `step` steps; all are at the same timestep.

    `latents_of[i]` is z of pair i, (C, h, w). `moments_of[i]` are Adam's two moments (2, C, h, w) where one Adam spans
    the run. `predictions_of[i]` is the ε (C, h, w) of its last gradient pass where `reuse_prediction` is set, and zeros
    before the first one. `lost_at[i]` is the step in which pair i became NaN or Inf, −1 before; it stays on the device,
    so that a step needs no synchronisation. `excluded` says of each pair that is not sampled, or not decoded, why.
    `lowered_scales` has the smallest loss scale of each pair whose gradient overflowed at the usual one.
    """

    inputs: ShardInputs
    latents_of: list[Tensor]
    lost_at: Tensor  # (P,)
    excluded: dict[int, PairFailure]
    step: int = 0
    moments_of: list[Tensor] = field(default_factory=list)
    history_of: list[Tensor] = field(default_factory=list)  # (n, C, h, w) each, for multistep schedulers
    predictions_of: list[Tensor] = field(default_factory=list)
    lowered_scales: dict[int, float] = field(default_factory=dict)

    @property
    def per_pair(self) -> dict[str, list[Tensor]]:
        """The lists that have a tensor for each pair, or are empty, by their names in a checkpoint."""
        return {name: getattr(self, f"{name}_of") for name in PER_PAIR}

    def record_lowered_scales(self, scales: Mapping[int, float]) -> None:
        """Keep the smallest loss scale of each pair that is not excluded; an excluded one is sampled with zeros."""
        for pair, scale in scales.items():
            if pair not in self.excluded:
                self.lowered_scales[pair] = min(scale, self.lowered_scales.get(pair, scale))

    @property
    def latents(self) -> Tensor:
        """z of all pairs, (P, C, h, w); only where all have one shape."""
        return torch.stack(self.latents_of)

    @property
    def failures(self) -> dict[int, PairFailure]:
        """Pair number -> why it has no image, in this attempt and every other."""
        lost = {pair: step for pair, step in enumerate(self.lost_at.tolist()) if step >= 0}
        return {pair: PairFailure("sample", _LOST.format(step=step)) for pair, step in lost.items()} | self.excluded

    def copy(self) -> SampleState:
        """A copy that a step can change while this state stays the same."""
        # Copies of the lists alone: steps replace these tensors, they do not write to them.
        lists: dict[str, Any] = {f"{name}_of": [*tensors] for name, tensors in self.per_pair.items()}
        return replace(self, **lists, lost_at=self.lost_at.clone(), lowered_scales={**self.lowered_scales})

    def assign(self, other: SampleState) -> None:
        """Take over all fields of `other`, which must not be used afterwards."""
        vars(self).update(vars(other))

    def exclude(self, reasons: Mapping[int, str]) -> None:
        """Exclude pairs: `reasons` has a reason for each, by pair number.

        Their latents, and the images that no other pair uses, become zeros. They keep their slots, so that the
        micro-batches of the other pairs do not change.
        """
        for tensors in self.per_pair.values():
            tensors[:] = [torch.zeros_like(one) if pair in reasons else one for pair, one in enumerate(tensors)]
        kept = [pair for number, pair in enumerate(self.inputs.pairs) if number not in reasons]
        used = {image for pair in kept for image in (pair.content, *pair.styles)}
        images = [one if number in used else torch.zeros_like(one) for number, one in enumerate(self.inputs.images)]
        self.inputs = replace(self.inputs, images=images)
        self.excluded = {pair: PairFailure("sample", reason) for pair, reason in reasons.items()} | self.excluded

    def export_inputs(self) -> tuple[Arrays, dict[str, Any]]:
        """The inputs as arrays and JSON values, saved once a shard."""
        arrays = {
            f"{name}.{i}": _array(tensor)
            for name, tensors in (("image", self.inputs.images), *self.inputs.conditions.items())
            for i, tensor in enumerate(tensors)
        }
        for i, text in enumerate(self.inputs.texts):
            arrays[f"text.{i}"] = _array(text.hidden)
            if text.pooled is not None:
                arrays[f"pooled.{i}"] = _array(text.pooled)
        facts = {
            "digests": self.inputs.digests,
            "texts": len(self.inputs.texts),
            "pairs": [vars(pair) for pair in self.inputs.pairs],
            "tiling": self.inputs.tiling,
            "window": self.inputs.window,
            "refine_steps": self.inputs.refine_steps,
            "refine_rate": self.inputs.refine_rate,
            **{name: len(tensors) for name, tensors in self.inputs.conditions.items()},
        }
        return arrays, facts

    def export_progress(self) -> tuple[Arrays, dict[str, Any]]:
        """The state after this step as arrays and JSON values."""
        arrays = {
            f"{name}.{i}": _array(tensor) for name, tensors in self.per_pair.items() for i, tensor in enumerate(tensors)
        }
        arrays["lost_at"] = _array(self.lost_at)
        excluded = {str(pair): vars(failure) for pair, failure in self.excluded.items()}
        scales = {str(pair): scale for pair, scale in self.lowered_scales.items()}
        counts = {name: len(tensors) for name, tensors in self.per_pair.items()}
        return arrays, {"step": self.step, **counts, "excluded": excluded, "lowered_scales": scales}

    @classmethod
    def restore(cls, inputs: Arrays, input_facts: dict[str, Any], arrays: Arrays, facts: dict[str, Any]) -> SampleState:
        """The state that was exported, on the CPU; `Engine.sample(state=…)` moves it to its device and continues it."""
        pairs = [PairInputs(**_with_tuples(pair)) for pair in input_facts["pairs"]]
        lists: dict[str, Any] = {
            f"{name}_of": [torch.from_numpy(arrays[f"{name}.{i}"]) for i in range(facts[name])] for name in PER_PAIR
        }
        digests = list(input_facts["digests"])
        return cls(
            inputs=ShardInputs(
                pairs=pairs,
                images=[torch.from_numpy(inputs[f"image.{i}"]) for i in range(len(digests))],
                digests=digests,
                texts=[_text(inputs, i) for i in range(input_facts["texts"])],
                starts=[torch.from_numpy(inputs[f"start.{i}"]) for i in range(input_facts["start"])],
                tiling=input_facts["tiling"],
                window=input_facts["window"],
                masks=[torch.from_numpy(inputs[f"mask.{i}"]) for i in range(input_facts["mask"])],
                controls=[torch.from_numpy(inputs[f"control.{i}"]) for i in range(input_facts["control"])],
                pixels=[torch.from_numpy(inputs[f"pixels.{i}"]) for i in range(input_facts["pixels"])],
                refine_steps=input_facts["refine_steps"],
                refine_rate=input_facts["refine_rate"],
            ),
            **lists,
            lost_at=torch.from_numpy(arrays["lost_at"]),
            excluded={int(pair): PairFailure(**failure) for pair, failure in facts["excluded"].items()},
            step=int(facts["step"]),
            lowered_scales={int(pair): scale for pair, scale in facts["lowered_scales"].items()},
        )

    def to(self, device: torch.device) -> SampleState:
        """Move the tensors that a step uses to `device`, in place; returns the state itself."""
        self.inputs = replace(
            self.inputs,
            images=[image.to(device) for image in self.inputs.images],
            texts=[text.to(device) for text in self.inputs.texts],
            starts=[start.to(device) for start in self.inputs.starts],
            masks=[mask.to(device) for mask in self.inputs.masks],
            controls=[control.to(device) for control in self.inputs.controls],
        )
        for tensors in self.per_pair.values():
            tensors[:] = [tensor.to(device) for tensor in tensors]
        self.lost_at = self.lost_at.to(device)
        return self


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON turns tuples into lists; here they become tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _text(inputs: Arrays, number: int) -> Text:
    pooled = inputs.get(f"pooled.{number}")
    return Text(torch.from_numpy(inputs[f"text.{number}"]), None if pooled is None else torch.from_numpy(pooled))


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
