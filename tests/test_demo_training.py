"""The training of the embedded model: its pictures, the initial weights of its VAE, and that it runs to the end."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from demo_training import dataset
from demo_training.pictures import SIDE, picture
from demo_training.renderers import RENDERERS
from demo_training.train import main
from demo_training.unet import smooth_downsampling
from demo_training.vae import init_decoder, init_encoder, new_vae, principal_components, psnr
from stylemill.engine import Engine


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    pixels = np.stack([picture(0, number)[0] for number in range(len(RENDERERS))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_a_picture_follows_from_its_seed_and_number(pictures):
    again, caption = picture(0, 1)
    assert caption == RENDERERS[1][0]
    np.testing.assert_array_equal(again, pictures[1].permute(1, 2, 0))
    assert not np.array_equal(again, picture(1, 1)[0])


@torch.no_grad()
def test_the_initial_vae_reconstructs_mean_colours_from_principal_components(pictures):
    vae = new_vae()
    project, back, mean = principal_components(pictures, 0)
    init_encoder(vae, project, mean)
    init_decoder(vae, back, mean)
    latents = vae.encode(pictures[:4].float() / 127.5 - 1).latent_dist.mean
    assert latents.shape == (4, 6, SIDE // 4, SIDE // 4)
    assert psnr(vae, pictures[:4], torch.device("cpu")) > 18
    projection = back.T @ project
    assert torch.allclose(projection @ projection, projection, atol=1e-4)


def test_gradients_through_the_embedded_unet_have_no_grid_pattern():
    """A constant gradient behind a strided convolution gives the same gradient at every position before it."""
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
def test_training_writes_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "textures", lambda: [(picture(7, 0)[0], "a photo")])
    monkeypatch.setattr("demo_training.train.version", lambda name: "0")  # of scikit-image, which the tests do not need
    few = ["--pictures", "30", "--vae-steps", "1", "--unet-steps", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "model"), *few])
    main()
    assert len(Engine.load(tmp_path / "model", device="cpu").model.unet.down_blocks) == 4
    assert "31 pictures" in (tmp_path / "model" / "MODEL_CARD.md").read_text()
