"""Describe a manifest as text: size, columns, first rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stylemill.manifest.read import open_manifest
from stylemill.manifest.row import parse_row
from stylemill.manifest.schema import KNOWN_COLUMNS, Row
from stylemill.manifest.validate import validate_manifest
from stylemill.plural import counted


def show_manifest(path: str | Path, limit: int = 5) -> str:
    """The size, columns, first `limit` rows and warnings of a manifest. Scans it once, and opens no image.

    Raises ManifestError as `open_manifest` does.
    """
    manifest = open_manifest(path)
    report = validate_manifest(path, check_files=False, limit=0)
    groups = [stop - start for start, stop in zip(manifest.group_starts, manifest.group_starts[1:], strict=False)]
    lines = [
        f"{manifest.path}",
        f"  rows            {manifest.num_rows:,} in {counted(len(groups), 'row group')} of up to {max(groups):,}",
        f"  unique images   {counted(report.contents, 'content')}, {counted(report.styles, 'style')}",
    ]
    if report.rows_without_content:
        lines.append(f"  without content {counted(report.rows_without_content, 'row')}")
    lines.append("columns")
    width = max(map(len, manifest.schema.names))
    for item in manifest.schema:
        role = KNOWN_COLUMNS[item.name].meaning if item.name in KNOWN_COLUMNS else "carried through to the output"
        lines.append(f"  {item.name:{width}}  {item.type}: {role}")
    lines.append(f"first {counted(min(limit, manifest.num_rows), 'row')}, counted from 0")
    lines += [f"  {number:>4}  {_describe(number, values)}" for number, values in manifest.raw_rows(0, limit)]
    lines += [f"warning: {warning}" for warning in report.warnings]
    if not report.ok:
        lines.append(f"problems: {sum(report.counts.values())}; 'stylemill manifest validate' lists them")
    return "\n".join(lines)


def _describe(number: int, values: dict[str, Any]) -> str:
    row, problems = parse_row(number, values)
    if row:
        return _describe_row(row)
    return "; ".join(f"column '{problem.column}': {problem.message}" for problem in problems)


def _describe_row(row: Row) -> str:
    content = [row.content.reference] if row.content else []
    images = " × ".join([*content, " + ".join(style.reference for style in row.styles)])
    settings = [
        f"{name}={getattr(row, name)!r}"
        for name in ("prompt", "negative_prompt", "seed", "content_weight")
        if getattr(row, name) is not None
    ]
    return "  ".join([row.pair_id, images, *settings])
