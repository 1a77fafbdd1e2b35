"""The table that `stylemill bench` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from stylemill.bench.result import BenchResult, BenchRow
from stylemill.plural import counted


class _Column(NamedTuple):
    title: str
    cell: Callable[[BenchRow], str]


def _number(name: str, form: str = ".4g") -> Callable[[BenchRow], str]:
    def cell(row: BenchRow) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value, form)

    return cell


class BenchTable:
    """The lines of a result. `compares`: whether one of the rows is the naive one."""

    def __init__(self, result: BenchResult, compares: bool) -> None:
        self.result = result
        self.compares = compares
        self._columns = self._choose_columns()

    def header(self) -> Iterator[str]:
        """The lines above the first row."""
        result = self.result
        contents, styles = result.tile
        weights = ", random weights" if result.random_weights else ""
        where = f"{result.device}, {result.dtype}" if result.device != "cpu" else self._cpu()
        yield f"device  {where}; torch {result.versions['torch']}, {result.date}"
        yield f"model   {result.model}{weights}, {result.size}×{result.size} pixels"
        yield f"run     {result.preset}, {result.sampling['method']}, {counted(result.sampling['steps'], 'step')}"
        yield f"engine  {self._engine()}"
        yield f"tile    {contents}×{styles}: {counted(contents * styles, 'pair')} in lockstep"
        if result.rates:
            rates = ", ".join(f"{rate:.4g} {name}" for name, rate in result.rates.items())
            yield f"rates   {rates}"
        yield "ms: a pair in a call of the UNet; passes: of the UNet, a pair and step"
        yield ""
        yield "  ".join(f"{column.title:>{_width(column)}}" for column in self._columns)

    def line(self, row: BenchRow) -> str:
        """The line of a row."""
        if row.error:
            cells = [f"{column.cell(row):>{_width(column)}}" for column in self._columns[:3]]
            return "  ".join([*cells, row.error])
        line = "  ".join(f"{column.cell(row):>{_width(column)}}" for column in self._columns)
        return f"{line}  {counted(row.images_lost, 'image')} lost to NaN or Inf" if row.images_lost else line

    def _cpu(self) -> str:
        result = self.result
        return f"cpu ({result.capability}, {counted(result.threads, 'thread')}), {result.dtype}"

    def _engine(self) -> str:
        unet = "compiled UNet" if self.result.compiled else "UNet not compiled"
        gradients = "deterministic" if self.result.deterministic else "fastest"
        naive = "; naive: UNet not compiled, fastest gradients" if self.compares else ""
        return f"{unet}, {gradients} gradients{naive}"

    def _choose_columns(self) -> list[_Column]:
        columns = [
            _Column("way     ", lambda row: f"{row.way:8}"),
            _Column("size", lambda _: str(self.result.size)),
            _Column("micro-batch", _number("micro_batch", "d")),
            _Column("denoise ms", _number("denoise_ms")),
            _Column("features ms", _number("features_ms")),
            _Column("gradient ms", _number("gradient_ms")),
            _Column("s/image", _number("seconds_per_image")),
            _Column("images/s", _number("images_per_second")),
        ]
        if self.compares:
            columns.append(_Column("× naive", _number("times_naive", ".2f")))
        if self.result.rates:
            columns += [_Column("TFLOP/s", _number("tflops")), _Column("utilisation", _number("utilisation", ".1%"))]
        if self.result.device != "cpu":
            columns.append(_Column("GiB", _number("peak_gib", ".1f")))
        return [*columns, _Column("passes", lambda row: f"{sum(row.passes.values()):.4g}")]


def _width(column: _Column) -> int:
    return max(len(column.title), 6)
