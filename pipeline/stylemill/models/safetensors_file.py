"""Names and shapes of the tensors in a safetensors file, read from its header. Torch-free."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stylemill.errors import ModelError


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name. The file is memory-mapped, and only its header is read.

    Raises ModelError when the file cannot be read, is truncated or is not a safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelError(f"{path}: truncated or not safetensors ({error}); copy or download it again") from error


def count_parameters(path: Path, prefix: str = "") -> int:
    """The number of scalars in the tensors of a safetensors file whose names begin with `prefix`.

    Raises ModelError as `read_tensor_shapes`.
    """
    return sum(math.prod(shape) for name, shape in read_tensor_shapes(path).items() if name.startswith(prefix))
