"""Model folders on this machine: which files belong to the model, what is missing or unsupported, and file digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from stylemill.errors import ModelError
from stylemill.models.architecture import check_architecture, explain_unsupported_layout, is_sdxl, read_config
from stylemill.models.file_sets import CONFIGURATION, MODEL, ModelFileSet
from stylemill.models.safetensors_file import read_tensor_shapes

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


def model_paths(folder: Path, file_set: ModelFileSet = MODEL) -> list[str]:
    """The files of `folder` that belong to the model, as sorted relative paths."""
    paths = (path.relative_to(folder).as_posix() for path in _files(folder))
    patterns = file_set.patterns
    return sorted(path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns))


def missing_files(folder: Path, file_set: ModelFileSet) -> list[str]:
    """The required files that `folder` lacks; empty when it is complete."""
    paths, required = model_paths(folder, file_set), file_set.required
    if (
        file_set.required_for_sdxl
        and (unet := folder / "unet" / "config.json").is_file()
        and is_sdxl(read_config(unet))
    ):
        required += file_set.required_for_sdxl
    return [
        alternatives[0]
        for alternatives in required
        if not any(fnmatchcase(path, pattern) for path in paths for pattern in alternatives)
    ]


def check_folder(folder: Path, file_set: ModelFileSet, name: str | None = None) -> None:
    """Check that a model folder is complete, supported and not truncated. Reads no weights.

    `name` stands for the folder in error messages. Raises ModelError, which says what to do.
    """
    label = f"{file_set.name} {name or str(folder)!r}"
    try:
        missing = missing_files(folder, file_set)
        if missing:
            raise ModelError(f"{label}: {_explain_missing(folder, missing, file_set)}")
        if file_set in (MODEL, CONFIGURATION):
            check_architecture(folder)
        for path in model_paths(folder, file_set):
            if path.endswith(".safetensors"):
                read_tensor_shapes(folder / path)  # so that the plan fails on a truncated file, not every worker
    except OSError as error:
        raise ModelError(f"{label}: cannot be read: {error}") from error


def _files(folder: Path) -> Iterator[Path]:
    """Files of the folder and of its subfolders. Models have no deeper levels."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from (inner for inner in path.iterdir() if inner.is_file())
        elif path.is_file():
            yield path


def _explain_missing(folder: Path, missing: Sequence[str], file_set: ModelFileSet) -> str:
    """What is wrong with an incomplete model folder, and what to do about it."""
    files = list(_files(folder))
    if reason := explain_unsupported_layout([path.relative_to(folder).as_posix() for path in files]):
        return reason
    components = {path.split("/")[0] for path in missing if path.endswith(".safetensors")}
    pickled = [path for path in files if path.suffix in _PICKLE_SUFFIXES and path.parent.name in components]
    if pickled:
        return (
            f"its weights are pickled only ({pickled[0].relative_to(folder)}), which can run code when opened; if you "
            'trust them, convert once: python -c "from diffusers import DiffusionPipeline as P; P.from_pretrained('
            f"'{folder}', use_safetensors=False).save_pretrained('NEW_FOLDER')\""
        )
    in_root = [path for path in files if path.parent == folder and path.suffix in (*_PICKLE_SUFFIXES, ".safetensors")]
    if in_root and "unet" in components:
        return (
            f"contains a single-file checkpoint ({in_root[0].name}), not a diffusers folder; name that file, or "
            'convert it once: python -c "from diffusers import StableDiffusionPipeline as P; P.from_single_file('
            f"'{in_root[0]}').save_pretrained('NEW_FOLDER')\""
        )
    variants = [path for path in files if fnmatchcase(path.name, "*.*.safetensors") and path.parent.name in components]
    if variants:
        plain = f"{variants[0].name.split('.')[0]}.safetensors"
        return f"contains only a variant of its weights ({variants[0].relative_to(folder)}); rename it to {plain}"
    return f"lacks {', '.join(missing)}; {file_set.advice}"


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, hex. Raises ModelError when the file cannot be read.

    Weights are gigabytes, so the user's cache folder keeps digests by path, size and modification time.
    """
    try:
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
        cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stylemill" / "digests" / key
        try:
            digest = cached.read_text(encoding="ascii")
            if len(digest) == 64:
                return digest
        except (OSError, ValueError):
            pass
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_name(f"{key}.{os.getpid()}")
        unfinished.write_text(digest, encoding="ascii")
        os.replace(unfinished, cached)
    except OSError:
        pass  # the cache only saves time; its folder may be full or read-only
    return digest
