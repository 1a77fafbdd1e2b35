"""`stylemill plan --bench`: the time of a run, from a file that bench could have written, with round numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stylemill.bench.result import BenchResult
from stylemill.cli.app import main
from stylemill.config.job import Job, set_dotted
from stylemill.config.sampling import Sampling
from stylemill.errors import JobError
from stylemill.planning.device_time import TimeRange
from stylemill.planning.model_shape import read_shape
from stylemill.planning.plan import plan

HOUR = 3600
# With the job below, the calls take 4 hours, and everything 7: the test of the two ends has the sums.
ROW = {
    "way": "lockstep",
    "micro_batch": 4,
    "denoise_ms": 3000.0,
    "features_ms": 4000.0,
    "gradient_ms": 6000.0,
    "step_seconds": 15.0,
    "step_calls_seconds": 10.0,
    "seconds_per_image": 2.0,
    "images_per_second": 0.5,
}
FASTER = {**ROW, "micro_batch": 8, "denoise_ms": 1500.0, "features_ms": 2000.0, "gradient_ms": 3000.0}
FASTER |= {"seconds_per_image": 1.0, "images_per_second": 1.0}
FAILED = {"way": "lockstep", "micro_batch": 16, "error": "out of memory"}
NAIVE = {**ROW, "way": "naive", "micro_batch": 1, "images_per_second": 9.0}


def values_of_job(tmp_path: Path, model: Path) -> dict[str, Any]:
    """Three shards of 2 contents × 4 styles."""
    pairs = [(f"c{c}.png", f"s{s}.png") for c in range(6) for s in range(4)]
    table = pa.table({"content": [c for c, _ in pairs], "style": [s for _, s in pairs]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    return {
        "name": "test",
        "manifest": str(tmp_path / "pairs.parquet"),
        "output": str(tmp_path / "run"),
        "model": {"name": str(model)},
        "image": {"size": 128},
        "cluster": {"micro_batch": 4},
        "shards": {"pairs_per_shard": 8},
    }


def values_of_bench(model: Path) -> dict[str, Any]:
    shape = read_shape(model)
    return {
        "format": 2,
        "date": "2026-11-27",
        "device": "NVIDIA H200",
        "capability": "(9, 0)",
        "threads": 1,
        "versions": {"torch": "2.13.0"},
        "model": "sd15",
        "random_weights": True,
        "unet_parameters": shape.unet_parameters,
        "latent_channels": shape.latent_channels,
        "pixels_per_latent": shape.pixels_per_latent,
        "dtype": "float16",
        "compiled": False,
        "deterministic": True,
        "size": 128,
        "tile": [8, 8],
        "preset": "guided-transfer",
        "sampling": Sampling().model_dump(mode="json"),
        "rates": {},
        "encode_seconds": 58.0,
        "decode_seconds": 90.0,
        "rows": [NAIVE, ROW, FAILED],
    }


class Bench:
    """A job and a bench file, and the plan of one with the other."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.file = folder / "bench.json"
        self.job = values_of_job(folder, model)
        self.values = values_of_bench(model)

    def plan(self, job: dict[str, Any] | None = None, bench: dict[str, Any] | None = None) -> dict[str, str]:
        """The lines about time, by their names. `job` has dotted keys."""
        for key, value in (job or {}).items():
            set_dotted(self.job, key, value)
        self.file.write_text(json.dumps({**self.values, **(bench or {})}))
        lines = plan(Job.parse(self.job)).describe(self.file).splitlines()
        named = {line[:15].strip(): line[16:] for line in lines}
        return {name: text for name, text in named.items() if name in ("time", "wall time", "not counted")}


@pytest.fixture
def bench(tmp_path: Path, folder: Path) -> Bench:
    return Bench(tmp_path, folder)


def test_the_lower_end_has_the_calls_and_the_upper_end_everything(bench: Bench) -> None:
    """1200 denoising, 1200 gradient and 900 feature passes, 2 · 24 + 18 of distances; encodes 18 images, decodes 24."""
    assert sum((1200 * 3, 1200 * 6, 900 * 4)) == 4 * HOUR
    assert (4 * HOUR + 66 * 4) * 15 / 10 + 18 * 58 + 24 * 90 == 7 * HOUR
    assert bench.plan() == {"time": "4 to 7 hours on one NVIDIA H200 (bench.json, micro-batch 4)"}


def test_a_run_that_was_faster_than_its_calls_does_not_lower_the_upper_end(bench: Bench) -> None:
    row = {**ROW, "step_seconds": 5.0}
    upper = 4 * HOUR + 66 * 4 + 18 * 58 + 24 * 90
    assert bench.plan(bench={"rows": [row]})["time"].startswith(f"{TimeRange(4 * HOUR, upper)} on")
    assert str(TimeRange(4 * HOUR, upper)) == "4 to 5 hours"


def test_auto_takes_the_micro_batch_with_the_most_images_a_second(bench: Bench) -> None:
    rows = {"rows": [NAIVE, ROW, FASTER, FAILED]}
    assert bench.plan({"cluster.micro_batch": "auto"}, rows)["time"] == (
        "2 to 3.9 hours on one NVIDIA H200 (bench.json, micro-batch 8)"  # encoding and decoding take what they took
    )


def test_several_workers_divide_the_work_and_the_busiest_has_two_of_three_shards(bench: Bench) -> None:
    lines = bench.plan({"cluster.workers": 2})
    assert lines["time"].startswith("4 to 7 hours on one")
    assert lines["wall time"] == "2 to 4.7 hours with 2 workers"
    assert bench.plan({"cluster.workers": 100})["wall time"] == "1.3 to 2.3 hours with 100 workers", "one shard each"
    assert "wall time" not in bench.plan({"cluster.gpus_per_worker": 0.5}), "workers share a GPU"
    assert "wall time" not in bench.plan({"cluster.workers": "auto"})


def test_in_windows_the_calls_have_the_size_of_a_window_and_images_more_pixels(bench: Bench) -> None:
    """24 pairs in 3 × 1 windows; 24 images of twice the pixels to decode, and 12 styles to encode as many."""
    window = {"window": 16, "content_weight": 0.0}
    job = {"image.size": [256, 128], "image.style_size": 128, "sampling": window}
    lower = 3 * 1200 * (3 + 6) + 3 * 4 * 50 * 4
    distances, images = 3 * 48 + 12, 2 * (18 * 58 + 24 * 90)
    upper = (lower + distances * 4) * 1.5 + images
    found = bench.plan(job)["time"]
    assert found.startswith(f"{TimeRange(lower, upper)} on one NVIDIA H200")


def test_what_bench_does_not_measure_is_named(bench: Bench) -> None:
    assert bench.plan({"sampling.refine_decoder_steps": 75})["not counted"] == "refinement of the decoder"


def test_a_cpu_is_named_with_its_threads(bench: Bench) -> None:
    found = bench.plan(bench={"device": "cpu", "dtype": "float32"})
    assert found["time"] == "4 to 7 hours on a CPU, 1 thread (bench.json, micro-batch 4)"


def test_a_model_that_is_not_on_this_machine_is_not_compared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("not cached")

    class Hub:
        def model_info(self, repo_id: str, *, revision: str | None = None) -> Any:
            return huggingface_hub.ModelInfo(id=repo_id, sha="f" * 40)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    found = bench.plan({"model.name": "org/model"}, {"unet_parameters": 1})
    assert found["time"].endswith("micro-batch 4; the model was not compared, it is not on this machine yet)")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((0.5, 1.25), "0.5 to 1.2 seconds"),
        ((100, 119), "100 to 119 seconds"),
        ((120, 7199), "2 to 120 minutes"),
        ((12 * HOUR, 14 * HOUR), "12 to 14 hours"),
        ((9.96 * HOUR, 10 * HOUR), "about 10 hours"),
        ((24 * HOUR, 120 * HOUR), "1 to 5 days"),
        ((24e3 * HOUR, 48e3 * HOUR), "1,000 to 2,000 days"),
    ],
)
def test_ranges_are_told_in_one_unit(seconds: tuple[float, float], text: str) -> None:
    assert str(TimeRange(*seconds)) == text


@pytest.mark.parametrize(
    ("job", "values", "message"),
    [
        (
            {},
            {"size": 256},
            "of 256×256 pixels were measured, and a UNet call of the job has 128×128; measure with --size 128",
        ),
        (
            {"image.size": [128, 192]},
            {},
            "square images were measured, and a UNet call of the job has 128×192 pixels; leave",
        ),
        ({"image.style_size": 64}, {}, "128×128 pixels, and image.style_size is 64×64; leave --bench out"),
        ({}, {"unet_parameters": 9}, "sd15 was measured, which has 9 parameters in its UNet and latents of 4 channels"),
        ({}, {"latent_channels": 16}, "latents of 16 channels and 8×8 pixels, and "),
        ({"model.layers": [0, 1]}, {}, "the last six layers were measured, and model.layers selects others; leave"),
        (
            {},
            {"dtype": "float32"},
            "float32 was measured, and the job computes in float16; measure with --dtype float16",
        ),
        ({"model.dtype": "bfloat16"}, {}, "the job computes in bfloat16; measure with --dtype bfloat16"),
        ({}, {"compiled": True}, "the job's is not compiled; measure without --compile"),
        ({"cluster.compile": True}, {}, "and cluster.compile is true; measure with --compile"),
        ({}, {"deterministic": False}, "cluster.deterministic is true; measure without --no-deterministic"),
        ({"cluster.deterministic": False}, {}, "cluster.deterministic is false; measure with --no-deterministic"),
        (
            {"cluster.gpus_per_worker": 0.0},
            {},
            "NVIDIA H200 was measured, and cluster.gpus_per_worker is 0; measure with --d",
        ),
        (
            {"cluster.gpus_per_worker": 1.0},
            {"device": "cpu", "dtype": "float32"},
            "cluster.gpus_per_worker is 1; measure on",
        ),
        (
            {"cluster.threads": 2},
            {"device": "cpu", "dtype": "float32"},
            "A CPU with 1 thread was measured, and cluster.thr",
        ),
        (
            {"sampling.method": "kv_injection"},
            {},
            "a run of method guided was measured, .*measure with --method kv_injection",
        ),
        (
            {"cluster.micro_batch": 2},
            {},
            "cluster.micro_batch 2 was not measured; with times: 4; take one of these, or measure",
        ),
        (
            {"cluster.micro_batch": 16},
            {},
            "cluster.micro_batch 16 has an error: out of memory; with times: 4; take one",
        ),
        (
            {"cluster.micro_batch": "auto"},
            {"rows": [FAILED]},
            r"no times were measured \(micro-batch 16: out of memory\)",
        ),
        ({"cluster.micro_batch": "auto"}, {"rows": []}, r"no times were measured \(it has no rows\)"),
        (
            {},
            {"format": 1},
            "has format 1, and this version of stylemill reads 2; measure again: stylemill bench --json",
        ),
        (
            {},
            {"rows": [{**ROW, "denoise_ms": 0}]},
            r"rows.0.denoise_ms: Input should be greater than 0; .* measure again",
        ),
        (
            {},
            {"rows": [{**ROW, "denoise_ms": None}]},
            "rows.0: a row has all of its times, or an error; the file was edited",
        ),
        ({}, {"gpu": "H200"}, "gpu: Extra inputs are not permitted; the file was edited or damaged"),
    ],
)
def test_a_file_that_has_not_measured_the_job_is_refused(
    bench: Bench, job: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=f"(?i)^--bench {bench.file}: .*{message}"):
        bench.plan(job, values)


def test_all_differences_are_named_at_once(bench: Bench) -> None:
    with pytest.raises(JobError) as raised:
        bench.plan({}, {"size": 256, "dtype": "float32", "compiled": True})
    assert len(str(raised.value).splitlines()) == 3


def test_with_tiling_the_uncompiled_figures_apply(bench: Bench) -> None:
    assert "time" in bench.plan({"cluster.compile": True, "sampling.tiling": "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; give a file that `stylemill bench --json FILE` wrote"),
        (b"rows: 3", "is not JSON: Expecting value: line 1 column 1 (char 0); give"),
        (b"[" * 10**5, "is not JSON: "),
        (b"\xff", "is not JSON: "),
        (b"{}", "is JSON, but not of `stylemill bench`; give"),
        (b"[1]", "is JSON, but not of `stylemill bench`; give"),
        (
            b'{"device": "cpu", "versions": {}, "rows": []}',
            "has format 1, and this version of stylemill reads 2; measure",
        ),
        (b" " * (2 << 20), "is larger than 1,048,576 bytes; give"),
    ],
)
def test_another_file_is_refused(
    bench: Bench, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        bench.file.write_bytes(content)
    job = bench.file.with_name("job.yaml")
    job.write_text(json.dumps(bench.job))
    assert main(["plan", str(job), "--bench", str(bench.file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"--bench {bench.file}: {message}" in err


def test_plan_reads_what_bench_writes(
    bench: Bench, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "128", "--device", "cpu", "--steps", "2", "--tile", "1x1", "--micro-batch", "1"]
    assert main(["bench", str(folder), *words, "--json", str(bench.file)]) == 0
    written = BenchResult.model_validate_json(bench.file.read_bytes())
    assert written.unet_parameters == read_shape(folder).unet_parameters
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(bench.job))
    capsys.readouterr()
    assert main(["plan", str(job), "--bench", str(bench.file), "--set", "cluster.micro_batch=1"]) == 0
    assert "on a CPU, 1 thread (bench.json, micro-batch 1)\n" in capsys.readouterr().out
