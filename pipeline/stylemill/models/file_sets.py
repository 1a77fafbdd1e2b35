"""Which files make up a model, a ControlNet or the configuration of a single-file checkpoint.

Only these files are downloaded, hashed and loaded: safetensors weights, configuration and tokenizers, in the layout
that diffusers' `save_pretrained` writes. Pickled weights, variants (`*.fp16.*`, `*.non_ema.*`) and checkpoints in the
root of a repository are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Alternatives = tuple[str, ...]  # patterns, one of which must match a file; error messages show the first


@dataclass(frozen=True)
class ModelFileSet:
    """The files of one kind of model, as patterns relative to its folder."""

    name: str  # in error messages
    required: tuple[Alternatives, ...]
    advice: str  # how to get a complete folder; ends the error message about missing files
    required_for_sdxl: tuple[Alternatives, ...] = ()  # in addition
    optional: Alternatives = ()

    @property
    def patterns(self) -> list[str]:
        """Patterns of all files, required or not."""
        return [pattern for group in (*self.required, *self.required_for_sdxl, self.optional) for pattern in group]


def _component(prefix: str, stem: str) -> tuple[Alternatives, ...]:
    """Configuration and weights of one component. Large weights are split into numbered files."""
    return (
        (f"{prefix}config.json",),
        (f"{prefix}{stem}.safetensors", f"{prefix}{stem}-?????-of-?????.safetensors"),
    )


def _tokenizer(prefix: str) -> tuple[Alternatives, ...]:
    return tuple((f"{prefix}{name}", f"{prefix}tokenizer.json") for name in ("vocab.json", "merges.txt"))


def _without_weights(groups: Iterable[Alternatives]) -> tuple[Alternatives, ...]:
    return tuple(group for group in groups if not any(".safetensors" in pattern for pattern in group))


_UNET_STEM, _TEXT_STEM = "diffusion_pytorch_model", "model"
_SD = (
    *_component("unet/", _UNET_STEM),
    *_component("vae/", _UNET_STEM),
    *_component("text_encoder/", _TEXT_STEM),
    *_tokenizer("tokenizer/"),
    ("scheduler/scheduler_config.json",),
)
_SDXL = (*_component("text_encoder_2/", _TEXT_STEM), *_tokenizer("tokenizer_2/"))
_OPTIONAL = ("model_index.json", "tokenizer/*.json", "tokenizer_2/*.json")
_SAVE_PRETRAINED = "a model folder is what diffusers' save_pretrained writes"

MODEL = ModelFileSet(
    "model",
    _SD,
    _SAVE_PRETRAINED,
    _SDXL,
    (
        *_OPTIONAL,
        f"unet/{_UNET_STEM}.safetensors.index.json",
        f"vae/{_UNET_STEM}.safetensors.index.json",
        f"text_encoder/{_TEXT_STEM}.safetensors.index.json",
        f"text_encoder_2/{_TEXT_STEM}.safetensors.index.json",
    ),
)
CONFIGURATION = ModelFileSet(  # of a single-file checkpoint, which contains the weights
    "model.config", _without_weights(_SD), _SAVE_PRETRAINED, _without_weights(_SDXL), _OPTIONAL
)
CONTROLNET = ModelFileSet(
    "controlnet",
    _component("", _UNET_STEM),
    "a ControlNet folder is what ControlNetModel.save_pretrained writes",
    optional=(f"{_UNET_STEM}.safetensors.index.json",),
)


def lora_file_set(file: str) -> ModelFileSet:
    """The file set of a LoRA, which is the one file that the job names."""
    return ModelFileSet("lora", ((file,),), "name one of its .safetensors files as 'file'")
