"""What was measured, as rows: the lines of a table, and JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from stylemill.bench.tile import Tile
from stylemill.plural import counted


@dataclass(frozen=True)
class BenchRow:
    """One micro-batch in lockstep, or one pair at a time (`naive`). None: not measured, or not known."""

    way: str  # lockstep | naive
    micro_batch: int
    error: str | None = None
    denoise_ms: float | None = None  # of each call, a pair
    features_ms: float | None = None
    gradient_ms: float | None = None
    seconds_per_image: float | None = None  # of a whole run
    images_per_second: float | None = None
    times_naive: float | None = None  # images a second over those of `naive`
    tflops: float | None = None
    utilisation: float | None = None  # tflops over the device's rate of matrix products
    peak_gib: float | None = None
    passes: dict[str, float] = field(default_factory=dict)  # of the UNet, a pair and step, by kind
    images_lost: int = 0  # latents or images became NaN or Inf


class _Column(NamedTuple):
    title: str
    cell: Callable[[BenchRow], str]


def _number(name: str, form: str = ".4g") -> Callable[[BenchRow], str]:
    def cell(row: BenchRow) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value, form)

    return cell


@dataclass
class BenchResult:
    """All that a call of `stylemill bench` measured, and on what."""

    date: str
    device: str
    capability: str
    threads: int
    versions: dict[str, str]
    model: str
    random_weights: bool
    dtype: str
    size: int  # pixels
    tile: Tile
    preset: str
    sampling: dict[str, Any]
    rates: dict[str, float]  # of the device; empty where the operations of the UNet are not known
    rows: list[BenchRow] = field(default_factory=list)
    _columns: list[_Column] = field(default_factory=list)

    def header(self, compares: bool) -> Iterator[str]:
        """The lines above the first row. `compares`: whether one of the rows is the naive one."""
        contents, styles = self.tile
        weights = ", random weights" if self.random_weights else ""
        where = f"{self.device}, {self.dtype}" if self.device != "cpu" else self._cpu()
        yield f"device  {where}; torch {self.versions['torch']}, {self.date}"
        yield f"model   {self.model}{weights}, {self.size}×{self.size} pixels"
        yield f"run     {self.preset}, {self.sampling['method']}, {counted(self.sampling['steps'], 'step')}"
        yield f"tile    {contents}×{styles}: {counted(contents * styles, 'pair')} in lockstep"
        if self.rates:
            rates = ", ".join(f"{rate:.4g} {name}" for name, rate in self.rates.items())
            yield f"rates   {rates}"
        yield "ms: a pair in a call of the UNet; passes: of the UNet, a pair and step"
        yield ""
        self._columns = self._choose_columns(compares)
        yield "  ".join(f"{column.title:>{_width(column)}}" for column in self._columns)

    def line(self, row: BenchRow) -> str:
        """The line of a row. `header` comes before."""
        if row.error:
            cells = [f"{column.cell(row):>{_width(column)}}" for column in self._columns[:3]]
            return "  ".join([*cells, row.error])
        line = "  ".join(f"{column.cell(row):>{_width(column)}}" for column in self._columns)
        return f"{line}  {counted(row.images_lost, 'image')} lost to NaN or Inf" if row.images_lost else line

    def as_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: value for key, value in asdict(self).items() if not key.startswith("_")}

    def _cpu(self) -> str:
        return f"cpu ({self.capability}, {counted(self.threads, 'thread')}), {self.dtype}"

    def _choose_columns(self, compares: bool) -> list[_Column]:
        columns = [
            _Column("way     ", lambda row: f"{row.way:8}"),
            _Column("size", lambda _: str(self.size)),
            _Column("micro-batch", _number("micro_batch", "d")),
            _Column("denoise ms", _number("denoise_ms")),
            _Column("features ms", _number("features_ms")),
            _Column("gradient ms", _number("gradient_ms")),
            _Column("s/image", _number("seconds_per_image")),
            _Column("images/s", _number("images_per_second")),
        ]
        if compares:
            columns.append(_Column("× naive", _number("times_naive", ".2f")))
        if self.rates:
            columns += [_Column("TFLOP/s", _number("tflops")), _Column("utilisation", _number("utilisation", ".1%"))]
        if self.device != "cpu":
            columns.append(_Column("GiB", _number("peak_gib", ".1f")))
        return [*columns, _Column("passes", lambda row: f"{sum(row.passes.values()):.4g}")]


def _width(column: _Column) -> int:
    return max(len(column.title), 6)
