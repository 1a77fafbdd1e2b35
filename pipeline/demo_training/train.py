"""Train the embedded demo model from nothing: python -m demo_training.train OUT, run in pipeline/.

Pictures are drawn (`pictures.py`), a VAE learns to hold them, a UNet of Stable Diffusion 1.x's shape learns to denoise
its latents, and OUT gets the model in diffusers' folder format, fp16, with `training.json`: seeds, losses, time.
Each stage is kept in OUT.work and not done twice; a stage that was killed starts over.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from demo_training.pictures import SIDE, picture, textures
from stylemill.engine.demo_model import write_demo_model

CAPTIONED = 0.3  # of the pictures a batch shows the UNet; the others come with the empty prompt, which guidance uses
TEXTURE_SHARE = 0.05
HALVINGS = 2  # of the VAE: a latent stands for 4 × 4 pixels
PIXELS = 2**HALVINGS
CHANNELS = 6  # of a latent
SHAPES = ((32, 16), (24, 28), (48, 7), (64, 3))  # sides of latents the UNet learns from, and how many of them at a time
SHARES = (0.6, 0.2, 0.15, 0.05)
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=2400)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--unet-steps", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    work = options.out.with_name(options.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)

    begun = time.monotonic()
    pool, captions = draw_pool(options.seed, options.pictures)
    print(f"{len(pool)} pictures drawn in {time.monotonic() - begun:.0f} s", flush=True)
    write_demo_model(work / "frame")  # tokenizer, text encoder, scheduler
    vae = kept(work / "vae.pt", lambda: train_vae(pool, options.vae_steps, options.seed, device))
    latents = kept(work / "latents.pt", lambda: encode_pool(vae["model"], pool, options.seed, device))
    unet = kept(
        work / "unet.pt",
        lambda: train_unet(latents, captions, work / "frame", options.unet_steps, options.seed, device, work),
    )
    write(options.out, work / "frame", vae, unet, vars(options), len(pool))


def kept(path: Path, make: Any) -> Any:
    if not path.exists():
        made = make()
        torch.save(made, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return torch.load(path, weights_only=True)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw(task: tuple[int, int]) -> tuple[Any, str]:
    return picture(*task)


def draw_pool(seed: int, count: int) -> tuple[torch.Tensor, list[str]]:
    """`count` drawn pictures and some cuts from textures, (N, 3, SIDE, SIDE) uint8, and their captions."""
    with Pool() as workers:
        drawn = workers.map(_draw, [(seed, number) for number in range(count)], chunksize=16)
    random = np.random.default_rng([seed, 1 << 32])
    photos = textures()
    for number in range(int(count * TEXTURE_SHARE)):
        pixels, caption = photos[number % len(photos)]
        side = int(random.integers(min(200, min(pixels.shape[:2])), min(pixels.shape[:2]) + 1))
        top, left = (int(random.integers(0, length - side + 1)) for length in pixels.shape[:2])
        cut = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
        scaled = F.interpolate(cut, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        drawn.append((scaled.permute(1, 2, 0).round().byte().numpy(), caption))
    return torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2), [text for _, text in drawn]


def varied(images: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """A batch flipped, turned in hue and moved in lightness, in -1..1."""
    images = images.float() / 127.5 - 1
    if random.random() < 0.5:
        images = images.flip(-1)
    if random.random() < 0.5:
        images = images[:, list(random.permutation(3))]
    if random.random() < 0.15:
        images = -images
    gain = torch.from_numpy(random.uniform(0.7, 1.1, (len(images), 1, 1, 1))).float()
    return (images * gain + torch.from_numpy(random.normal(0, 0.1, (len(images), 1, 1, 1))).float()).clamp(-1, 1)


def crops(pool: torch.Tensor, batch: int, side: int, random: np.random.Generator) -> Iterator[torch.Tensor]:
    """Batches of cuts at many scales, (batch, 3, side, side) in -1..1, without end."""
    while True:
        cuts = []
        for number in random.integers(0, len(pool), batch):
            size = side if random.random() < 0.5 else int(random.integers(side // 2, SIDE + 1))
            top, left = random.integers(0, SIDE - size + 1, 2)
            cut = pool[number, :, top : top + size, left : left + size][None].float()
            if size != side:
                cut = F.interpolate(cut, (side, side), mode="bilinear", antialias=True)
            cuts.append(varied(cut, random))
        yield torch.cat(cuts)


# --- VAE --------------------------------------------------------------------------------------------------------------


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


# --- UNet -------------------------------------------------------------------------------------------------------------


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


def tell(name: str, step: int, steps: int, losses: list[float], begun: float, more: str = "") -> None:
    pace = (time.monotonic() - begun) / (step + 1)
    print(f"{name} {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f} {more} {pace:.2f} s/step", flush=True)


def averaged(model: Any) -> Any:
    """An exponential average of the weights that follows fast at first: 0.99 after 100 steps, 0.998 at most."""

    def move(mean: torch.Tensor, value: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        decay = min(0.998, (1 + float(count)) / (10 + float(count)))
        return decay * mean + (1 - decay) * value

    return torch.optim.swa_utils.AveragedModel(model, avg_fn=move)


def set_rate(adam: torch.optim.Optimizer, step: int, steps: int, rate: float) -> None:
    """A short rise, then a cosine down to a fiftieth."""
    rise = min(1.0, (step + 1) / 50)
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in adam.param_groups:
        group["lr"] = rate * rise * fall


# --- the folder -------------------------------------------------------------------------------------------------------


def write(out: Path, frame: Path, vae: dict[str, Any], unet: dict[str, Any], told: dict[str, Any], count: int) -> None:
    """The model as diffusers reads it, in fp16, and what was measured while it learnt."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(frame, out, ignore=shutil.ignore_patterns("demo.json"))
    for part, model, trained in (("vae", new_vae(), vae), ("unet", new_unet(), unet)):
        model.load_state_dict(trained["model"])
        model.half().save_pretrained(out / part, safe_serialization=True)
    measured = {
        "pictures": count,
        **{key: told[key] for key in ("seed", "vae_steps", "unet_steps", "device")},
        **{
            f"{name}_{key}": round(stage[key], 4)
            for name, stage in (("vae", vae), ("unet", unet))
            for key in ("loss", "seconds")
        },
        "vae_psnr": round(vae["psnr"], 2),
    }
    (out / "training.json").write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
