"""Which files a model is: a diffusers folder as it stands, or a snapshot of a hub repository. Torch-free.

Only the files named here are downloaded, digested and loaded: plain safetensors weights and their configuration, never
a pickle, a variant (`*.fp16.*`, `*.non_ema.*`) or a checkpoint in the repository's root.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from stylemill.errors import ModelError

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# Any one of the patterns of an item satisfies it; weights may be one file or numbered pieces with an index.
_REQUIRED: dict[str, tuple[str, ...]] = {
    **{f"{part}/config.json": (f"{part}/config.json",) for part in _WEIGHTS},
    **{
        f"{part}/{stem}.safetensors": (f"{part}/{stem}.safetensors", f"{part}/{stem}-?????-of-?????.safetensors")
        for part, stem in _WEIGHTS.items()
    },
    "tokenizer/vocab.json": ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    "tokenizer/merges.txt": ("tokenizer/merges.txt", "tokenizer/tokenizer.json"),
    "scheduler/scheduler_config.json": ("scheduler/scheduler_config.json",),
}
PATTERNS = [
    "model_index.json",
    *(pattern for patterns in _REQUIRED.values() for pattern in patterns),
    *(f"{part}/{stem}.safetensors.index.json" for part, stem in _WEIGHTS.items()),
    "tokenizer/*.json",
]
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class ModelFiles:
    """A model pinned to its content.

    `folder` is None while a hub model is not on this machine. A folder is pinned by `digests` (relative path ->
    SHA-256), a hub model by its `commit`.
    """

    name: str
    folder: Path | None
    commit: str | None
    digests: dict[str, str]

    def identity(self) -> dict[str, str]:
        """What the fingerprint of a run keeps: two models of equal identity give equal images, wherever they lie."""
        if self.commit is not None:
            return {"model.name": self.name, "model.commit": self.commit}
        return {f"model.{file}": digest for file, digest in self.digests.items()}

    @property
    def label(self) -> str:
        """Name and content in one short string; the same wherever a model folder lies."""
        if self.commit is not None:
            return f"{self.name}@{self.commit}"
        content = hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()
        return f"{Path(self.name).name}@{content[:12]}"


def resolve_model(name: str, revision: str | None = None) -> ModelFiles:
    """Pin a folder by digests or a hub id by its commit, without downloading weights.

    Raises ModelError: the folder lacks a part or holds only pickled weights; the hub knows no such model, or cannot be
    reached and the model is not in its local cache.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return ModelFiles(name, folder, None, {path: _digest(folder / path) for path in model_paths(folder)})
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name!r}: no such folder; write one with 'stylemill demo-model', or name a hub id")
    commit = _hub_commit(name, revision)
    return ModelFiles(name, _cached(name, commit), commit, {})


def fetch_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded when it is a hub id that this machine has not yet.

    Give the resolved commit as `revision`: then what is cached is used with no network. Raises ModelError.
    """
    model = Path(name).expanduser()
    if model.is_dir():
        _check_folder(model)
        return model
    cached = _cached(name, revision)
    if cached is not None:
        return cached
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # whatever the hub's HTTP client raises
        _refuse(name, revision, error)
    _check_folder(folder, name)
    return folder


def refuse_other_architectures(
    folder: Path, unet: Mapping[str, Any], text_encoders: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ModelError unless these configurations are those of a text-to-image model shaped like SD 1.x or SDXL."""
    channels = unet.get("in_channels", 4)
    if channels != unet.get("out_channels", 4):
        raise ModelError(f"{folder}: the UNet takes {channels} channels, as inpainting models do; use the base model")
    reads, gives = unet.get("cross_attention_dim"), sum(encoder.get("hidden_size", 0) for encoder in text_encoders)
    if reads is not None and gives and reads != gives:
        raise ModelError(
            f"{folder}: the UNet reads text of {reads} channels, the text encoder gives {gives}; "
            "are the parts of one model?"
        )


def model_paths(folder: Path) -> list[str]:
    """The files of `folder` that belong to the model, as sorted relative paths."""
    paths = (path.relative_to(folder).as_posix() for path in _files(folder))
    return sorted(path for path in paths if any(fnmatchcase(path, pattern) for pattern in PATTERNS))


def count_parameters(path: Path) -> int:
    """Number of scalars in a safetensors file, from its header alone. Raises ModelError when the file is cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        tensors = [entry for key, entry in header.items() if key != "__metadata__"]
        if path.stat().st_size != 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0):
            raise ValueError("size differs from the header's")
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: truncated or not safetensors ({error}); copy or download it again") from error


# --- folders ----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[Path]:
    """Files of the folder and of the folders directly in it: a model has no others."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from (inner for inner in path.iterdir() if inner.is_file())
        elif path.is_file():
            yield path


def _missing(folder: Path) -> list[str]:
    paths = model_paths(folder)
    return [
        item
        for item, patterns in _REQUIRED.items()
        if not any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)
    ]


def _check_folder(folder: Path, name: str | None = None) -> None:
    try:
        missing = _missing(folder)
        if missing:
            raise ModelError(f"model {name or str(folder)!r}: {_advice(folder, missing)}")
        for path in model_paths(folder):
            if path.endswith(".safetensors"):
                count_parameters(folder / path)  # a truncated file is better found now than by every worker
    except OSError as error:
        raise ModelError(f"model {name or str(folder)!r}: cannot be read: {error}") from error


def _advice(folder: Path, missing: list[str]) -> str:
    """What is wrong with an incomplete model folder, and the way out."""
    files = list(_files(folder))
    parts = {item.split("/")[0] for item in missing if item.endswith(".safetensors")}
    pickled = [path for path in files if path.suffix in _PICKLES and path.parent.name in parts]
    if pickled:
        return (
            f"its weights are pickled only ({pickled[0].relative_to(folder)}), which can run code when opened; if you "
            'trust them, convert once: python -c "from diffusers import DiffusionPipeline as P; P.from_pretrained('
            f"'{folder}', use_safetensors=False).save_pretrained('NEW_FOLDER')\""
        )
    single = [path for path in files if path.parent == folder and path.suffix in (*_PICKLES, ".safetensors")]
    if single and "unet" in parts:
        return (
            f"holds a single-file checkpoint ({single[0].name}), not the parts of a model; convert once: python -c "
            '"from diffusers import StableDiffusionPipeline as P; P.from_single_file('
            f"'{single[0]}').save_pretrained('NEW_FOLDER')\""
        )
    variants = [path for path in files if fnmatchcase(path.name, "*.*.safetensors") and path.parent.name in parts]
    if variants:
        plain = f"{variants[0].name.split('.')[0]}.safetensors"
        return f"holds only a variant of its weights ({variants[0].relative_to(folder)}); rename it to {plain}"
    return f"lacks {', '.join(missing)}; a model folder is what diffusers' save_pretrained writes"


def _digest(path: Path) -> str:
    """SHA-256 of a file, remembered in the user's cache by path, size and time of change: weights are gigabytes."""
    try:
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
        remembered = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stylemill" / "digests" / key
        try:
            digest = remembered.read_text(encoding="ascii")
            if len(digest) == 64:
                return digest
        except (OSError, ValueError):
            pass
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        unfinished = remembered.with_name(f"{key}.{os.getpid()}")
        unfinished.write_text(digest, encoding="ascii")
        os.replace(unfinished, remembered)
    except OSError:
        pass  # a full or read-only home costs time at the next start, nothing else
    return digest


# --- the hub ----------------------------------------------------------------------------------------------------------


def _cached(name: str, revision: str | None) -> Path | None:
    """The complete local snapshot of `revision`, if there is one. No network."""
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=PATTERNS, local_files_only=True
        )
    except Exception:  # absent, incomplete, or no valid id: the caller goes on to ask the hub, which says why
        return None
    folder = Path(snapshot)
    return None if _missing(folder) else folder


def _hub_commit(name: str, revision: str | None) -> str:
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision).sha
    except Exception as error:  # whatever the hub's HTTP client raises
        if not _is_final(error):
            cached = _cached(name, revision)
            if cached is not None:
                return cached.name  # snapshots lie in folders named by their commit
        _refuse(name, revision, error)
    if not commit:
        raise ModelError(f"model {name!r}: the hub names no commit for it; give one as model.revision")
    return commit


def _is_final(error: Exception) -> bool:
    """Whether the hub has answered that there is no such model for us, so that no cache should stand in for it."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError))


def _refuse(name: str, revision: str | None, error: Exception) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    what = f"model {name!r}"
    if isinstance(error, GatedRepoError):
        message = f"{what}: is gated; accept its terms on huggingface.co and log in with 'hf auth login' or HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        message = f"{what}: has no revision {revision!r}; see its branches, tags and commits on huggingface.co"
    elif _is_final(error):
        message = f"{what}: neither a folder here nor a model that the hub shows you; check the name, or set HF_TOKEN"
    else:
        reason = " ".join(str(error).split())[:200]
        message = (
            f"{what}: no folder of this name, the hub cannot be reached ({type(error).__name__}: {reason}) and its "
            "cache on this machine lacks the model; go online once without HF_HUB_OFFLINE, or name a local folder"
        )
    raise ModelError(message) from error
