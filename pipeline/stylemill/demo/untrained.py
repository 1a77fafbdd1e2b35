"""Small untrained models shaped like Stable Diffusion 1.x and SDXL, so that everything runs without a download.

They have the real block types and 16 or 70 self-attention layers, in the diffusers folder format. Weights are random,
save for a thin identity path: the VAE averages 8 × 8 pixels and interpolates them back, the UNet predicts its own
normalised input as noise. So pictures pass blurred but recognisable, and sampling neither dies out nor explodes.
They have learnt nothing: they show how stylemill works, not how attention distillation looks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stylemill.errors import ModelError

TOKENS = 77  # CLIP's context length
WIDTHS = {"text_encoder": 32, "text_encoder_2": 16}  # of their hidden states; the second is SDXL's only
MANIFEST = (
    "demo.json"  # names the kind, the seed and the digest of every other file; a folder that matches it is complete
)

# Parts of a residual branch that write into the stream: kept small, so that depth does not drown the identity path.
_RESIDUAL_OUTPUTS = tuple(f"{name}.weight" for name in ("conv2", "proj_out", "to_out.0", "net.2", "out_proj", "fc2"))
_RESIDUAL_GAIN = 0.35
_NOISE_GAIN = 1.15  # sampling then ends at latents of about unit size, with room for the guidance to be seen


ModelFamily = Literal["sd", "sdxl"]


def write_demo_model(folder: str | Path, seed: int = 0, kind: ModelFamily = "sd") -> Path:
    """Write the demo model of `kind` and `seed` to `folder` and return it; the weights are the same on any machine.

    A complete demo model of both is left as it is. Raises ModelError when the folder holds anything else.
    """
    return write_once(folder, seed, kind, lambda unfinished: _write_parts(unfinished, seed, kind))


def write_once(folder: str | Path, seed: int, kind: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a folder that appears complete or not at all. Raises ModelError when it holds anything else."""
    folder = Path(folder)
    if _is_complete(folder, seed, kind):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _taken(folder, seed, kind)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        _write_json(unfinished / MANIFEST, {"kind": kind, "seed": seed, "sha256": _digests(unfinished)})
        os.replace(unfinished, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise ModelError(f"{folder}: the demo model cannot be written: {error.strerror or error}") from error
        if not _is_complete(folder, seed, kind):  # else another process finished the same model first
            raise _taken(folder, seed, kind) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _taken(folder: Path, seed: int, kind: str) -> ModelError:
    return ModelError(
        f"{folder}: already exists and is not a complete demo model of seed {seed} and kind {kind}; "
        "delete it or name another folder"
    )


def _is_complete(folder: Path, seed: int, kind: str) -> bool:
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(written == {"kind": kind, "seed": seed, "sha256": _digests(folder)})
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write_parts(folder: Path, seed: int, kind: ModelFamily) -> None:
    vocabulary = _vocabulary()
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights; the caller's stream must not notice
        unet, vae, text_encoders = demo_unet(kind), _vae(kind), _text_encoders(kind, vocabulary)
    for part, model in {"unet": unet, "vae": vae, **text_encoders}.items():
        draw_weights(model, part, seed)
    with torch.no_grad():
        _open_unet(unet)
        _open_encoder(vae.encoder, vae.config.scaling_factor)
        _open_decoder(vae.decoder, vae.config.scaling_factor)
        _set_identity(vae.quant_conv.weight, range(8), range(8))
        _set_identity(vae.post_quant_conv.weight, range(4), range(4))

    for part, model in (("unet", unet), ("vae", vae)):
        model.save_pretrained(folder / part, safe_serialization=True)
    for part, model in text_encoders.items():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / part)  # the model's own save_pretrained prints a bar
        save_file(model.state_dict(), folder / part / "model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), vocabulary)
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    ).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if kind == "sd":
        index["_class_name"] = "StableDiffusionPipeline"
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    else:
        index["_class_name"] = "StableDiffusionXLPipeline"
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index |= {"tokenizer_2": index["tokenizer"], "force_zeros_for_empty_prompt": True}
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# --- architecture -----------------------------------------------------------------------------------------------------


def demo_unet(kind: ModelFamily) -> Any:
    if kind == "sdxl":
        return UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            norm_num_groups=8,
            cross_attention_dim=sum(WIDTHS.values()),
            attention_head_dim=(2, 2, 4),  # as in SDXL, heads
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTHS["text_encoder_2"],
        )
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,  # as in SD 1.x, diffusers reads this as the number of heads
    )


def _vae(kind: ModelFamily) -> Any:
    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=256,
        scaling_factor=0.18215 if kind == "sd" else 0.13025,
    )


def _text_encoders(kind: ModelFamily, vocabulary: dict[str, int]) -> dict[str, Any]:
    configs = {
        part: CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=width,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
        for part, width in WIDTHS.items()
    }
    encoders = {"text_encoder": CLIPTextModel(configs["text_encoder"])}
    if kind == "sdxl":
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(configs["text_encoder_2"])
    return encoders


# --- weights ----------------------------------------------------------------------------------------------------------


def draw_weights(model: torch.nn.Module, part: str, seed: int) -> None:
    """Matrices uniform with variance 1 / fan-in, norms 1, biases 0.

    Drawn by numpy and uniform, since torch's normal draws differ between CPUs in the last bit.
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


# The identity path: a value travels as the channels x and -x, since silu(x) - silu(-x) = x carries it through the last
# nonlinearity, and a norm group that holds both has mean 0.


def _open_unet(unet: Any) -> None:
    """Let the noise prediction follow the latent: conv_in -> its skip to the last resnet -> conv_out."""
    pairs = _signed(4)
    unet.conv_in.weight[:8] = 0
    for latent, (plus, minus) in enumerate(pairs):
        unet.conv_in.weight[plus, latent, 1, 1], unet.conv_in.weight[minus, latent, 1, 1] = 1, -1
    last = unet.up_blocks[-1].resnets[-1].conv_shortcut.weight
    stream = len(last)  # (stream, stream + skip, 1, 1), both of equal width
    _set_identity(last, range(8), range(stream, stream + 8))
    unet.conv_out.weight *= 0.15
    for latent, (plus, minus) in enumerate(pairs):
        unet.conv_out.weight[latent, plus, 1, 1], unet.conv_out.weight[latent, minus, 1, 1] = _NOISE_GAIN, -_NOISE_GAIN


def _open_encoder(encoder: Any, scaling_factor: float) -> None:
    """Latents 0-2 follow red, green, blue averaged over 8 × 8 pixels; latent 3 is a random mixture."""
    encoder.conv_in.weight[:8] = 0
    for colour, (plus, minus) in enumerate(_signed(3)):
        encoder.conv_in.weight[plus, colour, 1, 1], encoder.conv_in.weight[minus, colour, 1, 1] = 1, -1
    encoder.conv_in.bias[6], encoder.conv_in.bias[7] = 1, -1  # a constant, lest the norm undo the picture's contrast
    _quiet_residuals(encoder)
    for block in encoder.down_blocks[:-1]:
        taps = torch.zeros(3, 3)
        taps[:2, :2] = 0.25  # diffusers pads right and below: these four are the pixels that become one
        _set_kernel(block.downsamplers[0].conv.weight, taps)
    weight = encoder.conv_out.weight  # (4 means + 4 log-variances, 16, 3, 3)
    weight[:3], weight[4:] = 0, 0
    for latent, (plus, minus) in enumerate(_signed(3)):
        weight[latent, plus, 1, 1], weight[latent, minus, 1, 1] = 1, -1
    weight[:4] /= scaling_factor
    encoder.conv_out.bias[4:] = -10


def _open_decoder(decoder: Any, scaling_factor: float) -> None:
    """Colours come back from latents 0-2, interpolated smoothly."""
    decoder.conv_in.weight[:8] = 0
    for latent, (plus, minus) in enumerate(_signed(3)):
        decoder.conv_in.weight[plus, latent, 1, 1] = scaling_factor
        decoder.conv_in.weight[minus, latent, 1, 1] = -scaling_factor
    decoder.conv_in.weight[8:] *= scaling_factor
    decoder.conv_in.bias[6], decoder.conv_in.bias[7] = 1, -1
    _quiet_residuals(decoder)
    smooth = torch.tensor([1.0, 2.0, 1.0]) / 4
    for block in decoder.up_blocks[:-1]:
        _set_kernel(block.upsamplers[0].conv.weight, torch.outer(smooth, smooth))
    decoder.conv_out.weight *= 0.05
    for colour, (plus, minus) in enumerate(_signed(3)):
        decoder.conv_out.weight[colour, plus, 1, 1], decoder.conv_out.weight[colour, minus, 1, 1] = 0.6, -0.6


def _signed(count: int) -> list[tuple[int, int]]:
    return [(2 * i, 2 * i + 1) for i in range(count)]


def _quiet_residuals(part: Any) -> None:
    for name, parameter in part.named_parameters():
        if name.endswith(_RESIDUAL_OUTPUTS):
            parameter[:8] *= 0.2


def _set_identity(weight: torch.Tensor, outputs: range, inputs: range) -> None:
    weight[list(outputs)] = 0
    weight[list(outputs), list(inputs), 0, 0] = 1


def _set_kernel(weight: torch.Tensor, taps: torch.Tensor) -> None:
    """Channels 0-7 each filtered alone; the others stay random."""
    weight[:8] = 0
    for channel in range(8):
        weight[channel, channel] = taps


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _vocabulary() -> dict[str, int]:
    """CLIP's layout without merges: 256 bytes, the same ending a word, start and end of text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def _write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    folder.mkdir()
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True},
    )
