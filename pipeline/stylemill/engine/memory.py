"""Out of memory: told apart from other errors, and all that the failed work held given back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from stylemill.errors import DeviceMemoryError

T = TypeVar("T")


def catch_out_of_memory(work: Callable[[], T]) -> T:
    """What `work` returns. Raises DeviceMemoryError where it ran out of memory; nothing of it is left there then."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        why = ". ".join(str(error).split(". ")[:2])  # and how much was asked for
    # Only here, with the trace gone, do the tensors of the frames in it go too.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise DeviceMemoryError(
        f"out of memory with one pair in a UNet call ({why.rstrip('.')}); take a smaller image.size or "
        "sampling.window, lower cluster.feature_budget_mb, or end what else uses this device"
    )


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
