"""Single-file checkpoints: the demo models, written in Stable Diffusion's original layout, load as the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stylemill.config.job import Job
from stylemill.demo.untrained import ModelFamily
from stylemill.engine.unet.model import DiffusionModel
from stylemill.errors import JobError, ModelError
from stylemill.models.single_file import (
    SD_CONFIG,
    SDXL_CONFIG,
    fetch_config_folder,
    infer_config_id,
    resolve_single_file,
)
from stylemill.planning.model_shape import read_shape

Tensors = dict[str, Tensor]


# --- diffusers' names -> the names of the original checkpoints --------------------------------------------------------


def _renamed(tensors: Tensors, prefix: str, renames: list[tuple[str, str]]) -> Tensors:
    """Apply all matching `renames` to each name in their order: a block first, then the layers in it."""

    def rename(name: str) -> str:
        for old, new in renames:
            name = name.replace(old, new)
        return prefix + name

    return {rename(name): tensor for name, tensor in tensors.items()}


def _unet(tensors: Tensors, family: ModelFamily) -> Tensors:
    levels, with_attention = (4, {0, 1, 2}) if family == "sd" else (3, {1, 2})
    renames = []
    for level in range(levels):
        for j in range(2):
            renames.append((f"down_blocks.{level}.resnets.{j}.", f"input_blocks.{3 * level + j + 1}.0."))
            renames.append((f"down_blocks.{level}.attentions.{j}.", f"input_blocks.{3 * level + j + 1}.1."))
        for j in range(3):
            renames.append((f"up_blocks.{level}.resnets.{j}.", f"output_blocks.{3 * level + j}.0."))
            renames.append((f"up_blocks.{level}.attentions.{j}.", f"output_blocks.{3 * level + j}.1."))
        renames.append((f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{3 * (level + 1)}.0.op."))
        place = 2 if levels - 1 - level in with_attention else 1
        renames.append((f"up_blocks.{level}.upsamplers.0.", f"output_blocks.{3 * level + 2}.{place}."))
    renames += [
        ("mid_block.resnets.0.", "middle_block.0."),
        ("mid_block.attentions.0.", "middle_block.1."),
        ("mid_block.resnets.1.", "middle_block.2."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("add_embedding.linear_1.", "label_emb.0.0."),
        ("add_embedding.linear_2.", "label_emb.0.2."),
    ]
    resnet = [
        ("norm1.", "in_layers.0."),
        ("conv1.", "in_layers.2."),
        ("norm2.", "out_layers.0."),
        ("conv2.", "out_layers.3."),
        ("time_emb_proj.", "emb_layers.1."),
        ("conv_shortcut.", "skip_connection."),
    ]
    ends = [("conv_norm_out.", "out.0."), ("conv_out.", "out.2."), ("conv_in.", "input_blocks.0.0.")]
    blocks = {name: tensor for name, tensor in tensors.items() if ".attentions." not in name}
    attentions = {name: tensor for name, tensor in tensors.items() if ".attentions." in name}
    prefix = "model.diffusion_model."
    return _renamed(blocks, prefix, [*ends, *renames, *resnet]) | _renamed(attentions, prefix, renames)


def _vae(tensors: Tensors) -> Tensors:
    renames = [
        ("conv_shortcut.", "nin_shortcut."),
        ("conv_norm_out.", "norm_out."),
        ("mid_block.attentions.0.", "mid.attn_1."),
        ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."),
        (".group_norm.", ".norm."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".proj_out."),
    ]
    for level in range(4):
        renames += [
            (f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample."),
            (f"up_blocks.{level}.upsamplers.0.", f"up.{3 - level}.upsample."),
            (f"down_blocks.{level}.resnets.", f"down.{level}.block."),
            (f"up_blocks.{level}.resnets.", f"up.{3 - level}.block."),
        ]
    convolutions = {
        name: tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    return _renamed(convolutions, "first_stage_model.", renames)


def _clip(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def _open_clip(tensors: Tensors) -> Tensors:
    renames = [
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.embeddings.", ""),
        ("text_model.final_layer_norm.", "ln_final."),
        ("text_model.encoder.layers.", "transformer.resblocks."),
        ("layer_norm1.", "ln_1."),
        ("layer_norm2.", "ln_2."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
        ("self_attn.", "attn."),
    ]
    joined = {"text_projection": tensors["text_projection.weight"].T}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            joined[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name and name != "text_projection.weight":
            joined[name] = tensor
    return _renamed(joined, "conditioner.embedders.1.model.", renames)


def write_checkpoint(folder: Path, path: Path, family: ModelFamily) -> Path:
    def part(name: str) -> Tensors:
        (file,) = (folder / name).glob("*.safetensors")
        return load_file(file)

    clip = "cond_stage_model.transformer." if family == "sd" else "conditioner.embedders.0.transformer."
    tensors = _unet(part("unet"), family) | _vae(part("vae")) | _clip(part("text_encoder"), clip)
    if family == "sdxl":
        tensors |= _open_clip(part("text_encoder_2"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> ModelFamily:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(demo_models: dict[str, Path], family: ModelFamily) -> Path:
    return demo_models[family]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, folder: Path, family: ModelFamily) -> Path:
    return write_checkpoint(folder, tmp_path_factory.mktemp("checkpoints") / f"{family}.safetensors", family)


@pytest.fixture(scope="module")
def from_folder(folder: Path) -> DiffusionModel:
    """The model in float32, loaded from its folder. Tests must not change it."""
    return DiffusionModel.load(folder, "float32", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_checkpoint_loads_as_the_same_model_to_the_bit(
    folder: Path, checkpoint: Path, from_folder: DiffusionModel
) -> None:
    loaded = DiffusionModel.load(fetch_config_folder(str(checkpoint), str(folder)), "float32", "cpu", checkpoint)
    for component, expected_component in zip(
        (loaded.unet, loaded.vae, *loaded.text_encoders),
        (from_folder.unet, from_folder.vae, *from_folder.text_encoders),
        strict=True,
    ):
        tensors, expected = component.state_dict(), expected_component.state_dict()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert torch.equal(loaded.encode_text("a horse").hidden, from_folder.encode_text("a horse").hidden)


def test_a_float16_checkpoint_keeps_its_vae_in_float32(
    folder: Path, checkpoint: Path, from_folder: DiffusionModel
) -> None:
    half = DiffusionModel.load(folder, "float16", "cpu", checkpoint)
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    expected = from_folder.vae.decoder.conv_in.weight
    assert torch.equal(half.vae.decoder.conv_in.weight, expected)  # not rounded to float16 first


def test_identity_depends_on_the_contents_of_checkpoint_and_configuration(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    resolved = resolve_single_file(str(checkpoint), str(folder))
    assert resolved.pins == {"config": str(folder)}
    assert resolved.checkpoint == checkpoint
    assert {"model.checkpoint", "model.unet/config.json", "model.tokenizer/vocab.json"} <= resolved.identity().keys()
    assert not any(name.endswith("model.safetensors") for name in resolved.digests)
    bare = tmp_path / "bare"  # configuration without weights
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    copy = shutil.copy(checkpoint, tmp_path / checkpoint.name)
    assert resolve_single_file(str(copy), str(bare)).identity() == resolved.identity()
    assert resolve_single_file(str(copy), str(bare)).label == resolved.label


def test_a_checkpoint_has_the_unet_parameters_of_its_folder(checkpoint: Path, folder: Path) -> None:
    assert read_shape(folder, checkpoint).unet_parameters == read_shape(folder).unet_parameters > 0


def test_the_configuration_is_inferred_from_the_tensors(checkpoint: Path, family: ModelFamily) -> None:
    assert infer_config_id(checkpoint) == {"sd": SD_CONFIG, "sdxl": SDXL_CONFIG}[family]


def test_a_configuration_on_the_hub_is_pinned_to_its_commit(checkpoint: Path, folder: Path, monkeypatch) -> None:
    import huggingface_hub

    class Api:
        def model_info(self, name: str, revision: str | None = None):
            return type("Info", (), {"sha": "c" * 40})

    asked = []

    def snapshot(name, *, revision, allow_patterns, local_files_only=False):
        assert not any(".safetensors" in pattern for pattern in allow_patterns)  # not its weights
        asked.append(revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    resolved = resolve_single_file(str(checkpoint))
    assert resolved.config == f"{infer_config_id(checkpoint)}@{'c' * 40}"
    assert set(asked) == {"c" * 40}
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked again"))
    assert fetch_config_folder(str(checkpoint), resolved.config) == folder


def test_the_error_without_network_names_model_config(checkpoint: Path, monkeypatch) -> None:
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"needs the configuration of its family.*folder.*as model\.config"):
        resolve_single_file(str(checkpoint))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_down.lora_down.weight": (4, 4)}, r"a LoRA, not a model.*model\.loras"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "Flux"),
        ({"model.diffusion_model.joint_blocks.0.x.weight": (4, 4)}, "SD 3"),
        ({"unet.conv.weight": (4, 4)}, "not a checkpoint in Stable Diffusion's original layout"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}, "takes 9 channels, as inpainting models do"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "without a VAE or text encoder"),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
                "conditioner.embedders.0.model.ln_final.weight": (4,),
            },
            "SDXL's refiner",
        ),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
                "cond_stage_model.model.ln_final.weight": (4,),
                "first_stage_model.encoder.conv_in.weight": (4,),
            },
            r"predicts ε or v\); name .* as model\.config",
        ),
    ],
)
def test_unsupported_checkpoints_are_rejected_by_their_tensors(tmp_path: Path, tensors, message) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ModelError, match=message):
        resolve_single_file(str(path))


def test_absent_pickled_and_truncated_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        resolve_single_file(str(tmp_path / "absent.safetensors"))
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickled.*convert it once"):
        resolve_single_file(str(tmp_path / "old.ckpt"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ModelError, match="truncated"):
        resolve_single_file(str(tmp_path / "cut.safetensors"))


def test_paths_in_a_job_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "family").mkdir()
    job = tmp_path / "job.yaml"
    job.write_text("manifest: a\noutput: b\nmodel: {name: model.safetensors, config: family}\n")
    assert Job.load(job).model.name == str(tmp_path / "model.safetensors")
    assert Job.load(job).model.config == str(tmp_path / "family")
    for model, message in [
        ({"name": "org/model", "config": "org/other"}, "is for a single checkpoint file; 'org/model' has its own"),
        ({"name": "a.safetensors", "revision": "main"}, "revision 'main' is for a hub id"),
    ]:
        job.write_text(f"manifest: a\noutput: b\nmodel: {json.dumps(model)}\n")
        with pytest.raises(JobError, match=message):
            Job.load(job)
