"""Totals of a run, computed from its records, with examples of its errors."""

from __future__ import annotations

from dataclasses import dataclass

from stylemill.errors import DamagedError
from stylemill.plural import counted
from stylemill.store.ledger import Ledger
from stylemill.store.paths import RunPaths
from stylemill.store.retries import failed_rows

EXAMPLES = 3  # messages of each error class
_MAX_SHARDS = 100  # whose failures files are read for the examples


@dataclass(frozen=True)
class Summary:
    """Totals of a run, in output rows. `examples` has a few lines "pair_id: message" for each error class."""

    paths: RunPaths
    rows: int
    rows_ok: int
    rows_failed: int
    open_shards: int
    failed_by_class: dict[str, int]
    examples: dict[str, list[str]]

    @property
    def rows_open(self) -> int:
        return self.rows - self.rows_ok - self.rows_failed

    def describe(self) -> str:
        """The text that ends the output of `stylemill run` and of `stylemill status`."""
        done = f"{self.rows_ok:,} of {counted(self.rows, 'image')} done"
        failures = self.paths.failed_rows if self.paths.failed_rows.exists() else self.paths.failures_folder
        lines = [f"{done}, {self.rows_failed:,} failed, {self.rows_open:,} open"]
        for name, count in sorted(self.failed_by_class.items()):
            lines.append(f"  {count:,} × {name}")
            lines += [f"    {example}" for example in self.examples.get(name, [])]
            if count > len(self.examples.get(name, [])):
                lines.append(f"    … all of them in {failures}")
        lines.append(f"data     {self.paths.data_folder}")
        if self.rows_ok:
            source = f'data_dir="{self.paths.data_folder}"'
            if self.paths.on_bucket:
                source = f'data_files="{self.paths.data_folder}/*.parquet"'
            lines.append(f'load it  datasets.load_dataset("parquet", {source}, split="train")')
        if self.paths.contact_sheet.exists():
            lines.append(f"look     {self.paths.contact_sheet}")
        return "\n".join(lines)


def summarize(paths: RunPaths, ledger: Ledger, rows: int) -> Summary:
    """Sum up all records of a run with `rows` output rows. Reads few failures files, however large the run is."""
    ledger.refresh()
    totals = ledger.totals()
    return Summary(
        paths=paths,
        rows=rows,
        rows_ok=totals.rows_ok,
        rows_failed=totals.rows_failed,
        open_shards=paths.shards - totals.shards,
        failed_by_class=totals.failed_by_class,
        examples=_examples(paths, ledger, set(totals.failed_by_class)),
    )


def _examples(paths: RunPaths, ledger: Ledger, classes: set[str]) -> dict[str, list[str]]:
    examples: dict[str, list[str]] = {}
    shards_read = 0
    for shard in ledger.failed_shards():
        wanted = {name for name in classes if len(examples.get(name, [])) < EXAMPLES}
        if not wanted:
            break
        if not wanted & ledger.error_classes(shard):
            continue
        shards_read += 1
        if shards_read > _MAX_SHARDS:
            break
        try:
            failures = failed_rows(paths, ledger.records(shard)).values()
        except DamagedError:
            continue  # `verify` reports the damage; the summary does without these examples
        for failure in failures:
            messages = examples.setdefault(failure.error, [])
            if len(messages) < EXAMPLES:
                messages.append(f"{failure.pair_id}: {failure.message}")
    return examples
