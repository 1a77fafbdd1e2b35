"""Prompts longer than the model reads: a warning for each row names the text that is truncated."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import stylemill
from stylemill.engine import Engine


def test_truncated_text_is_the_part_that_the_encoding_does_not_depend_on(engine: Engine):
    loaded = engine.model
    long = "a" * 40 + " " + "b" * 60
    truncated = loaded.truncated_text(long)
    assert truncated
    assert set(truncated) == {"b"}
    assert loaded.truncated_text(long.removesuffix(truncated)) == loaded.truncated_text("") == ""
    assert loaded.encode_text(long).hidden.equal(loaded.encode_text(long + "c").hidden)


def test_a_row_with_a_long_prompt_is_warned_of_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "s.png")
    prompts = ["short", "x" * 100, "y" * 100]
    table = pa.table({"pair_id": ["a", "b", "c"], "style": ["s.png"] * 3, "prompt": prompts})
    pq.write_table(table, tmp_path / "pairs.parquet")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"manifest: pairs.parquet\nmodel: {folder}\noutput: out\npreset: text-to-image\nsampling: {{steps: 2}}\n"
        "image: {size: 64}\nshards: {pairs_per_shard: 3}\n"
    )
    with caplog.at_level(logging.WARNING, logger="stylemill.execution.shard"):
        assert stylemill.run(job, inline=True, quiet=True).exit_code == 0
    messages = [record.getMessage() for record in caplog.records if record.name == "stylemill.execution.shard"]
    assert [line.split(":")[0] for line in messages] == ["b", "c"]
    assert all("prompt is longer than the model reads" in line for line in messages)
