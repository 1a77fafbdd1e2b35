"""The untrained models: deterministic, complete, and of the architecture of Stable Diffusion 1.x and SDXL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stylemill.demo.untrained import write_demo_model
from stylemill.errors import ModelError


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _part(cls, folder: Path, name: str):
    kwargs = {} if name in ("tokenizer", "scheduler") else {"use_safetensors": True}
    return cls.from_pretrained(folder / name, local_files_only=True, **kwargs)


def test_a_seed_gives_the_same_bytes_and_nothing_else_changes(folder, tmp_path, capfd):
    before = torch.random.get_rng_state()
    again = write_demo_model(str(tmp_path / "again"))
    other = write_demo_model(tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert _files(again) == _files(folder)
    assert (
        _files(other)["unet/diffusion_pytorch_model.safetensors"]
        != _files(folder)["unet/diffusion_pytorch_model.safetensors"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]
    assert capfd.readouterr() == ("", "")


def test_weights_are_safetensors_only(folder):
    suffixes = {Path(name).suffix for name in _files(folder)}
    assert suffixes == {".safetensors", ".json", ".txt"}


def test_a_complete_folder_is_not_changed_and_other_content_is_refused(folder, tmp_path):
    written = write_demo_model(tmp_path / "demo")
    times = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    write_demo_model(written)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == times
    with pytest.raises(ModelError, match="not a complete demo model of seed 1"):
        write_demo_model(written, seed=1)
    with pytest.raises(ModelError, match="of seed 0 and kind sdxl"):
        write_demo_model(written, kind="sdxl")
    (written / "unet" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="delete it"):
        write_demo_model(written)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError):
        write_demo_model(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert _files(write_demo_model(tmp_path / "empty")) == _files(folder)


def test_the_tokenizer_has_clips_context_and_encodes_any_text(folder):
    tokenizer = _part(CLIPTokenizer, folder, "tokenizer")
    assert tokenizer.model_max_length == 77
    assert tokenizer.convert_ids_to_tokens(tokenizer("").input_ids) == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.decode(tokenizer("a painting").input_ids, skip_special_tokens=True).replace(" ", "") == "apainting"
    assert tokenizer("a painting").input_ids != tokenizer("ä painting").input_ids
    padded = tokenizer("a painting", padding="max_length", truncation=True).input_ids
    assert len(padded) == 77
    encoder = _part(CLIPTextModel, folder, "text_encoder")
    assert encoder(torch.tensor([padded]))[0].shape == (1, 77, 32)


def test_sdxl_has_two_text_encoders_of_different_widths(sdxl_folder):
    first, second = (
        _part(CLIPTextModel, sdxl_folder, "text_encoder"),
        _part(CLIPTextModelWithProjection, sdxl_folder, "text_encoder_2"),
    )
    ids = _part(CLIPTokenizer, sdxl_folder, "tokenizer_2")(
        "a painting", padding="max_length", return_tensors="pt"
    ).input_ids
    widths = first(ids)[0].shape[-1], second(ids, output_hidden_states=True).hidden_states[-2].shape[-1]
    assert sum(widths) == _part(UNet2DConditionModel, sdxl_folder, "unet").config.cross_attention_dim == 48
    assert second(ids).text_embeds.shape == (1, 16)


SDXL_CONDITIONS = {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 16), "time_ids": torch.full((2, 6), 64.0)}}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_latents_stay_finite_and_images_pass_the_vae(folder, sdxl_folder, kind):
    model, layers, added = (folder, 16, {}) if kind == "sd" else (sdxl_folder, 70, SDXL_CONDITIONS)
    unet = _part(UNet2DConditionModel, model, "unet")
    vae = _part(AutoencoderKL, model, "vae")
    scheduler = _part(DDIMScheduler, model, "scheduler")
    assert sum(".attn1." in name for name in unet.attn_processors) == layers
    assert all(layer.heads > 1 for name, layer in unet.named_modules() if name.endswith("attn1"))
    scheduler.set_timesteps(50)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            noise = unet(latents, timestep, torch.zeros(2, 77, unet.config.cross_attention_dim), **added).sample
            latents = scheduler.step(noise, timestep, latents).prev_sample
        assert 0.05 < latents.std() < 4

        ramp = torch.linspace(-0.8, 0.8, 64).repeat(64, 1)  # (64, 64), dark left, bright right
        images = torch.stack([torch.stack([ramp, -ramp, ramp.T]), torch.stack([-ramp, ramp.T, ramp])])
        encoded = vae.encode(images).latent_dist.mean
        assert encoded.shape == (2, 4, 8, 8)
        assert 0.3 < (encoded * vae.config.scaling_factor).std() < 3
        decoded = vae.decode(encoded).sample
    assert (decoded.abs() > 1).float().mean() < 0.1
    assert torch.corrcoef(torch.stack([decoded.flatten(), images.flatten()]))[0, 1] > 0.9
