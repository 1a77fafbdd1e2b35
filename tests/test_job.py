"""Job files: the values read from YAML and flags, and the one-line message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from stylemill.config.job import Job
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.errors import JobError

SIZE = "a number of pixels or [width, height], each 64 to 8192"
BASE = "manifest: pairs.parquet\noutput: run\nmodel: some/model\n"


@pytest.fixture
def load(tmp_path):
    """Write a job file of `base`, the required keys, and `text`; and load it."""

    def load(text: str = "", overrides: dict | None = None, base: str = BASE) -> Job:
        path = tmp_path / "job.yaml"
        path.write_text(base + text, encoding="utf-8")
        return Job.load(path, overrides)

    return load


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-2", 0.01),
        ("1E-2", 0.01),
        ("1e2", 100.0),
        ("+5.e-1", 0.5),
        (".5e0", 0.5),
        ("2", 2.0),
        ("0.05", 0.05),
    ],
)
def test_numbers_with_exponents_are_numbers(load, text, expected):
    assert load(f"sampling: {{learning_rate: {text}}}").sampling.learning_rate == expected


def test_pyyaml_itself_is_not_changed(load):
    load("name: x")
    assert yaml.safe_load("1e-2") == "1e-2"


def test_text_that_looks_like_a_number_with_an_exponent_is_text(load):
    assert load("name: 1e2x").name == "1e2x"
    assert load("name: '1e2'").name == "1e2"


def test_paths_are_relative_to_the_file_and_paths_of_flags_to_the_working_directory(load, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "here" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    job = load(base="manifest: ~/pairs.parquet\noutput: ../run\nmodel: models/mine\n")
    assert job.manifest == str(tmp_path / "home" / "pairs.parquet")
    assert job.output == str(tmp_path.parent / "run")
    assert job.model.name == str(tmp_path / "models" / "mine")
    assert load().model.name == "some/model"  # no such folder: a hub id
    for flags in ({"model.name": "other"}, {"model": "other"}, {"model": {"name": "./other"}}):
        job = load(overrides={**flags, "output": "out"})
        assert (job.model.name, job.output) == (
            str(tmp_path / "here" / "other"),
            str(tmp_path / "here" / "out"),
        )


def test_sampling_overrides_the_preset_key_by_key(load):
    job = load("preset: text-to-image\nsampling: {steps: 7}\n", {"sampling.seed": 3})
    assert job.sampling == Sampling(**{**PRESETS["text-to-image"], "steps": 7, "seed": 3})
    assert Job.parse(job.model_dump()) == job
    assert load("preset: null").sampling == Sampling()
    assert load("sampling:").sampling == load().sampling  # a section whose keys are all commented out


def test_flags_override_keys_of_the_file_and_leave_its_others(load):
    job = load(
        "image: {size: 128, fit: pad}\n", {"image.size": [64, 128], "cluster.workers": 3, "model.dtype": "float32"}
    )
    assert (job.image.width_height, job.image.fit, job.cluster.workers) == ((64, 128), "pad", 3)
    assert (job.model.name, job.model.dtype) == ("some/model", "float32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown keys, with a suggestion
        ("sampling: {stepz: 3}", "unknown key 'sampling.stepz'; did you mean 'steps'? allowed here: method, steps, "),
        ("smapling: {}", "unknown key 'smapling'; did you mean 'sampling'? allowed here: name, manifest, "),
        ("steps: 3", "unknown key 'steps'; did you mean 'sampling.steps'?"),
        ("cluster: {gpu: 1}", "unknown key 'cluster.gpu'; "),
        ("sampling: {1: 2}", "unknown key 'sampling.1'; "),
        ("model: {name: a, layer: [1]}", "unknown key 'model.layer'; did you mean 'layers'?"),
        # missing keys
        ("model: {revision: main}", "key 'model.name' is missing"),
        # one line for a key, also where it takes several types
        ("image: {size: abc}", f"image.size: expected {SIZE}, not 'abc'"),
        ("image: {size: [512]}", f"image.size: expected {SIZE}, not [512]"),
        ("image: {size: [512, -64]}", f"image.size: expected {SIZE}, not [512, -64]"),
        ("image: {size: 1}", f"image.size: expected {SIZE}, not 1"),
        ("cluster: {workers: many}", "cluster.workers: expected a number of workers, 1 or more, or auto, not 'many'"),
        ("cluster: {workers: 0}", "cluster.workers: expected a number of workers, 1 or more, or auto, not 0"),
        (
            "cluster: {gpus_per_worker: -1}",
            "cluster.gpus_per_worker: expected a whole number of GPUs, a part of one in steps",
        ),
        ("cluster: {gpus_per_worker: 1.5}", "cluster.gpus_per_worker: expected a whole number of GPUs, a part of one"),
        ("cluster: {gpus_per_worker: 0.00001}", "cluster.gpus_per_worker: expected a whole number of GPUs, a part of"),
        ("cluster: {micro_batch: 1.5}", "cluster.micro_batch: expected a number of pairs in one UNet call"),
        ("shards: {pairs_per_shard: []}", "shards.pairs_per_shard: expected a number of pairs, 1 or more, or auto"),
        # values
        ("sampling: {steps: 0}", "sampling.steps: expected greater than or equal to 1, not 0"),
        ("sampling: {steps: '5'}", "sampling.steps: expected a valid integer, not '5'"),
        ("sampling: {steps: 1.0}", "sampling.steps: expected a valid integer, not 1.0"),
        ("sampling: {content_weight: -0.1}", "sampling.content_weight: expected greater than or equal to 0, not -0.1"),
        ("sampling: {content_weight: .nan}", "sampling.content_weight: expected a finite number, not nan"),
        ("sampling: {learning_rate: 0}", "sampling.learning_rate: expected greater than 0, not 0"),
        ("sampling: {adain: 1}", "sampling.adain: expected true or false, not 1"),
        (
            "sampling: {method: guide}",
            "sampling.method: expected 'guided', 'gradient', 'optimization' or 'kv_injection', not",
        ),
        ("sampling: {steps: 5, start_step: 5}", "sampling: start_step 5 leaves no guided step before steps 5"),
        ("sampling: [1]", "sampling: expected keys below it: method, steps, "),
        ("image:", "image: expected keys below it: size, fit, style_size, not None"),
        (
            "model: {name: a, revision: 123}",
            "model.revision: expected text (in quotes, where YAML would read another type), not 123",
        ),
        ("model: {name: a, layers: [1, 2.5]}", "model.layers: expected numbers of self-attention layers from 0 to"),
        ("model: {name: a, layers: 15-10}", "model.layers: expected numbers of self-attention layers from 0 to"),
        ("name: no", "name: expected text (in quotes, where YAML would read another type), not False"),
        ("preset: nope", "preset 'nope' is not one of: style-transfer, "),
        ("preset: [nope]", "preset ['nope'] is not one of: style-transfer, "),
        (
            f"sampling: {{seed: {2**63 - 1}}}\nimages_per_pair: 2",
            "sampling.seed 9223372036854775807 with images_per_pair 2 gives an image a seed beyond 2^63 - 1; the larg",
        ),
        ("retries: -1", "retries: expected greater than or equal to 0, not -1"),
        ("max_failed_fraction: 1.5", "max_failed_fraction: expected less than or equal to 1, not 1.5"),
        (
            "name: [" + "x, " * 999 + "x]",
            "name: expected text (in quotes, where YAML would read another type), not ['x', 'x', 'x', ",
        ),
        # YAML
        ("output: other", "line 4, column 1: not valid YAML: duplicate key 'output'"),
        ("image: {fit: pad, fit: crop}", "line 4, column 19: not valid YAML: duplicate key 'fit'"),
        ("\tname: x", "line 4, column 1: not valid YAML: found character '\\t' that cannot start any token; indent w"),
        ("image: {size: 1", "line 5, column 1: not valid YAML: "),
        ("name: !!python/object:os.system x", "line 4, column 7: not valid YAML: could not determine a constructor"),
        ("name: 2024-99-99", "not valid YAML: month must be in 1..12"),
        ("name: \x01", "not valid YAML: "),
        ("? [a]\n: b", "line 4, column 3: not valid YAML: found unhashable key"),
    ],
)
def test_each_mistake_gives_a_message_of_one_line(load, tmp_path, text, message):
    base = BASE.replace("model: some/model\n", "") if text.startswith("model:") else BASE
    with pytest.raises(JobError) as caught:
        load(text + "\n", base=base)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path / 'job.yaml'}: {message}"), error
    assert "\n" not in error
    assert "https://errors.pydantic" not in error


def test_several_mistakes_give_one_line_each(load, tmp_path):
    with pytest.raises(JobError) as caught:
        load("sampling: {steps: 0, adain: x}\nimage: {size: abc}\n", {"cluster.workers": "many"})
    lines = str(caught.value).removeprefix(f"{tmp_path / 'job.yaml'}").split(f"\n{tmp_path / 'job.yaml'}")
    assert [line.split(" expected")[0] for line in lines] == [
        ": sampling.steps:",
        ": sampling.adain:",
        ": image.size:",
        ", overridden by a flag: cluster.workers:",
    ]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("10-12", (10, 11, 12)),
        ("7", (7,)),
        ("[3, 10 - 11, mid_block]", (3, 10, 11, "mid_block")),
        ("up_blocks.3.attentions.2", ("up_blocks.3.attentions.2",)),
        ("null", None),
    ],
)
def test_layers_are_given_by_number_range_or_name(load, text, layers):
    job = load(f"model: {{name: a, layers: {text}}}\n", base=BASE.replace("model: some/model\n", ""))
    assert job.model.layers == layers
    assert Job.parse(job.model_dump()) == job
    assert Job.parse(json.loads(job.model_dump_json())) == job


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a job file has keys and values"),
        (b"- manifest: a\n- output: b\n", "a job file has keys and values"),
        (b"just words", "a job file has keys and values"),
        (b"output: run\nmodel: m\n", "key 'manifest' is missing; a job names at least manifest, output, model"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b'manifest: "a\\0b"\noutput: run\nmodel: m\n', "manifest, output and model must be paths: "),
        (b"manifest: a\noutput: ~no-such-user/x\nmodel: m\n", "manifest, output and model must be paths: "),
    ],
)
def test_files_that_are_no_jobs_are_refused(tmp_path, content, message):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(JobError) as caught:
        Job.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_job_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(JobError, match=r"absent\.yaml: no such job file$"):
        Job.load(tmp_path / "absent.yaml")
    with pytest.raises(JobError, match=r": the job file cannot be read: Is a directory$"):
        Job.load(tmp_path)


def test_the_job_files_of_this_repository_load():
    for path in sorted((Path(__file__).parents[1] / "jobs").glob("*.yaml")):
        assert Job.load(path).manifest.startswith("/")
