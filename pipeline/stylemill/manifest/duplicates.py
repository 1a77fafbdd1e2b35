"""Find repeated names among the rows of a manifest, with 8 bytes of memory a row.

Names are compared by 64 bits of their SHA-256. Where two hashes are equal, a second scan of the manifest compares the
names themselves.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
from numpy.typing import NDArray


def hash64(name: str) -> int:
    """The first 64 bits of the SHA-256 of a name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def duplicate_hashes(hashes: array[int]) -> set[int]:
    """The values that occur more than once in an array of unsigned 64-bit numbers."""
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    return {int(value) for value in values[counts > 1]}


def contains_hash(sorted_hashes: NDArray[np.uint64], value: int) -> bool:
    index = int(np.searchsorted(sorted_hashes, np.uint64(value)))
    return index < len(sorted_hashes) and int(sorted_hashes[index]) == value


def duplicate_id_message(pair_id: str, first_row: int) -> str:
    return f"'{pair_id}' is already the id of row {first_row}; ids must be unique"
