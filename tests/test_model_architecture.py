"""Unsupported models are rejected when they are resolved, with the reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from diffusers import UNet2DConditionModel

from stylemill.engine.attention import self_attention_layers
from stylemill.errors import ModelError
from stylemill.models.resolve import resolve_model
from stylemill.planning.model_shape import read_shape


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def copy_model(model: Path, copy: Path) -> Path:
    """Copy a model folder; weights, which no test changes, become hard links."""

    def copy_file(source: str, target: str) -> None:
        os.link(source, target) if source.endswith(".safetensors") else shutil.copyfile(source, target)

    shutil.copytree(model, copy, copy_function=copy_file)
    return copy


def copy_with(model: Path, copy: Path, file: str, **values: Any) -> Path:
    """Copy a model folder and change `values` in one of its JSON files."""
    copy_model(model, copy)
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **values}))
    return copy


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_complete_models_of_both_families_are_accepted(demo_models: dict[str, Path], family: str) -> None:
    assert resolve_model(str(demo_models[family])).folder == demo_models[family]


UNET, VAE, INDEX = "unet/config.json", "vae/config.json", "model_index.json"


@pytest.mark.parametrize(
    ("family", "file", "values", "message"),
    [
        ("sd", UNET, {"in_channels": 9}, "takes 9 channels, as inpainting models do"),
        ("sd", UNET, {"in_channels": 8}, "takes 8 channels, as image-editing models do"),
        ("sd", UNET, {"_class_name": "UNetSpatioTemporalConditionModel"}, "is a UNetSpatioTemporal.*video"),
        ("sd", UNET, {"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ("sd", UNET, {"time_cond_proj_dim": 256}, r"full LCMs \(LCM-LoRA on a base model is supported\)"),
        ("sd", UNET, {"class_embed_type": "projection"}, "class_embed_type"),
        ("sd", UNET, {"cross_attention_dim": 768}, "reads text of 768 channels, the text encoder returns 32"),
        ("sd", VAE, {"latent_channels": 16}, "16 latent channels, the UNet 4"),
        ("sd", VAE, {"_class_name": "AsymmetricAutoencoderKL"}, "class of its VAE is AsymmetricAutoencoderKL"),
        ("sdxl", VAE, {"latents_mean": [0.1]}, "shifts latents.*Playground"),
        ("sd", "text_encoder/config.json", {"model_type": "t5"}, "text encoder is t5, not CLIP's"),
        ("sdxl", UNET, {"projection_class_embeddings_input_dim": 5 * 8 + 16}, "takes 5 time_ids.*refiner takes five"),
        ("sdxl", INDEX, {"requires_aesthetics_score": True}, "SDXL's refiner, which takes an aesthetic score"),
    ],
)
def test_unsupported_configurations_are_rejected_with_the_reason(
    demo_models: dict[str, Path], tmp_path: Path, family: str, file: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(str(copy_with(demo_models[family], tmp_path / "model", file, **values)))


@pytest.mark.parametrize(
    ("family", "moved", "message"),
    [
        ("sd", {"unet": "transformer"}, "a diffusion transformer"),
        ("sd", {"unet": "prior"}, "a cascade"),
        ("sdxl", {"text_encoder": None}, "SDXL's refiner"),
        ("sdxl", {"text_encoder_2": None}, "lacks text_encoder_2/config.json, text_encoder_2/model.safetensors"),
        ("sdxl", {"tokenizer_2": None}, "lacks tokenizer_2/vocab.json"),
    ],
)
def test_unsupported_folders_are_rejected_with_the_reason(
    demo_models: dict[str, Path], tmp_path: Path, family: str, moved: dict[str, str | None], message: str
) -> None:
    folder = copy_model(demo_models[family], tmp_path / "model")
    for name, other in moved.items():
        shutil.rmtree(folder / name) if other is None else (folder / name).rename(folder / other)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_an_unsupported_hub_model_is_rejected_before_it_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("model_index.json", "transformer/config.json")]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(sha="c" * 40, siblings=files))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the model was downloaded"))
    with pytest.raises(ModelError, match="'org/flux': a diffusion transformer"):
        resolve_model("org/flux")


def test_a_pruned_sdxl_has_the_layers_that_the_plan_counts(demo_models: dict[str, Path], tmp_path: Path) -> None:
    """As in SSD-1B: a depth for each attention, other depths in the up blocks, and no attention in the mid block."""
    pruned = {
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 5], [2, 1, 1], 1],
        "mid_block_type": None,
    }
    folder = copy_with(demo_models["sdxl"], tmp_path / "pruned", UNET, **pruned)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    planned = [(layer.level, layer.channels) for layer in read_shape(folder).attention]
    layers = self_attention_layers(unet)
    assert planned == [(layer.level, unet.get_submodule(layer.name).inner_dim) for layer in layers]
    assert len(planned) == 4 + 8 + 13 + 4
