"""The self-attention layers of a UNet by its configuration, and those of them that `model.layers` selects. Torch-free.

The plan reads the configuration from a file, the engine from the loaded UNet.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from stylemill.errors import ModelError

DEFAULT_LAYER_COUNT = 6  # the last six: 10–15 of SD 1.x, 64–69 of SDXL


class AttentionLayer(NamedTuple):
    """A self-attention layer of a UNet.

    At `level` n the latent grid is halved n times. `channels` is the width of q, k and v over all heads, `name` the
    module's name in the UNet.
    """

    level: int
    channels: int
    name: str

    def elements(self, latent_size: tuple[int, int]) -> int:
        """Number of scalars in q, as in k and in v, of one image with latents of `latent_size` (width, height)."""
        width, height = latent_size
        return (height >> self.level) * (width >> self.level) * self.channels


def attention_layers(unet: Mapping[str, Any]) -> Iterator[AttentionLayer]:
    """Yield the self-attention layers of a UNet2DConditionModel in running order: down, mid, up.

    `unet` is its configuration. Raises KeyError, TypeError, ValueError or IndexError where that is incomplete.
    """

    def layers(level: int, block: str, depths: Any, attentions: int) -> Iterator[AttentionLayer]:
        for attention, depth in enumerate(_per_item(depths, attentions)):
            for transformer in range(depth):
                name = f"{block}.attentions.{attention}.transformer_blocks.{transformer}.attn1"
                yield AttentionLayer(level, channels[level], name)

    channels = unet["block_out_channels"]
    count, deepest = len(channels), len(channels) - 1
    resnets = _per_item(unet.get("layers_per_block", 2), count)
    depths = _per_item(unet.get("transformer_layers_per_block", 1), count)
    up_depths = unet.get("reverse_transformer_layers_per_block") or depths[::-1]  # differ in pruned SDXL models
    for level, block in enumerate(unet["down_block_types"]):
        if "CrossAttn" in block:
            yield from layers(level, f"down_blocks.{level}", depths[level], resnets[level])
    if "CrossAttn" in (unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""):
        yield from layers(deepest, "mid_block", depths[deepest], 1)
    for number, block in enumerate(unet["up_block_types"]):
        level = deepest - number
        if "CrossAttn" in block:
            yield from layers(level, f"up_blocks.{number}", up_depths[number], resnets[level] + 1)


def _per_item(value: Any, count: int) -> list[Any]:
    return [value] * count if isinstance(value, int) else list(value)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


LayerT = TypeVar("LayerT", bound=_Named)


def select_layers(layers: Sequence[LayerT], selection: Sequence[int | str] | None) -> list[LayerT]:
    """The layers that `model.layers` selects, in running order; `layers` are all layers in that order.

    A layer is selected by its number, its name, or whole leading or trailing parts of its name that no other layer
    has. None selects the last six. Raises ModelError that lists what the model has.
    """
    if selection is None:
        return list(layers[-DEFAULT_LAYER_COUNT:])
    names = [layer.name for layer in layers]
    numbers = [_number(names, selected) for selected in selection]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ModelError(f"model.layers {list(selection)}: choose distinct layers, at least one; {_known(names)}")
    return [layers[number] for number in sorted(numbers)]


def _number(names: Sequence[str], selected: int | str) -> int:
    if isinstance(selected, int):
        if not 0 <= selected < len(names):
            raise ModelError(f"model.layers: there is no self-attention layer {selected}; {_known(names)}")
        return selected
    matches = [
        number
        for number, name in enumerate(names)
        if name == selected or name.startswith(f"{selected}.") or name.endswith(f".{selected}")
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{number} {names[number]}" for number in matches[:4])
        more = "" if len(matches) <= 4 else f" and {len(matches) - 4} more"
        raise ModelError(f"model.layers: '{selected}' matches several layers: {listed}{more}; give more of the name")
    similar = difflib.get_close_matches(selected, names, n=1)
    suggestion = f"did you mean '{similar[0]}'? " if similar else ""
    raise ModelError(f"model.layers: no self-attention layer is called '{selected}'; {suggestion}{_known(names)}")


def _known(names: Sequence[str]) -> str:
    return f"this model has 0 {names[0]} to {len(names) - 1} {names[-1]}" if names else "this model has none"
