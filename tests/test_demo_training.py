"""The embedded model's training: its pictures, where its VAE begins, and that all of it still runs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from demo_training import dataset
from demo_training.pictures import SIDE, picture
from demo_training.renderers import MANNERS
from demo_training.train import main
from demo_training.unet import smooth_downsampling
from demo_training.vae import components, new_vae, psnr, set_decoder, set_encoder
from stylemill.engine import Engine


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    pixels = np.stack([picture(0, number)[0] for number in range(len(MANNERS))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_a_picture_is_a_function_of_seed_and_number(drawn):
    again, caption = picture(0, 1)
    assert caption == MANNERS[1][0]
    np.testing.assert_array_equal(again, drawn[1].permute(1, 2, 0))
    assert not np.array_equal(again, picture(1, 1)[0])


@torch.no_grad()
def test_the_vae_begins_with_mean_colours_and_little_else_to_learn(drawn):
    vae = new_vae()
    project, back, mean = components(drawn, 0)
    set_encoder(vae, project, mean)
    set_decoder(vae, back, mean)
    latents = vae.encode(drawn[:4].float() / 127.5 - 1).latent_dist.mean
    assert latents.shape == (4, 6, SIDE // 4, SIDE // 4)
    assert psnr(vae, drawn[:4], torch.device("cpu")) > 18
    there_and_back = back.T @ project
    assert torch.allclose(there_and_back @ there_and_back, there_and_back, atol=1e-4), "a projection"


def test_gradients_through_the_embedded_unet_have_no_lattice():
    """Of a constant gradient behind each strided convolution, every place inside gets the same."""
    unet = Engine.load("demo", dtype="float32", device="cpu").model.unet
    convolutions = [down.conv for block in unet.down_blocks for down in block.downsamplers or ()]
    assert len(convolutions) == 3
    for convolution in convolutions:
        image = torch.zeros(1, convolution.in_channels, 16, 16, requires_grad=True)
        convolution(image).sum().backward()
        inside = image.grad[0, :, 1:-2, 1:-2].flatten(1)
        assert (inside.std(1) < 1e-3 * inside.abs().max()).all()
    weights = [convolution.weight.clone() for convolution in convolutions]
    smooth_downsampling(unet)
    assert all(torch.allclose(a, b.weight, atol=1e-6) for a, b in zip(weights, convolutions, strict=True))


@pytest.mark.slow
def test_training_ends_in_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "textures", lambda: [(picture(7, 0)[0], "a photo")])
    monkeypatch.setattr("demo_training.train.version", lambda name: "0")  # of scikit-image, which tests do without
    few = ["--pictures", "30", "--vae-steps", "1", "--unet-steps", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "model"), *few])
    main()
    assert len(Engine.load(tmp_path / "model", device="cpu").model.unet.down_blocks) == 4
    assert "31 pictures" in (tmp_path / "model" / "MODEL_CARD.md").read_text()
