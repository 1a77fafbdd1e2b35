"""Kernels of the device: those that give the same bits every time, and copies that the host does not wait for.

On CUDA, the fastest attention (cuDNN's) is repeatable forwards but not backwards. So a pass without gradient may use
it, and in one with a gradient torch is asked for deterministic algorithms, which are slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def prepare_cuda() -> None:
    """Set what CUDA reads when it starts. Without it, some sums of cuBLAS are not repeatable."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeatable(threads: int) -> Iterator[None]:
    """Set the CPU threads, and kernels that give the same bits every time; the caller's settings come back.

    The backward pass of attention is repeatable only in `repeatable_backward`.
    """
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.benchmark, cudnn.deterministic
    try:
        torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.benchmark, cudnn.deterministic = before[1:]


@contextmanager
def repeatable_backward(repeatable: bool = True) -> Iterator[None]:
    """Until the block ends, backward passes give the same bits every time. Their forward passes belong into it too."""
    torch_deterministic: Any = torch.utils.deterministic
    enabled, fill = torch.are_deterministic_algorithms_enabled(), torch_deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(enabled or repeatable)
        torch_deterministic.fill_uninitialized_memory = False  # it writes every tensor twice
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch_deterministic.fill_uninitialized_memory = fill


@lru_cache(maxsize=4096)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor; do not write to it. It is cached, because each copy to a device waits for the device."""
    return torch.tensor(values, dtype=dtype, device=device)


def to_device(array: npt.NDArray[np.float64], like: Tensor) -> Tensor:
    """The array as a tensor on the device and in the dtype of `like`, copied without waiting for the device."""
    tensor = torch.from_numpy(array).to(like.dtype)
    if like.device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)
