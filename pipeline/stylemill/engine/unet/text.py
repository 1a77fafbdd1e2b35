"""Encoded texts, as the UNet of either family wants them: tokens for cross-attention, and for SDXL a pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """One encoded text, or a batch of them with a leading B.

    `hidden` are the tokens, (tokens, dim); `pooled`, (dim), sums the text up and exists for SDXL only.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    @classmethod
    def stack(cls, texts: Sequence[Text]) -> Text:
        """Single texts as a batch."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return cls(torch.stack([text.hidden for text in texts]), torch.stack(pooled) if pooled else None)

    def expand(self, count: int) -> Text:
        """A single text as a batch of `count` equal ones; a batch stays as it is."""
        if self.hidden.ndim == 3:
            return self
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Text(self.hidden.expand(count, -1, -1), pooled)

    def to(self, target: torch.device | torch.dtype) -> Text:
        return Text(self.hidden.to(target), None if self.pooled is None else self.pooled.to(target))
