"""Models that do not fit are refused at the plan, with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from diffusers import UNet2DConditionModel

from stylemill.demo.untrained import write_demo_model
from stylemill.engine.attention import self_attention_layers
from stylemill.errors import ModelError
from stylemill.models.hub import resolve_model
from stylemill.planning.model_shape import read_shape


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd": write_demo_model(folder / "sd"),
        "sdxl": write_demo_model(folder / "sdxl", kind="sdxl"),
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def changed(model: Path, copy: Path, file: str, **values: Any) -> Path:
    shutil.copytree(model, copy)
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **values}))
    return copy


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_both_families_fit_whole_and_in_any_place(demos: dict[str, Path], kind: str) -> None:
    assert resolve_model(str(demos[kind])).folder == demos[kind]


UNET, VAE, INDEX = "unet/config.json", "vae/config.json", "model_index.json"


@pytest.mark.parametrize(
    ("kind", "file", "values", "said"),
    [
        ("sd", UNET, {"in_channels": 9}, "takes 9 channels, as inpainting models do"),
        ("sd", UNET, {"in_channels": 8}, "takes 8 channels, as image-editing models do"),
        ("sd", UNET, {"_class_name": "UNetSpatioTemporalConditionModel"}, "is a UNetSpatioTemporal.*video"),
        ("sd", UNET, {"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ("sd", UNET, {"time_cond_proj_dim": 256}, "full LCMs; LCM-LoRA on the base fits"),
        ("sd", UNET, {"class_embed_type": "projection"}, "class_embed_type"),
        ("sd", UNET, {"cross_attention_dim": 768}, "reads text of 768 channels, the text encoder gives 32"),
        ("sd", VAE, {"latent_channels": 16}, "16 latent channels, the UNet 4"),
        ("sd", VAE, {"_class_name": "AsymmetricAutoencoderKL"}, "VAE is a AsymmetricAutoencoderKL"),
        ("sdxl", VAE, {"latents_mean": [0.1]}, "shifts latents.*Playground"),
        ("sd", "text_encoder/config.json", {"model_type": "t5"}, "text encoder is a t5, not CLIP's"),
        ("sdxl", UNET, {"projection_class_embeddings_input_dim": 5 * 8 + 16}, "told 5 numbers.*refiner takes five"),
        ("sdxl", INDEX, {"requires_aesthetics_score": True}, "SDXL's refiner, which is conditioned"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    demos: dict[str, Path], tmp_path: Path, kind: str, file: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        resolve_model(str(changed(demos[kind], tmp_path / "model", file, **values)))


@pytest.mark.parametrize(
    ("kind", "moved", "said"),
    [
        ("sd", {"unet": "transformer"}, "a diffusion transformer"),
        ("sd", {"unet": "prior"}, "a cascade"),
        ("sdxl", {"text_encoder": None}, "SDXL's refiner"),
        ("sdxl", {"text_encoder_2": None}, "lacks text_encoder_2/config.json, text_encoder_2/model.safetensors"),
        ("sdxl", {"tokenizer_2": None}, "lacks tokenizer_2/vocab.json"),
    ],
)
def test_other_folders_are_refused_with_the_reason(
    demos: dict[str, Path], tmp_path: Path, kind: str, moved: dict[str, str | None], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demos[kind], folder)
    for name, other in moved.items():
        shutil.rmtree(folder / name) if other is None else (folder / name).rename(folder / other)
    with pytest.raises(ModelError, match=said):
        resolve_model(str(folder))


def test_a_hub_model_of_another_kind_is_refused_before_it_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("model_index.json", "transformer/config.json")]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(sha="c" * 40, siblings=files))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(ModelError, match="'org/flux': a diffusion transformer"):
        resolve_model("org/flux")


def test_a_pruned_sdxl_has_the_layers_that_the_plan_counts(demos: dict[str, Path], tmp_path: Path) -> None:
    """Depths of their own for each attention, another way up, no middle, as in SSD-1B."""
    pruned = {
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 5], [2, 1, 1], 1],
        "mid_block_type": None,
    }
    folder = changed(demos["sdxl"], tmp_path / "pruned", UNET, **pruned)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    planned = [(layer.level, layer.channels) for layer in read_shape(folder).attention]
    assert planned == [(layer.level, layer.attention.inner_dim) for layer in self_attention_layers(unet)]
    assert len(planned) == 4 + 8 + 13 + 4
