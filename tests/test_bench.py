"""`stylemill bench`: the table and the JSON of what it measured, with the untrained model on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from small_unet import small_unet
from stylemill.bench import benchmark
from stylemill.bench.measure import measure_run, needed_passes, peak_memory, step_seconds
from stylemill.bench.pass_cost import PASS_COST, known_pass_cost
from stylemill.cli.app import main
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine
from stylemill.engine import calls as unet_calls
from stylemill.errors import DeviceMemoryError

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--size", "64", "--device", "cpu", "--steps", "2")


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with the untrained model: exit code, stdout and stderr."""

    def run_bench(*words: str) -> tuple[int, str, str]:
        code = main(["bench", str(folder), *SMALL, *words])
        return code, *capsys.readouterr()

    return run_bench


def table_of(lines: str) -> list[dict[str, str]]:
    """The rows of the table, each by the titles of its columns."""
    header, *rows = lines[lines.index("way ") :].splitlines()
    titles = header.replace("denoise ms", "denoise_ms").replace("features ms", "features_ms")
    titles = titles.replace("gradient ms", "gradient_ms").replace("× naive", "times_naive")
    cells = [row.split() for row in rows]
    if "times_naive" in titles:  # the naive row has no ratio
        cells = [[*row[:8], "", *row[8:]] if row[0] == "naive" else row for row in cells]
    return [dict(zip(titles.split(), row, strict=True)) for row in cells]


def test_table_and_json_agree_and_the_ratio_to_one_pair_at_a_time_is_there(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, out, err = run("--micro-batch", "2", "--tile", "1x2", "--compare", "naive", "--json", str(file))
    assert (code, err) == (0, "")
    found = json.loads(file.read_text())
    naive, lockstep = found["rows"]
    assert (naive["way"], lockstep["way"]) == ("naive", "lockstep")
    assert [row["way"] for row in table_of(out)] == ["naive", "lockstep"]
    for row, measured in zip(table_of(out), found["rows"], strict=True):
        assert row["micro-batch"] == str(measured["micro_batch"])
        assert row["denoise_ms"] == f"{measured['denoise_ms']:.4g}"
        assert row["features_ms"] == f"{measured['features_ms']:.4g}"
        assert row["gradient_ms"] == f"{measured['gradient_ms']:.4g}"
        assert row["s/image"] == f"{measured['seconds_per_image']:.4g}"
        assert row["images/s"] == f"{measured['images_per_second']:.4g}"
        assert row["passes"] == f"{sum(measured['passes'].values()):.4g}"
        assert measured["seconds_per_image"] == pytest.approx(1 / measured["images_per_second"])
        assert measured["images_lost"] == 0
    assert lockstep["times_naive"] == pytest.approx(lockstep["images_per_second"] / naive["images_per_second"])
    assert table_of(out)[1]["times_naive"] == f"{lockstep['times_naive']:.2f}"
    assert naive["passes"] == {"denoise": 1, "feature": 2, "gradient": 1}
    assert lockstep["passes"] == {"denoise": 1, "feature": 1.5, "gradient": 1}
    assert (found["size"], found["tile"], found["sampling"]["steps"], found["dtype"]) == (64, [1, 2], 2, "float32")
    assert found["versions"].keys() >= {"stylemill", "torch", "diffusers"}
    assert found["date"] in out
    assert found["rates"] == {}, "the operations of this UNet were not counted"


def test_json_to_stdout_leaves_the_table_to_stderr(run: Run) -> None:
    code, out, err = run("--micro-batch", "1", "--tile", "1x1", "--json", "-")
    assert code == 0
    assert [row["micro_batch"] for row in json.loads(out)["rows"]] == [1]
    assert [row["micro-batch"] for row in table_of(err)] == ["1"]


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (Sampling(steps=2), {"denoise": 1, "feature": 5 / 6, "gradient": 1}),
        (Sampling(steps=2, guidance_scale=7.5, iterations=2), {"denoise": 2, "feature": 5 / 6, "gradient": 2}),
        (Sampling(steps=2, content_weight=0), {"denoise": 1, "feature": 0.5, "gradient": 1}),
        (Sampling(steps=2, method="optimization"), {"feature": 5 / 6, "gradient": 1}),
        (Sampling(steps=2, method="kv_injection"), {"denoise": 1, "feature": 5 / 6}),
        (
            Sampling(steps=4, guided_every=2, reuse_prediction=True),
            {"denoise": 0.5, "feature": 5 / 12, "gradient": 0.5},
        ),
    ],
    ids=["guided", "guidance and two iterations", "without content loss", "optimization", "injection", "opt-ins"],
)
def test_passes_are_counted_as_the_method_needs_them(engine32: Engine, settings: Sampling, passes: Any) -> None:
    """2 contents × 3 styles: (C + S) / (C·S) = 5/6 features a pair and step."""
    found = measure_run(engine32, settings, (2, 3), 64, 4)
    assert found.passes == pytest.approx(passes)
    assert found.needed == pytest.approx(passes) == needed_passes(settings, (2, 3))
    assert (found.pairs, found.steps, found.images_lost) == (6, settings.steps, 0)


def test_a_run_is_calculated_from_the_steps_of_each_kind() -> None:
    assert step_seconds(Sampling(steps=4), [9, 1, 5, 2]) == [2] * 4, "the first step warms up"
    assert step_seconds(Sampling(steps=6, guided_every=2), [9, 1, 5, 2]) == [5, 1.5] * 3
    assert step_seconds(Sampling(steps=5, reuse_prediction=True), [9, 1, 3]) == [2] * 5, "no first step was timed"
    assert step_seconds(Sampling(steps=2), [9]) == [9, 9]


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the calls that were compiled, of a small UNet, to graphs: making kernels takes minutes."""
    real, load, names = torch.compile, Engine.load, []

    def load_small(*words: Any, **options: Any) -> Engine:
        return Engine(replace(load(*words, **options).model, unet=small_unet()))

    def compile_call(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        names.append(call.__name__)
        return real(call, **options)

    monkeypatch.setattr(Engine, "load", load_small)
    monkeypatch.setattr(unet_calls, "COMPILER", {"backend": "aot_eager"})
    monkeypatch.setattr(torch, "compile", compile_call)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield names
    torch._dynamo.reset()


def test_with_compile_the_one_size_of_a_job_is_measured_and_naive_stays_as_it_is(
    run: Run, compiled_calls: list[str]
) -> None:
    code, out, err = run("--compile", "--tile", "1x2", "--compare", "naive", "--json", "-")
    assert code == 0
    found = json.loads(out)
    assert (found["compiled"], found["deterministic"]) == (True, True)
    assert [(row["way"], row["micro_batch"]) for row in found["rows"]] == [("naive", 1), ("lockstep", 2)]
    assert "\nengine  compiled UNet, deterministic gradients; naive: UNet not compiled, fastest gradients\n" in err
    assert compiled_calls.count("_losses") == 1, "of one engine"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "noise and activations; losses"


def test_the_fastest_gradients_are_those_of_a_job_that_is_not_deterministic(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = unet_calls.repeatable_backward
    monkeypatch.setattr(
        unet_calls, "repeatable_backward", lambda repeatable: asked.append(repeatable) or real(repeatable)
    )
    _, out, err = run("--no-deterministic", "--tile", "1x1", "--micro-batch", "1", "--json", "-")
    assert json.loads(out)["deterministic"] is False
    assert "\nengine  UNet not compiled, fastest gradients\n" in err
    assert set(asked) == {False}
    run("--tile", "1x1", "--micro-batch", "1")
    assert set(asked) == {False, True}


def limit_memory(engine: Engine, pairs: int) -> None:
    """Let the UNet fail like CUDA out of memory for more than `pairs` pairs in a call."""
    real = engine.model.unet.forward

    def limited(z: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(z) > pairs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 10 MiB free.")
        return real(z, *rest, **options)

    engine.model.unet.forward = limited


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine that the command loads has memory for one pair in a UNet call."""
    real = Engine.load

    def load(*words: Any, **options: Any) -> Engine:
        engine = real(*words, **options)
        limit_memory(engine, 1)
        return engine

    monkeypatch.setattr(Engine, "load", load)


@pytest.mark.usefixtures("small_memory")
def test_a_micro_batch_that_does_not_fit_is_a_row_and_the_next_one_follows(run: Run) -> None:
    code, out, _ = run("--micro-batch", "2", "--micro-batch", "1", "--tile", "1x2")
    assert code == 0
    *_, first, second = out.splitlines()
    assert first.split() == ["lockstep", "64", "2", "out", "of", "memory"]
    assert second.split()[:3] == ["lockstep", "64", "1"]


@pytest.mark.usefixtures("small_memory")
def test_by_default_the_first_micro_batch_that_does_not_fit_is_the_last(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_default_micro_batches", lambda *_: [1, 2, 4])
    _, out, _ = run("--tile", "1x4", "--json", "-")
    assert [row["error"] for row in json.loads(out)["rows"]] == [None, "out of memory"]


def test_a_run_is_not_measured_with_a_smaller_micro_batch_than_was_asked_for(folder: Path) -> None:
    engine = Engine.load(folder, dtype="float32", device="cpu")
    limit_memory(engine, 1)
    with pytest.raises(DeviceMemoryError, match="with 2 pairs in a UNet call"):
        measure_run(engine, Sampling(steps=2), (1, 2), 64, 2)


def test_peak_memory_is_zero_on_a_cpu() -> None:
    with peak_memory(torch.device("cpu")) as memory:
        torch.zeros(10**6)
    assert memory.gib == 0


SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "layers_per_block": 2}


def test_operations_are_known_for_the_architectures_and_sizes_they_were_counted_on() -> None:
    assert known_pass_cost(SD15, 512) is PASS_COST["sd15"]
    assert known_pass_cost(SD15, 768) is None
    assert known_pass_cost(SD15 | {"cross_attention_dim": 1024}, 512) is None, "SD 2.x"
    assert PASS_COST["sd15"].tflop({"denoise": 2, "gradient": 1}) == pytest.approx(3 * 0.803 + 0.923)


def test_where_the_operations_are_known_the_table_has_rates(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "known_pass_cost", lambda *_: PASS_COST["sd15"])
    _, out, err = run("--micro-batch", "1", "--tile", "1x1", "--json", "-")
    (row,) = json.loads(out)["rows"]
    best = max(rate for name, rate in json.loads(out)["rates"].items() if "TFLOP" in name)
    assert row["utilisation"] == pytest.approx(row["tflops"] / best)
    assert table_of(err)[0]["TFLOP/s"] == f"{row['tflops']:.4g}"
    assert table_of(err)[0]["utilisation"] == f"{row['utilisation']:.1%}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "100"], "--size 100: must be a multiple of 64 for this model, such as 128"),
        (["--size", "8"], "image.size: expected a number of pixels or [width, height], each 64 to 8192, not 8"),
        (["--random", "sd15"], "--random sd15: give one of them"),
        (["--random", "flux"], "'flux' is not one of 'sd15', 'sdxl'"),
        (["--device", "tpu"], "--device tpu: no such device; take cpu, cuda, or cuda:1"),
        (["--device", "meta"], "--device meta: stylemill works on cpu and cuda"),
        (["--device", "cuda:99"], "CUDA GPUs on this machine; take --device cpu"),
        (["--preset", "sketch"], "preset 'sketch' is not one of: style-transfer"),
        (["--steps", "0"], "sampling.steps: expected greater than or equal to 1, not 0"),
        (["--tile", "8"], "'--tile': '8': write contents x styles"),
        (["--tile", "0x8"], "--tile 0x8: a tile has at least one content and one style"),
        (["--micro-batch", "0"], "--micro-batch 0: take a number of pairs, 1 or more"),
        (["--tile", "1x2", "--micro-batch", "4"], "--micro-batch 4: the tile 1x2 has 2 pairs; take a larger --tile"),
        (["--preset", "texture-expansion", "--size", "1024"], "take --size 512, the size of a window"),
        (["--json", "/nowhere/bench.json"], "--json /nowhere/bench.json: cannot be written; name a file in a folder"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["bench", str(folder), "--device" if "--device" not in words else "--dtype", "auto", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_an_unknown_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "absent"), *SMALL]) == 2
    assert "absent': no such folder" in capsys.readouterr().err
