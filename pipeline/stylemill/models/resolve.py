"""From the name of a model to its content: a folder, the embedded model or a hub repository. Torch-free."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from stylemill.config.paths import EMBEDDED
from stylemill.errors import ModelError
from stylemill.models.file_sets import CONTROLNET, MODEL, ModelFileSet
from stylemill.models.folder import check_folder, file_digest, model_paths
from stylemill.models.hub import download, find_cached, find_commit


@dataclass(frozen=True)
class ResolvedModel:
    """A model, ControlNet or LoRA, identified by its content.

    `digests` (relative path -> SHA-256) identify a folder, `commit` a hub model. `folder` is None while a hub model is
    not on this machine. For a single-file `checkpoint`, `folder` has the configuration, and `config` names its source:
    a folder or "id@commit".
    """

    name: str
    folder: Path | None
    commit: str | None
    digests: dict[str, str]
    checkpoint: Path | None = None
    config: str | None = None

    @property
    def pins(self) -> dict[str, str]:
        """Model settings with which every worker loads this content, even if the hub changes."""
        if self.config is not None:
            return {"config": self.config}
        return {} if self.commit is None else {"revision": self.commit}

    def identity(self) -> dict[str, str]:
        """The model's part of the fingerprint: equal for models of equal content, wherever their folders are."""
        if self.commit is not None:
            return {"model.name": self.name, "model.commit": self.commit}
        return {f"model.{file}": digest for file, digest in self.digests.items()}

    @property
    def label(self) -> str:
        """Name and content in a short string. It does not depend on where a folder is."""
        if self.commit is not None:
            return f"{self.name}@{self.commit}"
        content = hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()
        return f"{Path(self.name).name}@{content[:12]}"


def resolve_model(name: str, revision: str | None = None, file_set: ModelFileSet = MODEL) -> ResolvedModel:
    """Resolve a folder to the digests of its files, or a hub id to a commit. Downloads no weights.

    Raises ModelError when the folder is incomplete, has only pickled weights or is not supported; or when the hub does
    not have the model, or cannot be reached and the local cache does not have it.
    """
    folder = _local_folder(name, file_set)
    if folder.is_dir():
        check_folder(folder, file_set)
        digests = {path: file_digest(folder / path) for path in model_paths(folder, file_set)}
        return ResolvedModel(name, folder, None, digests)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{file_set.name} {name!r}: no such folder; {_what_to_name(folder, file_set)}")
    commit = find_commit(name, revision, file_set)
    return ResolvedModel(name, find_cached(name, commit, file_set), commit, {})


def fetch_model_folder(name: str, revision: str | None = None, file_set: ModelFileSet = MODEL) -> Path:
    """The local folder of a model. A hub model that is not on this machine yet is downloaded.

    With a resolved commit as `revision`, a cached model is used without network. Raises ModelError as `resolve_model`.
    """
    folder = _local_folder(name, file_set)
    if folder.is_dir():
        check_folder(folder, file_set)
        return folder
    return find_cached(name, revision, file_set) or download(name, revision, file_set)


def _what_to_name(absent: Path, file_set: ModelFileSet) -> str:
    """What to do about a folder that is absent, with the command that writes an untrained model there."""
    command = f"stylemill demo-model {shlex.quote(str(absent))}"
    if file_set is MODEL:
        return (
            f"name a folder or a hub id, or {EMBEDDED!r}, the embedded model. To try it without a real model, "
            f"'{command}' writes an untrained one there, or '{command} --sdxl' one of SDXL's shape"
        )
    if file_set is CONTROLNET:
        return (
            f"name a folder or a hub id. To try it without a real one, '{command} --controlnet' writes an untrained "
            "ControlNet there, for the models that demo-model writes"
        )
    return "name a folder or a hub id"


def _local_folder(name: str, file_set: ModelFileSet) -> Path:
    """The folder that `name` means if it is not a hub id. It need not exist."""
    if name == EMBEDDED and file_set is MODEL:
        return Path(__file__).parents[1] / "demo"
    return Path(name).expanduser()
