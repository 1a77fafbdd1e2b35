"""Layers by number and by name: the plan, from a configuration, and the engine, from a UNet, choose the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from stylemill.demo.untrained import write_demo_model
from stylemill.engine.attention import choose_layers, self_attention_layers
from stylemill.errors import ModelError
from stylemill.models.attention_layers import choose
from stylemill.planning.cost import read_shape


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("models") / request.param, kind=request.param)


@pytest.fixture(scope="module")
def unet(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def names_of(unet: Any, layers: list[Any]) -> list[str]:
    names = {module: name for name, module in unet.named_modules()}
    return [names[layer.attention] for layer in layers]


def test_names_and_levels_of_the_configuration_are_those_of_the_unet_as_it_runs(folder: Path, unet: Any) -> None:
    planned = read_shape(folder).attention
    layers = self_attention_layers(unet)
    assert [layer.name for layer in planned] == names_of(unet, layers)
    assert [layer.level for layer in planned] == [layer.level for layer in layers]
    assert [layer.channels for layer in planned] == [layer.attention.inner_dim for layer in layers]
    ran: list[Any] = []
    hooks = [layer.attention.register_forward_pre_hook(lambda module, _: ran.append(module)) for layer in layers]
    text = torch.zeros(1, 2, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    unet(torch.zeros(1, 4, 8, 8), 0, text, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    assert ran == [layer.attention for layer in layers]


@pytest.mark.parametrize("wanted", [None, [3, 1], ["up_blocks.1.attentions.0.transformer_blocks.0.attn1", 0]])
def test_plan_and_engine_choose_the_same(folder: Path, unet: Any, wanted: Any) -> None:
    assert names_of(unet, choose_layers(unet, wanted)) == [
        layer.name for layer in read_shape(folder).choose_layers(wanted)
    ]


NAMES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.3.attentions.1.transformer_blocks.0.attn1",
    "up_blocks.3.attentions.11.transformer_blocks.0.attn1",
]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ([2, 0], [0, 2]),
        (["mid_block"], [1]),
        ([NAMES[3], 1], [1, 3]),
        (["up_blocks.3.attentions.1"], [2]),  # whole parts: attentions.11 begins otherwise
        (["1.transformer_blocks.0.attn1"], [2]),
    ],
)
def test_chosen(wanted: Any, expected: list[int]) -> None:
    assert choose(NAMES, wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ([4], "there is no self-attention layer 4; this model has 0 down_blocks.0"),
        ([-1], "there is no self-attention layer -1"),
        ([], "at least one"),
        ([1, "mid_block"], "choose distinct layers"),
        (["attn1"], "'attn1' fits several layers: 0 down_blocks"),
        (["up_blocks.3"], "'up_blocks.3' fits several layers: 2 up_blocks.3.attentions.1"),
        (["mid_blok.attentions.0.transformer_blocks.0.attn1"], "did you mean 'mid_block.attentions.0"),
        (["attn2"], "no self-attention layer is called 'attn2'"),
    ],
)
def test_refused(wanted: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        choose(NAMES, wanted)
