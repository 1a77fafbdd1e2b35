"""The wording of messages about numbers of things."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """Such as "1 shard" or "1,200 shards"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
