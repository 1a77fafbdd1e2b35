"""Self-attention layers: the plan lists them by a configuration file, the engine finds them in a loaded UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from stylemill.demo.untrained import write_demo_model
from stylemill.engine.attention import self_attention_layers
from stylemill.errors import ModelError
from stylemill.models.attention_layers import AttentionLayer, select_layers
from stylemill.planning.model_shape import read_shape


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("models") / request.param, kind=request.param)


@pytest.fixture(scope="module")
def unet(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def names_of(unet: Any, layers: list[Any]) -> list[str]:
    names = {processor: name.removesuffix(".processor") for name, processor in unet.attn_processors.items()}
    return [names[layer.processor] for layer in layers]


def modules_of(unet: Any, layers: list[Any]) -> list[Any]:
    return [unet.get_submodule(name) for name in names_of(unet, layers)]


def test_names_levels_and_channels_of_the_configuration_are_those_of_the_unet_as_it_runs(
    folder: Path, unet: Any
) -> None:
    planned = read_shape(folder).attention
    layers = self_attention_layers(unet)
    assert [layer.name for layer in planned] == names_of(unet, layers) == [layer.name for layer in layers]
    assert [layer.channels for layer in planned] == [module.inner_dim for module in modules_of(unet, layers)]
    attn1 = [name for name, _ in unet.named_modules() if name.endswith(".attn1")]
    assert sorted(attn1) == sorted(names_of(unet, layers))
    ran: list[Any] = []
    tokens: list[int] = []

    def record(module: Any, arguments: Any) -> None:
        ran.append(module)
        tokens.append(arguments[0].shape[1])

    hooks = [module.register_forward_pre_hook(record) for module in modules_of(unet, layers)]
    text = torch.zeros(1, 2, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    unet(torch.zeros(1, 4, 8, 8), 0, text, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    assert ran == modules_of(unet, layers)
    assert tokens == [(8 >> layer.level) ** 2 for layer in planned]
    assert [layer.level for layer in layers] == [layer.level for layer in planned]


def test_a_unet_with_other_layers_than_its_configuration_is_refused(folder: Path) -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    unet.register_to_config(layers_per_block=3)
    with pytest.raises(ModelError, match=r"attentions\.2\.transformer_blocks.* is only in its configuration"):
        self_attention_layers(unet)
    unet.register_to_config(layers_per_block=2, mid_block_type=None)
    with pytest.raises(ModelError, match=r"mid_block\.attentions\.0.* is only in its modules"):
        self_attention_layers(unet)


@pytest.mark.parametrize("selection", [None, [3, 1], ["up_blocks.1.attentions.0.transformer_blocks.0.attn1", 0]])
def test_the_plan_and_the_engine_select_the_same_layers(folder: Path, unet: Any, selection: Any) -> None:
    selected = select_layers(self_attention_layers(unet), selection)
    assert names_of(unet, selected) == [layer.name for layer in read_shape(folder).select_layers(selection)]


NAMES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.3.attentions.1.transformer_blocks.0.attn1",
    "up_blocks.3.attentions.11.transformer_blocks.0.attn1",
]
LAYERS = [AttentionLayer(0, 320, name) for name in NAMES]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ([2, 0], [0, 2]),
        (["mid_block"], [1]),
        ([NAMES[3], 1], [1, 3]),
        (["up_blocks.3.attentions.1"], [2]),  # whole parts of the name: attentions.11 does not match
        (["1.transformer_blocks.0.attn1"], [2]),
    ],
)
def test_layers_are_selected_by_number_and_by_name(selection: Any, expected: list[int]) -> None:
    assert select_layers(LAYERS, selection) == [LAYERS[number] for number in expected]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ([4], "there is no self-attention layer 4; this model has 0 down_blocks.0"),
        ([-1], "there is no self-attention layer -1"),
        ([], "at least one"),
        ([1, "mid_block"], "choose distinct layers"),
        (["attn1"], "'attn1' matches several layers: 0 down_blocks"),
        (["up_blocks.3"], "'up_blocks.3' matches several layers: 2 up_blocks.3.attentions.1"),
        (["mid_blok.attentions.0.transformer_blocks.0.attn1"], "did you mean 'mid_block.attentions.0"),
        (["attn2"], "no self-attention layer is called 'attn2'"),
    ],
)
def test_a_selection_that_is_not_clear_is_refused(selection: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        select_layers(LAYERS, selection)
