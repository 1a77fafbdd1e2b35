"""Which self-attention layers `model.layers` means: numbers in running order, or names of modules.

The plan asks it of a model's configuration, the engine of the loaded UNet; both get the same answer.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from stylemill.errors import ModelError

DEFAULT_LAYER_COUNT = 6  # the last six: 10–15 of SD 1.x, 64–69 of SDXL


def choose(names: Sequence[str], wanted: Sequence[int | str] | None) -> list[int]:
    """Numbers of the wanted layers, ascending; `names` are the modules of all layers in running order.

    A layer may be called by its number, its name, or by whole parts at the beginning or end of its name, if no other
    has them there. None: the last six. Raises ModelError naming what is known.
    """
    everything = range(len(names))
    if wanted is None:
        return list(everything[-DEFAULT_LAYER_COUNT:])
    chosen = [_number(names, one) for one in wanted]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ModelError(f"model.layers {list(wanted)}: choose distinct layers, at least one; {_known(names)}")
    return sorted(chosen)


def _number(names: Sequence[str], wanted: int | str) -> int:
    if isinstance(wanted, int):
        if not 0 <= wanted < len(names):
            raise ModelError(f"model.layers: there is no self-attention layer {wanted}; {_known(names)}")
        return wanted
    fitting = [
        number
        for number, name in enumerate(names)
        if name == wanted or name.startswith(f"{wanted}.") or name.endswith(f".{wanted}")
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        some = ", ".join(f"{number} {names[number]}" for number in fitting[:4])
        more = "" if len(fitting) <= 4 else f" and {len(fitting) - 4} more"
        raise ModelError(f"model.layers: '{wanted}' fits several layers: {some}{more}; give more of the name")
    near = difflib.get_close_matches(wanted, names, n=1)
    meant = f"did you mean '{near[0]}'? " if near else ""
    raise ModelError(f"model.layers: no self-attention layer is called '{wanted}'; {meant}{_known(names)}")


def _known(names: Sequence[str]) -> str:
    return f"this model has 0 {names[0]} to {len(names) - 1} {names[-1]}" if names else "this model has none"
