"""Which files a model is: a diffusers folder as it stands, the one of this package, or a hub repository's. Torch-free.

Only the files named here are downloaded, digested and loaded: plain safetensors weights and their configuration, never
a pickle, a variant (`*.fp16.*`, `*.non_ema.*`) or a checkpoint in the repository's root (`single_file` loads those).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from stylemill.config.model import EMBEDDED
from stylemill.errors import ModelError
from stylemill.models.architecture import check_architecture, explain_unsupported_layout, is_sdxl, read_config
from stylemill.models.safetensors_file import read_tensor_shapes

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_WEIGHTS_OF_SDXL = {"text_encoder_2": "model"}  # besides those
_Required = dict[str, tuple[str, ...]]  # any one of the patterns of an item satisfies it


def _required(weights: dict[str, str], tokenizer: str) -> _Required:
    """Configuration, weights (one file, or numbered pieces with an index) and tokenizer."""
    return {
        **{f"{part}/config.json": (f"{part}/config.json",) for part in weights},
        **{
            f"{part}/{stem}.safetensors": (f"{part}/{stem}.safetensors", f"{part}/{stem}-?????-of-?????.safetensors")
            for part, stem in weights.items()
        },
        **{
            f"{tokenizer}/{name}": (f"{tokenizer}/{name}", f"{tokenizer}/tokenizer.json")
            for name in ("vocab.json", "merges.txt")
        },
    }


_REQUIRED = {
    **_required(_WEIGHTS, "tokenizer"),
    "scheduler/scheduler_config.json": ("scheduler/scheduler_config.json",),
}
_REQUIRED_OF_SDXL = _required(_WEIGHTS_OF_SDXL, "tokenizer_2")
PATTERNS = [
    "model_index.json",
    *(pattern for patterns in (*_REQUIRED.values(), *_REQUIRED_OF_SDXL.values()) for pattern in patterns),
    *(f"{part}/{stem}.safetensors.index.json" for part, stem in (_WEIGHTS | _WEIGHTS_OF_SDXL).items()),
    "tokenizer/*.json",
    "tokenizer_2/*.json",
]


@dataclass(frozen=True)
class ModelFileSet:
    """What a folder is called in messages, and the files that are wanted of it."""

    name: str
    required: Mapping[str, tuple[str, ...]]
    patterns: list[str]
    required_of_sdxl: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _without_weights(names: Iterable[str]) -> list[str]:
    return [name for name in names if ".safetensors" not in name]


MODEL = ModelFileSet("model", _REQUIRED, PATTERNS, _REQUIRED_OF_SDXL)
CONFIGURATION = ModelFileSet(  # of a model whose weights lie elsewhere
    "model.config",
    {name: _REQUIRED[name] for name in _without_weights(_REQUIRED)},
    _without_weights(PATTERNS),
    {name: _REQUIRED_OF_SDXL[name] for name in _without_weights(_REQUIRED_OF_SDXL)},
)
_REQUIRED_OF_CONTROLNET: _Required = {
    "config.json": ("config.json",),
    "diffusion_pytorch_model.safetensors": (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model-?????-of-?????.safetensors",
    ),
}
CONTROLNET = ModelFileSet(
    "controlnet",
    _REQUIRED_OF_CONTROLNET,
    [
        *(pattern for patterns in _REQUIRED_OF_CONTROLNET.values() for pattern in patterns),
        "diffusion_pytorch_model.safetensors.index.json",
    ],
)
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class ResolvedModel:
    """A model pinned to its content.

    `folder` is None while a hub model is not on this machine. A folder is pinned by `digests` (relative path ->
    SHA-256), a hub model by its `commit`. Of a single-file `checkpoint`, `folder` holds the configuration, and
    `config` says where that comes from, with the commit if it is the hub.
    """

    name: str
    folder: Path | None
    commit: str | None
    digests: dict[str, str]
    checkpoint: Path | None = None
    config: str | None = None

    @property
    def pins(self) -> dict[str, str]:
        """Keys of a job's model by which every worker loads these very files, wherever the hub has moved since."""
        if self.config is not None:
            return {"config": self.config}
        return {} if self.commit is None else {"revision": self.commit}

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


def resolve_model(name: str, revision: str | None = None, kind: ModelFileSet = MODEL) -> ResolvedModel:
    """Pin a folder by digests or a hub id by its commit, without downloading weights.

    Raises ModelError: the folder lacks a part or holds only pickled weights; the hub knows no such model, or cannot be
    reached and the model is not in its local cache.
    """
    folder = _local(name, kind)
    if folder.is_dir():
        _check_folder(folder, None, kind)
        return ResolvedModel(
            name, folder, None, {path: file_digest(folder / path) for path in model_paths(folder, kind)}
        )
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{kind.name} {name!r}: no such folder; name a hub id, or {EMBEDDED!r}, the embedded model")
    commit = _hub_commit(name, revision, kind)
    return ResolvedModel(name, _cached(name, commit, kind), commit, {})


def fetch_model_folder(name: str, revision: str | None = None, kind: ModelFileSet = MODEL) -> Path:
    """The local folder of a model, downloaded when it is a hub id that this machine has not yet.

    Give the resolved commit as `revision`: then what is cached is used with no network. Raises ModelError.
    """
    folder = _local(name, kind)
    if folder.is_dir():
        _check_folder(folder, None, kind)
        return folder
    cached = _cached(name, revision, kind)
    if cached is not None:
        return cached
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=kind.patterns))
    except Exception as error:  # whatever the hub's HTTP client raises
        _refuse(name, revision, error, kind)
    _check_folder(folder, name, kind)
    return folder


def model_paths(folder: Path, kind: ModelFileSet = MODEL) -> list[str]:
    """The files of `folder` that belong to the model, as sorted relative paths."""
    paths = (path.relative_to(folder).as_posix() for path in _files(folder))
    return sorted(path for path in paths if any(fnmatchcase(path, pattern) for pattern in kind.patterns))


# --- folders ----------------------------------------------------------------------------------------------------------


def _local(name: str, kind: ModelFileSet) -> Path:
    """The folder that a name stands for, if there is one."""
    if name == EMBEDDED and kind is MODEL:
        return Path(__file__).parent.parent / "demo"
    return Path(name).expanduser()


def _files(folder: Path) -> Iterator[Path]:
    """Files of the folder and of the folders directly in it: a model has no others."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from (inner for inner in path.iterdir() if inner.is_file())
        elif path.is_file():
            yield path


def _missing(folder: Path, kind: ModelFileSet) -> list[str]:
    paths, required = model_paths(folder, kind), kind.required
    if kind.required_of_sdxl and (unet := folder / "unet" / "config.json").is_file() and is_sdxl(read_config(unet)):
        required = {**required, **kind.required_of_sdxl}
    return [
        item
        for item, patterns in required.items()
        if not any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)
    ]


def _check_folder(folder: Path, name: str | None, kind: ModelFileSet) -> None:
    try:
        missing = _missing(folder, kind)
        if missing:
            raise ModelError(f"{kind.name} {name or str(folder)!r}: {_advice(folder, missing)}")
        if kind in (MODEL, CONFIGURATION):
            check_architecture(folder)
        for path in model_paths(folder, kind):
            if path.endswith(".safetensors"):
                read_tensor_shapes(folder / path)  # a truncated file is better found now than by every worker
    except OSError as error:
        raise ModelError(f"{kind.name} {name or str(folder)!r}: cannot be read: {error}") from error


def _advice(folder: Path, missing: list[str]) -> str:
    """What is wrong with an incomplete model folder, and the way out."""
    files = list(_files(folder))
    if reason := explain_unsupported_layout([path.relative_to(folder).as_posix() for path in files]):
        return reason
    parts = {item.split("/")[0] for item in missing if item.endswith(".safetensors")}
    pickled = [path for path in files if path.suffix in _PICKLES and path.parent.name in parts]
    if "config.json" in missing or "diffusion_pytorch_model.safetensors" in missing:
        return f"lacks {', '.join(missing)}; a ControlNet folder is what ControlNetModel.save_pretrained writes"
    if pickled:
        return (
            f"its weights are pickled only ({pickled[0].relative_to(folder)}), which can run code when opened; if you "
            'trust them, convert once: python -c "from diffusers import DiffusionPipeline as P; P.from_pretrained('
            f"'{folder}', use_safetensors=False).save_pretrained('NEW_FOLDER')\""
        )
    single = [path for path in files if path.parent == folder and path.suffix in (*_PICKLES, ".safetensors")]
    if single and "unet" in parts:
        return (
            f"holds a single-file checkpoint ({single[0].name}), not the parts of a model; name that file, or convert "
            'once: python -c "from diffusers import StableDiffusionPipeline as P; P.from_single_file('
            f"'{single[0]}').save_pretrained('NEW_FOLDER')\""
        )
    variants = [path for path in files if fnmatchcase(path.name, "*.*.safetensors") and path.parent.name in parts]
    if variants:
        plain = f"{variants[0].name.split('.')[0]}.safetensors"
        return f"holds only a variant of its weights ({variants[0].relative_to(folder)}); rename it to {plain}"
    return f"lacks {', '.join(missing)}; a model folder is what diffusers' save_pretrained writes"


def file_digest(path: Path) -> str:
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


def _cached(name: str, revision: str | None, kind: ModelFileSet) -> Path | None:
    """The complete local snapshot of `revision`, if there is one. No network."""
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=kind.patterns, local_files_only=True
        )
    except Exception:  # absent, incomplete, or no valid id: the caller goes on to ask the hub, which says why
        return None
    folder = Path(snapshot)
    return None if _missing(folder, kind) else folder


def _hub_commit(name: str, revision: str | None, kind: ModelFileSet) -> str:
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision)
    except Exception as error:  # whatever the hub's HTTP client raises
        if not _is_final(error):
            cached = _cached(name, revision, kind)
            if cached is not None:
                return cached.name  # snapshots lie in folders named by their commit
        _refuse(name, revision, error, kind)
    files = [file.rfilename for file in getattr(info, "siblings", None) or []]
    if kind is MODEL and (reason := explain_unsupported_layout(files)):  # known before gigabytes are downloaded
        raise ModelError(f"{kind.name} {name!r}: {reason}")
    if not info.sha:
        raise ModelError(f"{kind.name} {name!r}: the hub names no commit for it; give one as model.revision")
    return str(info.sha)


def _is_final(error: Exception) -> bool:
    """Whether the hub has answered that there is no such model for us, so that no cache should stand in for it."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError))


def _refuse(name: str, revision: str | None, error: Exception, kind: ModelFileSet) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    what = f"{kind.name} {name!r}"
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
