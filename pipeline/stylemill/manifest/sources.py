"""Find the images a manifest is built from: folders, globs, single files and lists, in natural order."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from stylemill.config.paths import is_url
from stylemill.errors import ManifestError

Source = str | Path | Sequence[str | Path]

# Formats that Pillow decodes without other programs. No vector formats or documents: their pixels depend on the reader.
# fmt: off
IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
))
# fmt: on


def find_images(source: Source, column: str) -> list[str]:
    """Absolute paths of the images of `source`, in natural order; lists keep their order, URLs are returned unchanged.

    A folder is searched with its subfolders, but not through links to folders. A `.txt` has one path a line; a `.csv`
    has a column `column`, `path` or `file_name`; their relative paths are relative to the folder of the list.
    Raises ManifestError where there are none.
    """
    if not isinstance(source, str | Path):
        images = [path for item in source for path in find_images(item, column)]
        if not images:
            raise ManifestError(f"the list of {column} images is empty")
        return images
    text = str(source)
    if is_url(text):
        return [text]
    path = Path(text).expanduser()
    if path.is_dir():
        images = _select_images(_walk_folder(path))
    elif path.suffix.lower() in (".csv", ".txt") and path.is_file():
        images = [absolute_path(item, path) for item in _read_list(path, column)]
    elif path.is_file():
        images = _select_images([path])
    elif glob.has_magic(text):
        images = _select_images(Path(name) for name in glob.glob(str(path), recursive=True))
    else:
        raise ManifestError(f"{path}: no such file or folder of {column} images")
    if not images:
        raise ManifestError(
            f"{path}: no {column} images there; looked for files ending in {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return images


def natural_sort_key(path: str | PurePath) -> tuple[object, ...]:
    """Sort key with which `9.png` precedes `10.png`, folder by folder."""
    parts = PurePath(path).parts
    return (*(tuple(_split_numbers(part)) for part in parts), str(path))


def relative_to_manifest(path: str, folder: Path) -> str:
    """The path as written in a manifest in `folder`: relative where both can be moved together, else absolute.

    They can be moved together where the image is below the manifest's folder, or below a folder at most two levels up.
    """
    if is_url(path):
        return path
    base = os.path.realpath(folder)
    if os.path.commonpath([base, path]) == os.path.sep:
        return path
    relative = PurePath(os.path.relpath(path, base))
    return relative.as_posix() if relative.parts.count("..") <= 2 else path


def absolute_path(path: str, listed_in: Path) -> str:
    """A path written in the list `listed_in`, made absolute; a URL unchanged."""
    return path if is_url(path) else os.path.normpath(os.path.join(os.path.realpath(listed_in.parent), path))


def _walk_folder(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ManifestError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names)


def _select_images(paths: Iterable[Path]) -> list[str]:
    """The images among `paths`, absolute, in natural order."""
    # Hidden files are skipped: macOS writes a `._photo.jpg` beside each photo.
    images = [path for path in paths if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")]
    return [os.path.join(os.path.realpath(path.parent), path.name) for path in sorted(images, key=natural_sort_key)]


def _read_list(path: Path, column: str) -> Iterator[str]:
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


def _split_numbers(part: str) -> Iterator[object]:
    for index, piece in enumerate(re.split(r"(\d+)", part)):
        yield int(piece) if index % 2 else piece.casefold()
