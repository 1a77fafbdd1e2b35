"""The VAE: an encoder that is principal components, a decoder that learns what they leave out."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from demo_training.dataset import crops
from demo_training.optimization import averaged, set_rate, tell
from demo_training.pictures import SIDE

HALVINGS = 2  # a latent stands for 4 × 4 pixels
PIXELS = 2**HALVINGS
CHANNELS = 6  # of a latent
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def new_vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * (HALVINGS + 1),
        up_block_types=("UpDecoderBlock2D",) * (HALVINGS + 1),
        latent_channels=CHANNELS,
        norm_num_groups=2,  # few groups keep the contrast between channels, and so colours
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,
    )


@torch.no_grad()
def components(pool: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first principal components of a latent's pixels: projections there and back, (CHANNELS, values), and mean.

    The values are ordered as steps of 2 × 2 places into channels give them, colour last. The first component gets
    deviation 1, the others the root of what they have beside it: details as loud as the whole teach a UNet little.
    """
    patches = []
    for top, left in np.random.default_rng([seed, 1]).integers(0, PIXELS, (4, 2)):
        space = pool[::12, :, top : SIDE - PIXELS + top, left : SIDE - PIXELS + left].float() / 127.5 - 1
        for _ in range(HALVINGS):
            space = torch.cat([space[..., y::2, x::2] for y, x in PLACES], 1)
        patches.append(space[..., ::7, ::7].permute(0, 2, 3, 1).reshape(-1, space.shape[1]))
    flat = torch.cat(patches).double()
    values, vectors = torch.linalg.eigh(flat.T.cov())
    first, scale = vectors.flip(1)[:, :CHANNELS], values.flip(0)[:CHANNELS].sqrt()
    scale = (scale * scale[0]).sqrt()
    return (first / scale).T.float(), (first * scale).T.float(), flat.mean(0).float()


@torch.no_grad()
def set_encoder(vae: Any, project: torch.Tensor, mean: torch.Tensor) -> None:
    """Latents are principal components of mean 0: no linear code of this size holds more.

    The stream beside the residual branches is linear, so it can carry a patch: each downsampling puts 2 × 2 places
    into channels, the last one projects. The closing norm and SiLU are passed as silu(x) - silu(-x) = x, beside
    channels so large and constant that the norm divides by a constant.
    """
    encoder = vae.encoder
    for name, parameter in encoder.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    set_identity(encoder.conv_in.weight, 3)
    width = 3
    for number, block in enumerate(encoder.down_blocks[:HALVINGS]):
        if block.resnets[0].conv_shortcut is not None:
            set_identity(block.resnets[0].conv_shortcut.weight, width)
        down = block.downsamplers[0].conv  # pads right and below: its first 2 × 2 taps are the pixels that become one
        for place, (y, x) in enumerate(PLACES):
            if number < HALVINGS - 1:
                set_identity(down.weight[place * width :, :, y, x], width)
            else:
                down.weight[:CHANNELS, :width, y, x] = project[:, place * width : (place + 1) * width]
        width *= 4
    down.bias[:CHANNELS] = -(project @ mean)
    pass_norm(encoder, encoder.down_blocks[-1].resnets[0].conv_shortcut, CHANNELS, large=100.0)
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    set_identity(vae.quant_conv.weight, CHANNELS)
    vae.quant_conv.bias[CHANNELS:] = -10  # log-variances: unused, and small
    encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


@torch.no_grad()
def set_decoder(vae: Any, back: torch.Tensor, mean: torch.Tensor) -> None:
    """Begin at mean colours, smoothly enlarged; residual branches begin silent and learn all else."""
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
    for block in decoder.up_blocks[:HALVINGS]:
        if block.resnets[0].conv_shortcut is not None:
            set_identity(block.resnets[0].conv_shortcut.weight, 3)
            block.resnets[0].conv_shortcut.bias[:3] = 0
        enlarge = block.upsamplers[0].conv
        enlarge.weight[:3], enlarge.bias[:3] = 0, 0
        for colour in range(3):
            enlarge.weight[colour, colour] = torch.outer(smooth, smooth)
    pass_norm(decoder, decoder.up_blocks[-1].resnets[0].conv_shortcut, 3, large=4.0)
    decoder.conv_out.bias.zero_()


def set_identity(weight: torch.Tensor, width: int) -> None:
    """The first `width` channels pass as they are, through the middle tap where there are several."""
    weight[:width] = 0
    for channel in range(width):
        place = weight[channel, channel]
        place[tuple(length // 2 for length in place.shape)] = 1


def pass_norm(part: Any, before: Any, width: int, large: float) -> None:
    """Let `width` channels of the linear layer `before` come out of norm, SiLU and the last convolution unchanged."""
    group = len(before.weight) // 2
    before.weight[:group], before.bias[:group] = 0, 0
    part.conv_out.weight[:width] = 0
    for channel in range(width):
        before.weight[2 * channel, channel], before.weight[2 * channel + 1, channel] = 1, -1
        part.conv_out.weight[channel, 2 * channel, 1, 1], part.conv_out.weight[channel, 2 * channel + 1, 1, 1] = 1, -1
    before.bias[2 * width : group : 2], before.bias[2 * width + 1 : group : 2] = large, -large
    constant = group - 2 * width
    part.conv_norm_out.weight[:group] = math.sqrt((constant * large**2 + 2 * width) / group)


def differences(image: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [(image[..., 1:] - image[..., :-1]).flatten(1), (image[..., 1:, :] - image[..., :-1, :]).flatten(1)], 1
    )


def train_vae(pool: torch.Tensor, steps: int, seed: int, device: torch.device) -> dict[str, Any]:
    """The decoder learns pixels, their gradients (against blur) and mean colours (against paleness), all in L1.

    It sees latents jittered, which is what sampling gives it.
    """
    vae = new_vae()
    project, back, mean = components(pool, seed)
    set_encoder(vae, project, mean)
    set_decoder(vae, back, mean)
    held, pool = pool[::75], pool[[number for number in range(len(pool)) if number % 75]]
    vae.to(device)
    learning = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    average = averaged(learning)
    adam = torch.optim.AdamW(learning.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    random = np.random.default_rng([seed, 1])
    batches = crops(pool, 8, 128, random)
    losses, begun = [], time.monotonic()
    for step in range(steps):
        set_rate(adam, step, steps, 2e-3)
        images = next(batches).to(device)
        with torch.no_grad():
            mean = vae.encode(images).latent_dist.mean
            mean = mean + torch.randn_like(mean) * torch.rand(len(mean), 1, 1, 1, device=device) * 0.15
        with torch.autocast(device.type, torch.bfloat16, enabled=step < steps * 0.9):
            seen = vae.decode(mean).sample.float()
        loss = (seen - images).abs().mean() + 0.5 * (differences(seen) - differences(images)).abs().mean()
        loss = loss + (F.avg_pool2d(seen, 16) - F.avg_pool2d(images, 16)).abs().mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        adam.step()
        average.update_parameters(learning)
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            tell("vae", step, steps, losses, begun, f"held-out {psnr(vae, held[:16], device):.2f} dB")
    vae.post_quant_conv.load_state_dict(average.module[0].state_dict())
    vae.decoder.load_state_dict(average.module[1].state_dict())
    quality = psnr(vae, held, device)
    print(f"vae: {quality:.2f} dB on pictures not trained on", flush=True)
    return {
        "model": {name: value.cpu() for name, value in vae.state_dict().items()},
        "loss": float(np.mean(losses[-50:])),
        "psnr": quality,
        "seconds": time.monotonic() - begun,
    }


@torch.no_grad()
def psnr(vae: Any, pictures: torch.Tensor, device: torch.device) -> float:
    images = pictures.float() / 127.5 - 1
    back = torch.cat([vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.cpu() for x in images.split(4)])
    return float((-10 * torch.log10((back.clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4)).mean())
