"""Words that the messages about a run share."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Such as "1 shard" or "2,000 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
