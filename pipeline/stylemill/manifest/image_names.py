"""Short unique names of images, of which the pair ids of a built manifest consist."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import PurePath

SEPARATOR = "__"  # between the names in a pair_id
_MAX_BYTES = 90  # two names, separators and the number of a repeated pair fit into the 200 bytes of a pair_id


def unique_names(paths: Iterable[str]) -> dict[str, str]:
    """A short unique name for each path: its stem; where stems are equal, with the folder's name or a digest.

    No name contains the separator, or begins or ends with one of its characters.
    """
    unique = list(dict.fromkeys(paths))
    names = {path: _clean(_stem(path)) for path in unique}
    longer: tuple[Callable[[str], str], ...] = (_name_with_folder, _name_with_digest)
    for make_name in longer:
        # Compared without case: ids may become the names of files, on filesystems that ignore case.
        count = Counter(name.casefold() for name in names.values())
        names = {path: name if count[name.casefold()] == 1 else make_name(path) for path, name in names.items()}
    return names


def _name_with_folder(path: str) -> str:
    return _clean(f"{PurePath(path).parent.name}-{_stem(path)}")


def _name_with_digest(path: str) -> str:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{_clean(_stem(path), _MAX_BYTES - 13)}-{digest}"


def _stem(path: str) -> str:
    return PurePath(path).stem


def _clean(text: str, max_bytes: int = _MAX_BYTES) -> str:
    text = re.sub(r"[\x00-\x1f\x7f-\x9f/\\]", "_", text)
    text = re.sub(r"__+", "_", text).encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")
    return text.strip("_ .") or "image"
