"""Small untrained models with the architecture of Stable Diffusion 1.x and SDXL, for runs without a download.

They have the real block types and 16 or 70 self-attention layers, in the diffusers folder format. The weights are
random except for an identity path: the VAE averages 8 × 8 pixels and interpolates them back, and the UNet predicts its
own normalised input as noise. So images come out blurred but recognisable, and latents stay of about unit size.
The models are not trained: they show how stylemill works, not what attention distillation looks like.
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

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stylemill.demo.untrained_weights import add_identity_path, draw_weights
from stylemill.errors import ModelError

TOKENS = 77  # CLIP's context length
WIDTHS = {"text_encoder": 32, "text_encoder_2": 16}  # of the hidden states; only SDXL has the second
# Has the kind, the seed and the digest of every other file; a folder whose files have these digests is complete.
MANIFEST = "demo.json"

ModelFamily = Literal["sd", "sdxl"]


def write_demo_model(folder: str | Path, seed: int = 0, kind: ModelFamily = "sd") -> Path:
    """Write the demo model of `kind` and `seed` to `folder` and return that; the weights are equal on every machine.

    A folder with this complete model is not changed. Raises ModelError if the folder has other content.
    """
    return write_once(folder, seed, kind, lambda unfinished: _write_parts(unfinished, seed, kind))


def write_once(folder: str | Path, seed: int, kind: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a new folder, which gets its name only when it is complete.

    A complete folder of `seed` and `kind` is not changed. Raises ModelError if the folder has other content.
    """
    folder = Path(folder)
    if _is_complete(folder, seed, kind):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _other_content(folder, seed, kind)
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
        if not _is_complete(folder, seed, kind):  # otherwise another process wrote the same model first
            raise _other_content(folder, seed, kind) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _other_content(folder: Path, seed: int, kind: str) -> ModelError:
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
    with torch.random.fork_rng(devices=[]):  # constructors draw weights; the caller's generator stays as it was
        unet, vae, text_encoders = demo_unet(kind), _vae(kind), _text_encoders(kind, vocabulary)
    for part, model in {"unet": unet, "vae": vae, **text_encoders}.items():
        draw_weights(model, part, seed)
    add_identity_path(unet, vae)
    for part, model in (("unet", unet), ("vae", vae)):
        model.save_pretrained(folder / part, safe_serialization=True)
    for part, model in text_encoders.items():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / part)  # the model's own save_pretrained prints a progress bar
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
            attention_head_dim=(2, 2, 4),  # the number of heads, as in SDXL
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
        attention_head_dim=2,  # diffusers takes this as the number of heads, as for SD 1.x
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


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _vocabulary() -> dict[str, int]:
    """A vocabulary like CLIP's without merges: 256 bytes, 256 bytes at the end of a word, start and end of text."""
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
