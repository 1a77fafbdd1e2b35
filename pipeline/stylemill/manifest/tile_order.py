"""The order of the rows of a product, in which neighbouring rows share images."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class TileOrder:
    """The product of contents and styles, ordered so that any range of consecutive pairs has few contents × few styles.

    Styles are divided into bands of nearly equal width. Within a band, pairs are ordered by content. In every second
    band the contents are in reverse order, so that a range across the border of two bands has the same contents on both
    sides.
    """

    contents: int
    styles: int
    width: int  # of the widest band, in styles

    def __len__(self) -> int:
        return self.contents * self.styles

    def pair(self, position: int) -> tuple[int, int]:
        """The numbers of the content and the style at a position of the order, 0 <= position < len."""
        band = bisect_right(self._edges, position // self.contents) - 1
        first, stop = self._edges[band], self._edges[band + 1]
        content, style = divmod(position - first * self.contents, stop - first)
        return (self.contents - 1 - content if band % 2 else content), first + style

    @cached_property
    def _edges(self) -> list[int]:
        bands = math.ceil(self.styles / self.width)
        return [band * self.styles // bands for band in range(bands + 1)]

    @classmethod
    def of(cls, contents: int, styles: int, rows: int, tile: tuple[int, int] | None = None) -> TileOrder:
        """The order with tiles of `tile` (contents, styles), or with tiles of `rows` pairs as square as possible.

        With fewer contents than a tile has, any range spans all contents. Then a band is one style: the ends of a range
        would have parts of wider bands, with all their styles.
        """
        side = max(1, math.isqrt(rows))
        tile_contents, tile_styles = tile or (side, side)
        return cls(contents, styles, tile_styles if contents >= tile_contents else 1)
