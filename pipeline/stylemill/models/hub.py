"""Model repositories on the Hugging Face hub: their commits, their files and the local cache. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from stylemill.config.paths import EMBEDDED
from stylemill.errors import ModelError
from stylemill.models.architecture import explain_unsupported_layout
from stylemill.models.file_sets import MODEL, ModelFileSet
from stylemill.models.folder import check_folder, missing_files


def find_commit(name: str, revision: str | None, file_set: ModelFileSet) -> str:
    """The commit of a hub model's `revision`, or of its default branch.

    Asks the hub; where it cannot be reached, the commit in the local cache counts. Raises ModelError when neither has
    the model, or when its list of files shows that it is not supported.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision)
    except Exception as error:  # the hub's HTTP client raises errors of many classes
        if not _is_final(error):
            cached = find_cached(name, revision, file_set)
            if cached is not None:
                return cached.name  # the cache names snapshot folders after their commit
        _raise_model_error(name, revision, error, file_set)
    files = [file.rfilename for file in getattr(info, "siblings", None) or []]
    if file_set is MODEL and (reason := explain_unsupported_layout(files)):  # before gigabytes are downloaded
        raise ModelError(f"{file_set.name} {name!r}: {reason}")
    if not info.sha:
        raise ModelError(f"{file_set.name} {name!r}: the hub returned no commit; set one as its 'revision'")
    return str(info.sha)


def find_cached(name: str, revision: str | None, file_set: ModelFileSet) -> Path | None:
    """The snapshot folder of `revision` in the hub's local cache, if it is complete. Uses no network."""
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=file_set.patterns, local_files_only=True
        )
    except Exception:  # absent, incomplete or not a valid id: the caller then asks the hub, whose error is clearer
        return None
    folder = Path(snapshot)
    return None if missing_files(folder, file_set) else folder


def download(name: str, revision: str | None, file_set: ModelFileSet) -> Path:
    """Download a hub model's files into the local cache and return its folder.

    Raises ModelError when the hub does not have the model, cannot be reached, or the model is not supported.
    """
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=file_set.patterns))
    except Exception as error:  # the hub's HTTP client raises errors of many classes
        _raise_model_error(name, revision, error, file_set)
    check_folder(folder, file_set, name)
    return folder


def _is_final(error: Exception) -> bool:
    """Whether the hub answered that the model does not exist for this user; then the cache must not replace it."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError))


def _raise_model_error(name: str, revision: str | None, error: Exception, file_set: ModelFileSet) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    label = f"{file_set.name} {name!r}"
    if isinstance(error, GatedRepoError):
        message = f"{label}: is gated; accept its terms on huggingface.co and log in with 'hf auth login' or HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        message = f"{label}: has no revision {revision!r}; see its branches, tags and commits on huggingface.co"
    elif _is_final(error):
        message = (
            f"{label}: neither a folder on this machine nor a model that you can see on the hub; check the name, "
            "or set HF_TOKEN for a private model"
        )
    else:
        reason = " ".join(str(error).split())[:200]
        message = (
            f"{label}: no folder of this name, the hub cannot be reached ({type(error).__name__}: {reason}), and its "
            "local cache does not have the model; go online once without HF_HUB_OFFLINE, or name a local folder"
            + (f", or {EMBEDDED!r}, the embedded model" if file_set is MODEL else "")
        )
    raise ModelError(message) from error
