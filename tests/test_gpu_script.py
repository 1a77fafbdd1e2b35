"""`make gpu` at toy sizes on the CPU: a mistake in it would cost time on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_stages_that_take_no_compiler_run_and_a_stage_that_fails_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sdxl").write_text("not a folder")
    stages = ["rates", "sdxl", "eager", "determinism", "no_waiting", "calibration", "profile", "attention", "opt_ins"]
    options = ["--device", "cpu", "--rehearse", tmp_path / "models", "--json", tmp_path / "gpu.json"]
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--stages", *stages, *options], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "failed or not started: sdxl" in ended.stdout
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results) == ["machine", *stages]
    assert "ModelError" in results["sdxl"]
    assert set(results["eager"]["deterministic"]) == {"1", "2"}
    assert results["eager"]["fastest"]["2"]["gradient ms"] > 0
    assert results["determinism"]["same bits after resume"] is True
