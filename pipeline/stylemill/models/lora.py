"""Which file a LoRA is: one given by its path, or one in a folder or hub repository. Torch-free."""

from __future__ import annotations

from pathlib import Path

from stylemill.config.model import Lora
from stylemill.errors import ModelError
from stylemill.models.hub import ModelFileSet, ResolvedModel, fetch_model_folder, resolve_model

DEFAULT_FILE = "pytorch_lora_weights.safetensors"  # as diffusers' save_lora_weights names it


def resolve_lora(lora: Lora) -> ResolvedModel:
    """Pin a LoRA by its digest, or by the hub's commit. Raises ModelError when there is none."""
    place, file = _where(lora)
    return resolve_model(place, lora.revision, _kind(file))


def fetch_lora_file(lora: Lora) -> Path:
    """The LoRA's file on this machine, downloaded when it is not here yet. Raises ModelError."""
    place, file = _where(lora)
    return fetch_model_folder(place, lora.revision, _kind(file)) / file


def _kind(file: str) -> ModelFileSet:
    return ModelFileSet("lora", {file: (file,)}, [file])


def _where(lora: Lora) -> tuple[str, str]:
    path = Path(lora.name).expanduser()
    if path.is_file() or (path.is_dir() and lora.file is None and not (path / DEFAULT_FILE).is_file()):
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if len(files) == 1 and files[0].suffix == ".safetensors":
            return str(files[0].parent), files[0].name
        if path.is_file():
            raise ModelError(f"lora {lora.name!r}: not a .safetensors file; other formats can run code when opened")
        names = ", ".join(file.name for file in files) or "none"
        raise ModelError(f"lora {lora.name!r}: name one of its .safetensors files as 'file'; it has: {names}")
    if not path.is_dir() and (path.is_absolute() or lora.name.startswith((".", "~")) or lora.name.count("/") > 1):
        raise ModelError(f"lora {lora.name!r}: no such file or folder")
    file = lora.file or DEFAULT_FILE
    if path.is_dir() and not (path / file).is_file():
        raise ModelError(f"lora {lora.name!r}: has no file {file}")
    return lora.name, file
