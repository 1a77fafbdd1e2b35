"""The VAE: an encoder with fixed weights that computes principal components, and a trained decoder."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from demo_training.dataset import random_crops
from demo_training.optimization import averaged_model, print_progress, set_learning_rate
from demo_training.pictures import SIDE

DOWNSAMPLINGS = 2  # a latent encodes 4 × 4 pixels
PIXELS = 2**DOWNSAMPLINGS
CHANNELS = 6  # of a latent
OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (y, x) of the pixels that one downsampling joins


def new_vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * (DOWNSAMPLINGS + 1),
        up_block_types=("UpDecoderBlock2D",) * (DOWNSAMPLINGS + 1),
        latent_channels=CHANNELS,
        norm_num_groups=2,  # normalisation over many channels keeps the contrast between them, and so the colours
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,
    )


@torch.no_grad()
def principal_components(images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components of a latent's pixels: projection and its inverse, (CHANNELS, values) each, and the mean.

    The values are ordered as in repeated joins of 2 × 2 pixels into channels. The first component has the standard
    deviation 1, and each other one the square root of its ratio to the first: the UNet learns less from latents in
    which details have as much weight as the large structures.
    """
    patches = []
    for top, left in np.random.default_rng([seed, 1]).integers(0, PIXELS, (4, 2)):
        space = images[::12, :, top : SIDE - PIXELS + top, left : SIDE - PIXELS + left].float() / 127.5 - 1
        for _ in range(DOWNSAMPLINGS):
            space = torch.cat([space[..., y::2, x::2] for y, x in OFFSETS], 1)
        patches.append(space[..., ::7, ::7].permute(0, 2, 3, 1).reshape(-1, space.shape[1]))
    flat = torch.cat(patches).double()
    values, vectors = torch.linalg.eigh(flat.T.cov())
    first, scale = vectors.flip(1)[:, :CHANNELS], values.flip(0)[:CHANNELS].sqrt()
    scale = (scale * scale[0]).sqrt()
    return (first / scale).T.float(), (first * scale).T.float(), flat.mean(0).float()


@torch.no_grad()
def init_encoder(vae: Any, project: torch.Tensor, mean: torch.Tensor) -> None:
    """Set and freeze the encoder's weights so that latents are principal components with mean 0.

    No other linear encoding of this size keeps more of the images. The residual branches are zero, so the encoder is
    linear up to its last norm: each downsampling joins 2 × 2 pixels into channels, and the last one projects. The
    last norm and SiLU are passed as silu(x) - silu(-x) = x, with large constant channels so that the norm divides by a
    constant.
    """
    encoder = vae.encoder
    for name, parameter in encoder.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    set_identity(encoder.conv_in.weight, 3)
    width = 3
    for number, block in enumerate(encoder.down_blocks[:DOWNSAMPLINGS]):
        if block.resnets[0].conv_shortcut is not None:
            set_identity(block.resnets[0].conv_shortcut.weight, width)
        down = block.downsamplers[0].conv  # pads right and below: its first 2 × 2 taps are the pixels that it joins
        for offset, (y, x) in enumerate(OFFSETS):
            if number < DOWNSAMPLINGS - 1:
                set_identity(down.weight[offset * width :, :, y, x], width)
            else:
                down.weight[:CHANNELS, :width, y, x] = project[:, offset * width : (offset + 1) * width]
        width *= 4
    down.bias[:CHANNELS] = -(project @ mean)
    pass_norm(encoder, encoder.down_blocks[-1].resnets[0].conv_shortcut, CHANNELS, large=100.0)
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    set_identity(vae.quant_conv.weight, CHANNELS)
    vae.quant_conv.bias[CHANNELS:] = -10  # log-variances, which are not used
    encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


@torch.no_grad()
def init_decoder(vae: Any, back: torch.Tensor, mean: torch.Tensor) -> None:
    """Set the decoder's initial weights: it enlarges the mean colours, and its residual branches are zero."""
    decoder = vae.decoder
    for name, parameter in decoder.named_parameters():
        if ".conv2." in name:
            parameter.zero_()
    vae.post_quant_conv.weight.zero_()
    vae.post_quant_conv.bias.zero_()
    set_identity(vae.post_quant_conv.weight, CHANNELS)
    for colour in range(3):
        decoder.conv_in.weight[colour] = 0
        decoder.conv_in.weight[colour, :, 1, 1] = back[:, colour::3].mean(1)
        decoder.conv_in.bias[colour] = mean[colour::3].mean()
    smooth = torch.tensor([1.0, 2.0, 1.0]) / 4
    for block in decoder.up_blocks[:DOWNSAMPLINGS]:
        if block.resnets[0].conv_shortcut is not None:
            set_identity(block.resnets[0].conv_shortcut.weight, 3)
            block.resnets[0].conv_shortcut.bias[:3] = 0
        upsampling = block.upsamplers[0].conv
        upsampling.weight[:3], upsampling.bias[:3] = 0, 0
        for colour in range(3):
            upsampling.weight[colour, colour] = torch.outer(smooth, smooth)
    pass_norm(decoder, decoder.up_blocks[-1].resnets[0].conv_shortcut, 3, large=4.0)
    decoder.conv_out.bias.zero_()


def set_identity(weight: torch.Tensor, width: int) -> None:
    """Let the first `width` channels pass unchanged, through the middle tap of a kernel."""
    weight[:width] = 0
    for channel in range(width):
        kernel = weight[channel, channel]
        kernel[tuple(length // 2 for length in kernel.shape)] = 1


def pass_norm(part: Any, before: Any, width: int, large: float) -> None:
    """Let `width` channels of the linear layer `before` pass the last norm, SiLU and convolution unchanged."""
    group = len(before.weight) // 2
    before.weight[:group], before.bias[:group] = 0, 0
    part.conv_out.weight[:width] = 0
    for channel in range(width):
        before.weight[2 * channel, channel], before.weight[2 * channel + 1, channel] = 1, -1
        part.conv_out.weight[channel, 2 * channel, 1, 1], part.conv_out.weight[channel, 2 * channel + 1, 1, 1] = 1, -1
    before.bias[2 * width : group : 2], before.bias[2 * width + 1 : group : 2] = large, -large
    constant = group - 2 * width
    part.conv_norm_out.weight[:group] = math.sqrt((constant * large**2 + 2 * width) / group)


def finite_differences(image: torch.Tensor) -> torch.Tensor:
    """Differences of neighbouring pixels along both axes, flattened for each image."""
    return torch.cat(
        [(image[..., 1:] - image[..., :-1]).flatten(1), (image[..., 1:, :] - image[..., :-1, :]).flatten(1)], 1
    )


def train_vae(images: torch.Tensor, steps: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Train the decoder with L1 losses of pixels, of their differences (against blur) and of mean colours.

    Its latents have noise added, as latents of sampling are not exact either. Returns weights, loss, PSNR and seconds.
    """
    vae = new_vae()
    project, back, mean = principal_components(images, seed)
    init_encoder(vae, project, mean)
    init_decoder(vae, back, mean)
    held_out, images = images[::75], images[[number for number in range(len(images)) if number % 75]]
    vae.to(device)
    trained = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    average = averaged_model(trained)
    adam = torch.optim.AdamW(trained.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    random = np.random.default_rng([seed, 1])
    batches = random_crops(images, 8, 128, random)
    losses, started = [], time.monotonic()
    for step in range(steps):
        set_learning_rate(adam, step, steps, 2e-3)
        batch = next(batches).to(device)
        with torch.no_grad():
            mean = vae.encode(batch).latent_dist.mean
            mean = mean + torch.randn_like(mean) * torch.rand(len(mean), 1, 1, 1, device=device) * 0.15
        with torch.autocast(device.type, torch.bfloat16, enabled=step < steps * 0.9):
            decoded = vae.decode(mean).sample.float()
        difference_loss = (finite_differences(decoded) - finite_differences(batch)).abs().mean()
        loss = (decoded - batch).abs().mean() + 0.5 * difference_loss
        loss = loss + (F.avg_pool2d(decoded, 16) - F.avg_pool2d(batch, 16)).abs().mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        adam.step()
        average.update_parameters(trained)
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print_progress("vae", step, steps, losses, started, f"held-out {psnr(vae, held_out[:16], device):.2f} dB")
    vae.post_quant_conv.load_state_dict(average.module[0].state_dict())
    vae.decoder.load_state_dict(average.module[1].state_dict())
    quality = psnr(vae, held_out, device)
    print(f"vae: {quality:.2f} dB on held-out pictures", flush=True)
    return {
        "model": {name: value.cpu() for name, value in vae.state_dict().items()},
        "loss": float(np.mean(losses[-50:])),
        "psnr": quality,
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def psnr(vae: Any, pictures: torch.Tensor, device: torch.device) -> float:
    """Peak signal-to-noise ratio of the VAE's reconstructions, in dB; `pictures` are (N, 3, H, W) uint8."""
    images = pictures.float() / 127.5 - 1
    decoded = torch.cat([vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.cpu() for x in images.split(4)])
    return float((-10 * torch.log10((decoded.clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4)).mean())
