"""Which file a LoRA is: named by its path, or found in a folder or hub repository. Torch-free."""

from __future__ import annotations

from pathlib import Path

from stylemill.config.model import Lora
from stylemill.errors import ModelError
from stylemill.models.file_sets import lora_file_set
from stylemill.models.resolve import ResolvedModel, fetch_model_folder, resolve_model

DEFAULT_FILE = "pytorch_lora_weights.safetensors"  # diffusers' save_lora_weights writes this name


def resolve_lora(lora: Lora) -> ResolvedModel:
    """Resolve a LoRA to its digest, or to the hub's commit. Raises ModelError when it does not exist."""
    folder, file = _split(lora)
    return resolve_model(folder, lora.revision, lora_file_set(file))


def fetch_lora_file(lora: Lora) -> Path:
    """The LoRA's local file, downloaded if it is not on this machine yet. Raises ModelError when it does not exist."""
    folder, file = _split(lora)
    return fetch_model_folder(folder, lora.revision, lora_file_set(file)) / file


def _split(lora: Lora) -> tuple[str, str]:
    """The folder or hub id of a LoRA, and the name of its file there."""
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
