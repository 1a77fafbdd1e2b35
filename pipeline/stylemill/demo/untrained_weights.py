"""Weights of the untrained models: random, with an identity path through UNet and VAE."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

# Parameters that add a residual branch to its stream: scaled down, so that depth does not hide the identity path.
_RESIDUAL_OUTPUTS = tuple(f"{name}.weight" for name in ("conv2", "proj_out", "to_out.0", "net.2", "out_proj", "fc2"))
_RESIDUAL_GAIN = 0.35
_NOISE_GAIN = 1.15  # sampling then ends at latents of about unit size, and guidance has a visible effect


def draw_weights(model: torch.nn.Module, part: str, seed: int) -> None:
    """Set all parameters of `model`: matrices uniform with variance 1 / fan-in, norms 1, biases 0.

    `part` and `seed` key the draws. numpy draws them, because torch's draws differ between CPUs in the last bit.
    """
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            values = np.full(shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            key = hashlib.sha256(f"{seed}/{part}/{name}".encode()).digest()
            draw = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], "<u8"))).random(shape)
            gain = _RESIDUAL_GAIN if name.endswith(_RESIDUAL_OUTPUTS) else 1.0
            values = (2 * draw - 1) * gain * np.sqrt(3 / np.prod(shape[1:]))
        parameter.data.copy_(torch.from_numpy(values))


# Each value of the identity path is a pair of channels, x and -x: silu(x) - silu(-x) = x passes the last nonlinearity,
# and a norm group with both has mean 0.


@torch.no_grad()
def add_identity_path(unet: Any, vae: Any) -> None:
    """Let the UNet predict its own normalised input as noise, and the VAE average and interpolate pixels."""
    _add_to_unet(unet)
    _add_to_encoder(vae.encoder, vae.config.scaling_factor)
    _add_to_decoder(vae.decoder, vae.config.scaling_factor)
    _set_identity(vae.quant_conv.weight, range(8), range(8))
    _set_identity(vae.post_quant_conv.weight, range(4), range(4))


def _add_to_unet(unet: Any) -> None:
    """The path: conv_in -> its skip connection to the last resnet -> conv_out."""
    pairs = _signed_channels(4)
    unet.conv_in.weight[:8] = 0
    for latent, (plus, minus) in enumerate(pairs):
        unet.conv_in.weight[plus, latent, 1, 1], unet.conv_in.weight[minus, latent, 1, 1] = 1, -1
    last = unet.up_blocks[-1].resnets[-1].conv_shortcut.weight
    stream = len(last)  # (stream, stream + skip, 1, 1), both of equal width
    _set_identity(last, range(8), range(stream, stream + 8))
    unet.conv_out.weight *= 0.15
    for latent, (plus, minus) in enumerate(pairs):
        unet.conv_out.weight[latent, plus, 1, 1], unet.conv_out.weight[latent, minus, 1, 1] = _NOISE_GAIN, -_NOISE_GAIN


def _add_to_encoder(encoder: Any, scaling_factor: float) -> None:
    """Latents 0-2 are red, green and blue averaged over 8 × 8 pixels; latent 3 is a random mixture."""
    encoder.conv_in.weight[:8] = 0
    for colour, (plus, minus) in enumerate(_signed_channels(3)):
        encoder.conv_in.weight[plus, colour, 1, 1], encoder.conv_in.weight[minus, colour, 1, 1] = 1, -1
    encoder.conv_in.bias[6], encoder.conv_in.bias[7] = 1, -1  # a constant, so that the norm keeps the image's contrast
    _scale_residual_outputs(encoder)
    for block in encoder.down_blocks[:-1]:
        taps = torch.zeros(3, 3)
        taps[:2, :2] = 0.25  # diffusers pads right and below: these four pixels become one
        _set_kernel(block.downsamplers[0].conv.weight, taps)
    weight = encoder.conv_out.weight  # (4 means + 4 log-variances, 16, 3, 3)
    weight[:3], weight[4:] = 0, 0
    for latent, (plus, minus) in enumerate(_signed_channels(3)):
        weight[latent, plus, 1, 1], weight[latent, minus, 1, 1] = 1, -1
    weight[:4] /= scaling_factor
    encoder.conv_out.bias[4:] = -10


def _add_to_decoder(decoder: Any, scaling_factor: float) -> None:
    """Red, green and blue are latents 0-2, interpolated linearly."""
    decoder.conv_in.weight[:8] = 0
    for latent, (plus, minus) in enumerate(_signed_channels(3)):
        decoder.conv_in.weight[plus, latent, 1, 1] = scaling_factor
        decoder.conv_in.weight[minus, latent, 1, 1] = -scaling_factor
    decoder.conv_in.weight[8:] *= scaling_factor
    decoder.conv_in.bias[6], decoder.conv_in.bias[7] = 1, -1
    _scale_residual_outputs(decoder)
    smooth = torch.tensor([1.0, 2.0, 1.0]) / 4
    for block in decoder.up_blocks[:-1]:
        _set_kernel(block.upsamplers[0].conv.weight, torch.outer(smooth, smooth))
    decoder.conv_out.weight *= 0.05
    for colour, (plus, minus) in enumerate(_signed_channels(3)):
        decoder.conv_out.weight[colour, plus, 1, 1], decoder.conv_out.weight[colour, minus, 1, 1] = 0.6, -0.6


def _signed_channels(count: int) -> list[tuple[int, int]]:
    return [(2 * i, 2 * i + 1) for i in range(count)]


def _scale_residual_outputs(part: Any) -> None:
    for name, parameter in part.named_parameters():
        if name.endswith(_RESIDUAL_OUTPUTS):
            parameter[:8] *= 0.2


def _set_identity(weight: torch.Tensor, outputs: range, inputs: range) -> None:
    weight[list(outputs)] = 0
    weight[list(outputs), list(inputs), 0, 0] = 1


def _set_kernel(weight: torch.Tensor, taps: torch.Tensor) -> None:
    """Let channels 0-7 be filtered by `taps`, each from its own channel; the others stay random."""
    weight[:8] = 0
    for channel in range(8):
        weight[channel, channel] = taps
