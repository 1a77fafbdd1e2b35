"""Encoded texts in the form that the UNet takes: tokens for cross-attention, and for SDXL a pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """One encoded text, or a batch of them with a leading B.

    `hidden` (tokens, dim) are the tokens' hidden states; `pooled` (dim) is a vector for the whole text, with SDXL only.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    @classmethod
    def stack(cls, texts: Sequence[Text]) -> Text:
        """A batch of single texts."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return cls(torch.stack([text.hidden for text in texts]), torch.stack(pooled) if pooled else None)

    def expand(self, count: int) -> Text:
        """A batch of `count` copies of a single text; a batch is returned unchanged."""
        if self.hidden.ndim == 3:
            return self
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Text(self.hidden.expand(count, -1, -1), pooled)

    def is_finite(self) -> bool:
        """Whether the text has neither NaN nor Inf."""
        return all(bool(part.isfinite().all()) for part in (self.hidden, self.pooled) if part is not None)

    def zeros_like(self) -> Text:
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Text(torch.zeros_like(self.hidden), pooled)

    def to(self, target: torch.device | torch.dtype) -> Text:
        return Text(self.hidden.to(target), None if self.pooled is None else self.pooled.to(target))
