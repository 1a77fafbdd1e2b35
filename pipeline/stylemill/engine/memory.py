"""Memory of the device: the micro-batch that fits into it, and errors when there is too little."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from stylemill.engine.batching import gpu_micro_batch
from stylemill.errors import DeviceMemoryError

T = TypeVar("T")

# Texts of RuntimeErrors of torch: the CUDA runtime and driver (a torch.AcceleratorError), its CPU allocator, C++'s new,
# and the libraries of CUDA that allocate workspaces of their own (…_STATUS_ALLOC_FAILED, …_DEVICE_ALLOCATION_FAILED).
# CUDNN_STATUS_NOT_SUPPORTED is not one: it says that a kernel is missing, at every size of a batch.
_ALLOCATION_FAILED = re.compile(
    r"out of memory|can't allocate memory|not enough memory|std::bad_alloc|ALLOC(ATION)?_FAILED"
)


def measured_micro_batch(
    device: torch.device, sample: Callable[[int], object], features: int, share: float = 1.0
) -> int:
    """The micro-batch that fits on a GPU, from what `sample`, called with 1 and with 2 pairs, takes there.

    `features` and `share` as in `gpu_micro_batch`.
    """
    peak_of_one, peak_of_two = (_peak_bytes(device, sample, count) for count in (1, 2))
    torch.cuda.empty_cache()  # what the allocator keeps of the two steps is free
    free, total = torch.cuda.mem_get_info(device)
    return gpu_micro_batch(
        peak_of_one=peak_of_one,
        peak_of_two=peak_of_two,
        features=features,
        held=torch.cuda.memory_reserved(device),
        free=free,
        total=total,
        share=share,
    )


def fastest_micro_batch(largest: int, seconds: Callable[[int], float]) -> int:
    """The smallest power of two, at most `largest`, whose pairs a second are within 5% of the most.

    `seconds` measures a step of that many pairs. The size is not that of the most: memory that brings little is better
    left free, and the last micro-batch of a shard is then less often a small one.
    """
    sizes = [1 << power for power in range(largest.bit_length()) if 1 << power <= largest]
    rates = {size: size / seconds(size) for size in sizes[-5:]}  # the others are slower
    return min(size for size, rate in rates.items() if rate >= 0.95 * max(rates.values()))


def _peak_bytes(device: torch.device, sample: Callable[[int], object], count: int) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    sample(count)
    return torch.cuda.max_memory_allocated(device) - before


def translate_out_of_memory(
    work: Callable[[], T],
    where: str = "with one pair in a UNet call",
    advice: str = "take a smaller image.size or sampling.window, lower cluster.feature_budget_mb",
) -> T:
    """Call `work` and return its result.

    Raises DeviceMemoryError, which says `where` and gives `advice`, if it runs out of memory, after all that it
    allocated is released.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = ". ".join(str(error).split(". ")[:2])  # the second sentence has the requested size
    # Outside of the except block: the traceback keeps the frames of `work`, and so their tensors, alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise DeviceMemoryError(
        f"out of memory {where} ({reason.rstrip('.')}); {advice}, or end other processes that use this device"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, or Python, could not allocate memory."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or _ALLOCATION_FAILED.search(str(error)) is not None
