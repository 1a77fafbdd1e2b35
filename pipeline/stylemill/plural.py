"""Counts in messages: a number and its noun, in the singular or the plural."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 shard", "1,024 shards"."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"
