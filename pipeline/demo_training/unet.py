"""The UNet, of Stable Diffusion 1.x's shape: latents to learn from, and learning to denoise them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from demo_training.dataset import varied
from demo_training.optimization import averaged, set_rate, tell
from demo_training.pictures import SIDE
from demo_training.vae import CHANNELS, PIXELS, new_vae

CAPTIONED = 0.3  # of the pictures a batch shows the UNet; the others come with the empty prompt, which guidance uses
SHAPES = ((32, 16), (24, 28), (48, 7), (64, 3))  # sides of latents the UNet learns from, and how many of them at a time
SHARES = (0.6, 0.2, 0.15, 0.05)


@torch.no_grad()
def encode_pool(weights: dict[str, Any], pool: torch.Tensor, seed: int, device: torch.device) -> torch.Tensor:
    """Latents of each picture twice, varied and at two scales, (2, N, CHANNELS, SIDE/PIXELS, SIDE/PIXELS)."""
    vae = new_vae().to(device).eval()
    vae.load_state_dict(weights)
    # The encoder is linear (`set_encoder`), so what it makes of each pixel of a patch is a kernel: far less to compute.
    unit = torch.cat([torch.zeros(1, 3, PIXELS, PIXELS), torch.eye(3 * PIXELS**2).view(-1, 3, PIXELS, PIXELS)]).to(
        device
    )
    zero, *rest = vae.encode(unit).latent_dist.mean[:, :, 0, 0]
    kernel = (torch.stack(rest) - zero).T.reshape(CHANNELS, 3, PIXELS, PIXELS)
    random = np.random.default_rng([seed, 2])
    passes = []
    for number in range(2):
        rows = []
        for images in pool.split(8):
            if number == 1:  # nearer: a part of the picture
                size = int(random.integers(SIDE // 2, SIDE))
                top, left = random.integers(0, SIDE - size + 1, 2)
                cut = images[:, :, top : top + size, left : left + size].float()
                images = F.interpolate(cut, (SIDE, SIDE), mode="bilinear", antialias=True)
            rows.append(F.conv2d(varied(images, random).to(device), kernel, zero, stride=PIXELS).cpu())
        passes.append(torch.cat(rows))
        print(f"latents: pass {number + 1} of 2", flush=True)
    return torch.stack(passes)


def new_unet() -> Any:
    """Stable Diffusion 1.x's blocks, so 16 self-attention layers in the same places, narrower."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32, 64, 128, 160),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=(1, 2, 4, 4),  # as in SD 1.x, diffusers reads this as the number of heads
    )


@torch.no_grad()
def smooth_downsampling(unet: Any) -> None:
    """Keep of each strided convolution what is one binomial window times a matrix of channels.

    Taps of 3 × 3 at every second place touch odd places twice and even ones once; unless they fall off like 1, 2, 1, so
    does the gradient, and what is optimized through the UNet shows the lattice.
    """
    window = torch.outer(*[torch.tensor([1.0, 2.0, 1.0])] * 2)
    for block in unet.down_blocks:
        for down in block.downsamplers or ():
            weight, taps = down.conv.weight, window.to(down.conv.weight.device)
            weight.copy_((weight * taps).sum((2, 3), keepdim=True) / taps.square().sum() * taps)


@torch.no_grad()
def encode_captions(captions: list[str], frame: Path) -> tuple[torch.Tensor, list[int]]:
    """The texts' encodings, the empty one first, (texts, 77, 32), and which of them each caption is."""
    texts = ["", *sorted(set(captions))]
    tokenizer = CLIPTokenizer.from_pretrained(frame / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(frame / "text_encoder")
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return encoder(ids)[0], [texts.index(caption) for caption in captions]


def train_unet(
    latents: torch.Tensor, captions: list[str], frame: Path, steps: int, seed: int, device: torch.device, work: Path
) -> dict[str, Any]:
    """Predict the noise; losses weighed by min-SNR (Hang et al. 2023, γ = 5), weights averaged."""
    torch.manual_seed(seed + 1)
    unet = new_unet().to(device).train()
    average = averaged(unet)
    adam = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    scheduler = DDIMScheduler.from_pretrained(frame / "scheduler")
    shares = scheduler.alphas_cumprod.to(device)
    texts, which = encode_captions(captions, frame)
    texts, text_of = texts.to(device), torch.tensor(which)
    random = np.random.default_rng([seed, 3])
    losses, begun = [], time.monotonic()
    for step in range(steps):
        set_rate(adam, step, steps, 8e-4)
        side, batch = SHAPES[random.choice(len(SHAPES), p=SHARES)]
        numbers = torch.from_numpy(random.integers(0, latents.shape[1], batch))
        top, left = random.integers(0, latents.shape[-1] - side + 1, 2)
        clean = latents[int(random.integers(2)), numbers, :, top : top + side, left : left + side].to(device)
        timesteps = torch.from_numpy(random.integers(0, len(shares), batch)).to(device)
        noise = torch.randn_like(clean)
        share = shares[timesteps][:, None, None, None]
        told = torch.where(torch.from_numpy(random.random(batch) < CAPTIONED), text_of[numbers], 0).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(share.sqrt() * clean + (1 - share).sqrt() * noise, timesteps, texts[told]).sample
        snr = (share / (1 - share)).flatten()
        weight = snr.clamp(max=5) / snr
        each = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (each * weight).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adam.step()
        smooth_downsampling(unet)
        average.update_parameters(unet)
        losses.append(float(each.detach().mean()))
        if step % 50 == 49:
            tell("unet", step, steps, losses, begun)
        if step % 200 == 199:
            torch.save(average.module.state_dict(), work / "unet.partial.pt")
    return {
        "model": {name: value.cpu() for name, value in average.module.state_dict().items()},
        "loss": float(np.mean(losses[-200:])),
        "seconds": time.monotonic() - begun,
    }
