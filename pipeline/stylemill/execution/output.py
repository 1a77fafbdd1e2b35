"""The output of a shard: the tables of its successful and of its failed rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from stylemill.config.job import Job
from stylemill.execution.attempt import Attempt, Run
from stylemill.execution.rows import OutputRow
from stylemill.manifest import Row
from stylemill.store.parquet import Failure, output_schema, write_failures, write_shard


def write_tables(run: Run, attempt: Attempt, rows: list[OutputRow]) -> tuple[Path | None, Path | None]:
    """Write the data file and the failures file of a shard into tmp/; None for a file that would have no row."""
    successful = [place for place, row in enumerate(rows) if row.image is not None]
    data = failures = None
    if successful:
        table = output_table(run, [rows[place] for place in successful])
        row_range = run.rows_of(attempt.shard)
        carried = run.manifest.carried_output_rows(row_range.start, row_range.stop)
        for name in carried.column_names:
            table = table.append_column(carried.schema.field(name), carried[name].take(successful))
        data = write_shard(run.paths, attempt.shard, attempt.id, table.cast(_schema(run)), attempt.generation)
    failed = [
        Failure(row.source.output_row, row.source.pair_id, **asdict(row.failure))
        for row in rows
        if row.failure and row.wanted
    ]
    if failed:
        failures = write_failures(run.paths, attempt.shard, attempt.id, failed, run.fingerprint, attempt.generation)
    return data, failures


def output_table(run: Run, rows: list[OutputRow]) -> pa.Table:
    """The output columns of successful rows, without the carried ones."""
    schema = _schema(run)
    values = [
        {
            "pair_id": row.source.pair_id,
            "row": row.source.output_row,
            "image": {"bytes": row.image, "path": f"{row.source.pair_id}.{run.job.shards.image_format}"},
            "content": row.source.content.reference if row.source.content else None,
            "style": _one_or_list(run, [style.reference for style in row.source.styles]),
            "base": run.base if row.source.has_relative_paths else None,
            "width": row.size[0],
            "height": row.size[1],
            "seed": _seed(run.job, row.source),
            "prompt": row.source.prompt,
            "negative_prompt": row.source.negative_prompt,
            "content_weight": _content_weight(run.job, row.source),
            "settings": json.dumps(_settings(run.job, row.source), sort_keys=True),
            "style_distance_before": row.distances and row.distances.style_before,
            "style_distance": row.distances and row.distances.style,
            "content_distance": row.distances and row.distances.content,
            "content_sha256": row.content_sha256,
            "style_sha256": _one_or_list(run, list(row.style_sha256)),
            "sha256": sha256(row.image or b"").hexdigest(),
            "model": run.model,
        }
        for row in rows
    ]
    return pa.Table.from_pylist(values, schema=pa.schema([schema.field(name) for name in values[0]]))


def _schema(run: Run) -> pa.Schema:
    return output_schema(run.manifest.carried, run.manifest.style_is_list, run.fingerprint)


def _seed(job: Job, source: Row) -> int:
    return job.sampling.seed + source.image_number if source.seed is None else source.seed


def _content_weight(job: Job, source: Row) -> float:
    return job.sampling.content_weight if source.content_weight is None else source.content_weight


def _one_or_list(run: Run, values: list[str]) -> Any:
    return values if run.manifest.style_is_list else values[0]


def _settings(job: Job, source: Row) -> dict[str, Any]:
    """The settings of a row that have no column of their own."""
    settings = job.sampling.model_dump(exclude={"content_weight"}) | {"fit": job.image.fit}
    if job.image.style_size is not None:
        settings["style_size"] = list(job.image.style_width_height)
    if source.content_mask is not None:
        settings |= {"content_mask": source.content_mask, "style_mask": list(source.style_masks)}
    if job.model.controlnet:
        settings["control"] = [control.reference for control in source.controls]
        settings["controlnet"] = [
            {"name": Path(net.name).name, "scale": net.scale, "start": net.start, "end": net.end}
            for net in job.model.controlnet
        ]
    return settings
