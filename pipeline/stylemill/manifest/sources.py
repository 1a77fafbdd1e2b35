"""Find the images a manifest is built from: folders, globs, single files and lists, in natural order."""

from __future__ import annotations

import csv
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from stylemill.config.paths import is_url
from stylemill.errors import ManifestError

Source = str | Path | Sequence[str | Path]

# Formats Pillow decodes itself; no vector formats or documents, whose pixels depend on the reader.
# fmt: off
IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
))
# fmt: on
_LABEL_BYTES = 90  # two labels, what joins them and an occurrence stay below the 200 bytes of a pair_id


def find_images(source: Source, column: str) -> list[str]:
    """Absolute paths (or URIs as they are) of the images of `source`, in natural order; lists keep their order.

    A folder is searched with its subfolders, but not through links to folders. A `.txt` holds one path a line; a `.csv`
    a column called `column`, `path` or `file_name`; their relative paths start at the list's folder.
    Raises ManifestError when none is found.
    """
    if not isinstance(source, str | Path):
        found = [path for item in source for path in find_images(item, column)]
        if not found:
            raise ManifestError(f"the list of {column} images is empty")
        return found
    text = str(source)
    if is_url(text):
        return [text]
    path = Path(text).expanduser()
    if path.is_dir():
        found = _on_disk(_in_folder(path))
    elif path.suffix.lower() in (".csv", ".txt") and path.is_file():
        found = [absolute_path(item, path) for item in _in_list(path, column)]
    elif path.is_file():
        found = _on_disk([path])
    elif glob.has_magic(text):
        found = _on_disk(Path(name) for name in glob.glob(str(path), recursive=True))
    else:
        raise ManifestError(f"{path}: no such file or folder of {column} images")
    if not found:
        raise ManifestError(
            f"{path}: no {column} images there; looked for files ending in {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return found


def natural(path: str | PurePath) -> tuple[object, ...]:
    """Sort key by which `9.png` goes before `10.png`, folder by folder."""
    parts = PurePath(path).parts
    return (*(tuple(_number_or_text(part)) for part in parts), str(path))


def relative_to_manifest(path: str, folder: Path) -> str:
    """The path as the manifest in `folder` writes it: relative where both can be moved together, else absolute.

    Together means: below the manifest's folder or at most two folders up.
    """
    if is_url(path):
        return path
    base = os.path.realpath(folder)
    if os.path.commonpath([base, path]) == os.path.sep:
        return path
    relative = PurePath(os.path.relpath(path, base))
    return relative.as_posix() if relative.parts.count("..") <= 2 else path


def labels(paths: Iterable[str]) -> dict[str, str]:
    """A short unique name for each path: its stem, with the folder's name or a digest where stems collide.

    Names never hold, begin or end with what joins two of them in a pair_id.
    """
    unique = list(dict.fromkeys(paths))
    names = {path: _label(_stem(path)) for path in unique}
    longer: tuple[Callable[[str], str], ...] = (_with_folder, _with_digest)
    for name in longer:
        # Case-blind, since ids may become file names where case does not tell two apart.
        count = Counter(label.casefold() for label in names.values())
        names = {path: label if count[label.casefold()] == 1 else name(path) for path, label in names.items()}
    return names


def absolute_path(path: str, listed_in: Path) -> str:
    """A path written in the list `listed_in`, made absolute; a URI as it is."""
    return path if is_url(path) else os.path.normpath(os.path.join(os.path.realpath(listed_in.parent), path))


def _in_folder(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ManifestError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names)


def _on_disk(paths: Iterable[Path]) -> list[str]:
    """The images among `paths`, absolute, in natural order."""
    # Hidden files include the `._photo.jpg` that macOS leaves beside each photo.
    images = [path for path in paths if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")]
    return [os.path.join(os.path.realpath(path.parent), path.name) for path in sorted(images, key=natural)]


def _in_list(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".txt":
                yield from (line.strip() for line in file if line.strip())
                return
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            name = next((name for name in (column, "path", "file_name") if name in header), None)
            if name is None:
                raise ManifestError(f"{path}: needs a column '{column}' or 'path', has: {', '.join(header) or 'none'}")
            yield from (line[name] for line in reader if line[name])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error


def _number_or_text(part: str) -> Iterator[object]:
    for index, piece in enumerate(re.split(r"(\d+)", part)):
        yield int(piece) if index % 2 else piece.casefold()


def _stem(path: str) -> str:
    return PurePath(path).stem


def _with_folder(path: str) -> str:
    return _label(f"{PurePath(path).parent.name}-{_stem(path)}")


def _with_digest(path: str) -> str:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{_label(_stem(path), _LABEL_BYTES - 13)}-{digest}"


def _label(text: str, size: int = _LABEL_BYTES) -> str:
    text = re.sub(r"[\x00-\x1f\x7f-\x9f/\\]", "_", text)
    text = re.sub(r"__+", "_", text).encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
    return text.strip("_ .") or "image"
