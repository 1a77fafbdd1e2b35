"""The UNet, with the architecture of Stable Diffusion 1.x: its training data of latents, and its training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from demo_training.dataset import augment
from demo_training.optimization import averaged_model, print_progress, set_learning_rate
from demo_training.pictures import SIDE
from demo_training.vae import CHANNELS, PIXELS, new_vae

CAPTIONED = 0.3  # share of the pictures with their caption; the others have the null prompt, which guidance uses
SHAPES = ((32, 16), (24, 28), (48, 7), (64, 3))  # (side of the latents, batch size)
SHARES = (0.6, 0.2, 0.15, 0.05)  # of the steps


@torch.no_grad()
def encode_images(weights: dict[str, Any], images: torch.Tensor, seed: int, device: torch.device) -> torch.Tensor:
    """Latents of each picture and of a crop of it, augmented: (2, N, CHANNELS, SIDE/PIXELS, SIDE/PIXELS)."""
    vae = new_vae().to(device).eval()
    vae.load_state_dict(weights)
    # The encoder is linear (`init_encoder`), so it equals one convolution, which takes far less time.
    unit = torch.cat([torch.zeros(1, 3, PIXELS, PIXELS), torch.eye(3 * PIXELS**2).view(-1, 3, PIXELS, PIXELS)]).to(
        device
    )
    zero, *rest = vae.encode(unit).latent_dist.mean[:, :, 0, 0]
    kernel = (torch.stack(rest) - zero).T.reshape(CHANNELS, 3, PIXELS, PIXELS)
    random = np.random.default_rng([seed, 2])
    passes = []
    for number in range(2):
        rows = []
        for batch in images.split(8):
            if number == 1:  # a crop, enlarged
                size = int(random.integers(SIDE // 2, SIDE))
                top, left = random.integers(0, SIDE - size + 1, 2)
                crop = batch[:, :, top : top + size, left : left + size].float()
                batch = F.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True)
            rows.append(F.conv2d(augment(batch, random).to(device), kernel, zero, stride=PIXELS).cpu())
        passes.append(torch.cat(rows))
        print(f"latents: pass {number + 1} of 2", flush=True)
    return torch.stack(passes)


def new_unet() -> Any:
    """A UNet with Stable Diffusion 1.x's blocks, so the same 16 self-attention layers, but with fewer channels."""
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
        attention_head_dim=(1, 2, 4, 4),  # diffusers takes this as the number of heads, as for SD 1.x
    )


@torch.no_grad()
def smooth_downsampling(unet: Any) -> None:
    """Project the kernel of each strided convolution to a binomial filter times a matrix of channels.

    With a stride of 2, the 3 × 3 taps cover odd positions twice and even positions once. With other weights than
    1, 2, 1, the gradient differs between them, and images optimized through the UNet show a grid.
    """
    binomial = torch.outer(*[torch.tensor([1.0, 2.0, 1.0])] * 2)
    for block in unet.down_blocks:
        for down in block.downsamplers or ():
            weight, taps = down.conv.weight, binomial.to(down.conv.weight.device)
            weight.copy_((weight * taps).sum((2, 3), keepdim=True) / taps.square().sum() * taps)


@torch.no_grad()
def encode_captions(captions: list[str], base: Path) -> tuple[torch.Tensor, list[int]]:
    """Encodings of the unique texts, the empty one first, (texts, 77, 32), and the number of each caption's text."""
    texts = ["", *sorted(set(captions))]
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return encoder(ids)[0], [texts.index(caption) for caption in captions]


def train_unet(
    latents: torch.Tensor, captions: list[str], base: Path, steps: int, seed: int, device: torch.device, work: Path
) -> dict[str, Any]:
    """Train the UNet to predict noise, with min-SNR loss weights (Hang et al. 2023, γ = 5) and averaged weights.

    `base` is a model folder with text encoder, tokenizer and scheduler. Returns weights, loss and seconds.
    """
    torch.manual_seed(seed + 1)
    unet = new_unet().to(device).train()
    average = averaged_model(unet)
    adam = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    scheduler = DDIMScheduler.from_pretrained(base / "scheduler")
    alphas = scheduler.alphas_cumprod.to(device)
    texts, numbers_of = encode_captions(captions, base)
    texts, text_of = texts.to(device), torch.tensor(numbers_of)
    random = np.random.default_rng([seed, 3])
    losses, started = [], time.monotonic()
    for step in range(steps):
        set_learning_rate(adam, step, steps, 8e-4)
        side, batch = SHAPES[random.choice(len(SHAPES), p=SHARES)]
        numbers = torch.from_numpy(random.integers(0, latents.shape[1], batch))
        top, left = random.integers(0, latents.shape[-1] - side + 1, 2)
        clean = latents[int(random.integers(2)), numbers, :, top : top + side, left : left + side].to(device)
        timesteps = torch.from_numpy(random.integers(0, len(alphas), batch)).to(device)
        noise = torch.randn_like(clean)
        alpha = alphas[timesteps][:, None, None, None]
        prompts = torch.where(torch.from_numpy(random.random(batch) < CAPTIONED), text_of[numbers], 0).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps, texts[prompts]).sample
        snr = (alpha / (1 - alpha)).flatten()
        weight = snr.clamp(max=5) / snr
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (errors * weight).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adam.step()
        smooth_downsampling(unet)
        average.update_parameters(unet)
        losses.append(float(errors.detach().mean()))
        if step % 50 == 49:
            print_progress("unet", step, steps, losses, started)
        if step % 200 == 199:
            torch.save(average.module.state_dict(), work / "unet.partial.pt")
    return {
        "model": {name: value.cpu() for name, value in average.module.state_dict().items()},
        "loss": float(np.mean(losses[-200:])),
        "seconds": time.monotonic() - started,
    }
