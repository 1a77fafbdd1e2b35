"""Plans: fixed shards, the fingerprint, and costs that equal those of the engine."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stylemill.config.job import Job
from stylemill.errors import JobError, ManifestError, ModelError, OutputError
from stylemill.manifest import ImageRef, Row
from stylemill.models.attention_layers import attention_layers
from stylemill.planning.cost import count_cost
from stylemill.planning.fingerprint import fingerprint_differences, fingerprint_sha256
from stylemill.planning.model_shape import ModelShape, read_shape
from stylemill.planning.plan import Plan, plan
from stylemill.store.run_file import RunFile

# The configuration of Stable Diffusion 1.5's UNet, as far as it matters here.
SD15 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
}


def _shape(unet: dict, parameters: int = 0) -> ModelShape:
    channels = unet["block_out_channels"]
    return ModelShape(tuple(attention_layers(unet)), channels[0], len(channels), 4, 8, parameters)


def _write_weights(path: Path) -> None:
    """A million parameters. The tensor's values are a hole in the file, which takes no space."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1000, 1000], "data_offsets": [0, 1_000_000]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 1_000_000)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A model folder with the shape of SD 1.5; its weights are too few and all zero."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    (folder / "unet" / "config.json").write_text(json.dumps({**SD15, "in_channels": 4}))
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [128, 256, 512, 512]}))
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        (folder / name).write_text("{}")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        _write_weights(folder / f"{name}.safetensors")
    return folder


def _write_manifest(path: Path, contents: int, styles: int, tile: int | None = None) -> Path:
    pairs = [(f"c{c}.png", f"s{s}.png") for c in range(contents) for s in range(styles)]
    table = pa.table({"content": [c for c, _ in pairs], "style": [s for _, s in pairs]})
    pq.write_table(table, path, row_group_size=tile)
    return path


@pytest.fixture
def job(tmp_path, model) -> Job:
    return Job.parse(
        {
            "name": "test",
            "manifest": str(_write_manifest(tmp_path / "pairs.parquet", 6, 4)),
            "output": str(tmp_path / "run"),
            "model": str(model),
            "cluster": {"workers": 1, "gpus_per_worker": 0.0},
            "shards": {"pairs_per_shard": 8},
        }
    )


def _with(job: Job, **changes) -> Job:
    values = job.model_dump()
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return Job.parse(values)


def test_every_row_is_in_one_shard(job):
    made = plan(_with(job, shards={"pairs_per_shard": 7}))
    assert (made.rows, made.shards) == (24, 4)
    assert [row for shard in range(made.shards) for row in made.rows_of(shard)] == list(range(24))
    assert made.rows_of(3) == range(21, 24)
    with pytest.raises(IndexError):
        made.rows_of(4)


def test_a_plan_is_small_picklable_and_writes_nothing(job, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    made = plan(job)
    made.describe()
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    sent = pickle.dumps(made)
    assert len(sent) < 10_000
    assert pickle.loads(sent) == made


def test_a_job_file_is_planned_with_overrides(job, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({"manifest": "pairs.parquet", "output": "run", "model": "./model"}))
    made = plan(path, {"sampling.steps": 3, "shards.pairs_per_shard": 5})
    assert (made.job.sampling.steps, made.shards) == (3, 5)
    with pytest.raises(TypeError):
        plan(job, {"sampling.steps": 3})


def test_an_automatic_shard_size_is_kept_from_the_first_start(job):
    auto = _with(job, shards={"pairs_per_shard": "auto"})
    first = plan(auto)
    assert "chosen for 1 worker, as the fastest by estimate\n" in first.describe()
    wide = _with(auto, cluster={"workers": 6})
    assert plan(wide).pairs_per_shard != first.pairs_per_shard
    Path(job.output).mkdir()
    (Path(job.output) / "job.json").write_bytes(
        RunFile(
            first.fingerprint, first.fingerprint_sha256, first.rows, first.shards, first.pairs_per_shard, {}, {}
        ).to_bytes()
    )
    again = plan(wide)
    assert again.fingerprint == first.fingerprint
    assert "that of the run in this folder\n" in again.describe()
    assert "set by the job\n" in plan(job).describe()
    assert plan(job).pairs_per_shard == 8


def test_fingerprint_contains_what_determines_images(job, model):
    base = plan(job).fingerprint
    assert json.loads(json.dumps(base)) == base
    unrelated = _with(
        job,
        cluster={"workers": 7, "threads": 2, "micro_batch": 2, "feature_budget_mb": 9},
        checkpoint={"every_steps": 1},
        retries=9,
        max_failed_fraction=1.0,
        output=job.output + "-elsewhere",
        name="other",
    )
    assert plan(unrelated).fingerprint == base

    related = _with(
        job,
        sampling={"steps": 30, "content_weight": 0.3},
        image={"size": (512, 576), "fit": "pad"},
        shards={"pairs_per_shard": 4, "image_format": "jpeg"},
        model={"layers": [10, 11], "dtype": "float16"},
    )
    assert fingerprint_differences(base, plan(related).fingerprint) == [
        "model.dtype: run has auto, job has float16",
        "model.layers: run has the last six, job has 10,11",
        "sampling.steps: run has 50, job has 30",
        "sampling.content_weight: run has 0.25, job has 0.3",
        "image.size: run has 512x512, job has 512x576",
        "image.fit: run has crop, job has pad",
        "shards.pairs_per_shard: run has 8, job has 4",
        "shards.image_format: run has png, job has jpeg",
        "shards.quality: run has nothing, job has 95",
    ]
    assert fingerprint_sha256(base) == plan(job).fingerprint_sha256
    assert fingerprint_sha256(dict(reversed(base.items()))) == fingerprint_sha256(base)
    assert fingerprint_differences(base, dict(base)) == []

    (model / "scheduler" / "scheduler_config.json").write_text('{"steps_offset": 1}')
    (difference,) = fingerprint_differences(base, plan(job).fingerprint)
    assert difference.startswith("model.scheduler/scheduler_config.json: run has 44136fa355b3")


def test_passes_are_counted_for_each_method(job):
    cost = plan(job).cost()  # three shards of 2 contents × 4 styles
    assert (cost.contents, cost.styles, cost.blocks) == (6, 4, 1)
    assert (cost.denoise, cost.gradient) == (24 * 50, 24 * 50)
    assert (cost.shared_features, cost.unshared_features) == (3 * (2 + 4) * 50, 24 * 2 * 50)
    assert cost.with_sharing == 24 * 100 + 900

    cost = plan(_with(job, sampling={"guidance_scale": 7.5, "iterations": 3, "start_step": 10})).cost()
    assert (cost.denoise, cost.gradient, cost.shared_features) == (24 * 100, 24 * 3 * 40, 3 * 6 * 40)

    cost = plan(_with(job, sampling={"iterations": 0})).cost()
    assert (cost.denoise, cost.gradient, cost.shared_features) == (24 * 50, 0, 0)

    cost = plan(_with(job, sampling={"content_weight": 0.0})).cost()
    assert (cost.shared_features, cost.unshared_features) == (3 * 4 * 50, 24 * 50)  # λ = 0: no features of contents

    cost = plan(_with(job, preset="style-transfer", sampling={"method": "optimization", "steps": 200})).cost()
    assert (cost.denoise, cost.gradient, cost.shared_features) == (0, 24 * 200, 3 * 6 * 200)


_CFG = {"guidance_scale": 3.0}


@pytest.mark.parametrize("budget", [1, 4096])
@pytest.mark.parametrize(
    "settings",
    [
        {"start_step": 1, **_CFG},
        {"end_step": 1},
        {"iterations": 0},
        {"init": "content", "strength": 0.5, **_CFG},
        {"method": "gradient", "end_step": 1, **_CFG},
        {"method": "optimization", "start_step": 1},
        {"method": "optimization", "end_step": 1, "init": "noise"},
        {"method": "kv_injection", **_CFG},
        {"method": "kv_injection", "iterations": 0, "start_step": 1},
        {"method": "kv_injection", "init": "content", "strength": 0.5, "content_weight": 0.0},
    ],
    ids=str,
)
def test_the_engine_makes_the_planned_passes(job, tmp_path, folder, engine32, settings, budget):
    """Two shards of 8 and 4 pairs, and pairs of two kinds: λ = 0 in two rows."""
    from stylemill.engine import Engine, InputImage, Pair

    settings = {"steps": 2, "iterations": 2, **settings}
    weights = [None] * 12
    weights[2], weights[9] = 0.0, 0.0
    manifest = _write_manifest(tmp_path / "two_kinds.parquet", 3, 4)
    pq.write_table(pq.read_table(manifest).append_column("content_weight", pa.array(weights, pa.float64())), manifest)
    cluster = {"micro_batch": 2, "feature_budget_mb": budget}
    changes = {"model": {"name": str(folder)}, "sampling": settings, "cluster": cluster, "image": {"size": 128}}
    made = plan(_with(job, manifest=str(manifest), **changes))
    cost = made.cost()
    assert cost.blocks > 1 if budget == 1 else cost.blocks == 1

    engine = Engine(engine32.model, micro_batch=2, feature_budget_mb=budget)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert made.shards == 2
    for shard in range(made.shards):
        rows = made.rows_of(shard)
        pairs = [
            Pair(
                (InputImage(row.styles[0].key, pixels),),
                (128, 128),
                content=InputImage(row.content.key, pixels),
                content_weight=row.content_weight,
            )
            for row in made.manifest.rows(rows.start, rows.stop)
        ]
        *_, state = engine.sample(pairs, made.job.sampling)
        engine.distances(state, made.job.sampling)
    distance = engine.passes.pop("distance")
    assert 0.6 * cost.distance <= distance <= cost.distance
    planned_passes = {"denoise": cost.denoise, "gradient": cost.gradient, "feature": cost.shared_features}
    assert engine.passes == {kind: passes for kind, passes in planned_passes.items() if passes}


def test_features_above_the_budget_are_split_into_blocks(job):
    rows = [Row(i, i, str(i), ImageRef(f"c{i}"), (ImageRef(f"s{i}"),)) for i in range(8)]  # no shared image
    shape = _shape(SD15)
    part = shape.feature_elements(None, (64, 64)) * 4  # Q, K or V of an image: 5.9 million scalars in float32
    budget = 6 * part // 2**20 + 1  # enough for two pairs: K and V of a style, Q of a content
    blocked = _with(job, cluster={"feature_budget_mb": budget, "micro_batch": 2})
    cost = count_cost(blocked, [rows], shape)
    assert (cost.blocks, cost.shared_features, cost.unshared_features) == (4, 16 * 50, 16 * 50)
    assert cost.memory.features == 6 * part

    tile = [Row(i, i, str(i), ImageRef(f"c{i // 4}"), (ImageRef(f"s{i % 4}"),)) for i in range(8)]
    cost = count_cost(blocked, [tile], shape)
    assert (cost.blocks, cost.shared_features, cost.unshared_features) == (4, 4 * 3 * 50, 16 * 50)


def test_layers_and_their_feature_sizes_follow_from_the_configuration():
    sd15, sdxl = _shape(SD15), _shape(SDXL)
    assert (len(sd15.attention), len(sdxl.attention)) == (16, 70)
    assert sd15.attention[6] == (3, 1280, "mid_block.attentions.0.transformer_blocks.0.attn1")
    assert [layer[:2] for layer in sd15.attention[10:]] == [(1, 640)] * 3 + [(0, 320)] * 3
    assert sd15.feature_elements(None, (64, 64)) == 3 * 1024 * 640 + 3 * 4096 * 320
    assert sd15.feature_elements((6,), (64, 32)) == 8 * 4 * 1280
    # 16 × 16 tile in fp16: K, V of styles and Q of contents
    assert 3 * 16 * sd15.feature_elements(None, (64, 64)) * 2 / 2**30 == pytest.approx(0.53, abs=0.01)


@pytest.mark.parametrize(
    ("unet", "side", "measured"),  # GiB in fp16 that each further pair took: benchmarks/README.md, On a GPU
    [(SD15, 64, (59.60 - 3.00) / 63), (SDXL, 128, (45.00 - 11.46) / 7)],
    ids=["SD 1.5 at 512²", "SDXL at 1024²"],
)
def test_the_memory_of_a_gradient_on_a_gpu_is_estimated_a_little_above_what_was_measured(unet, side, measured):
    shape = replace(_shape(unet), is_sdxl=unet is SDXL)
    estimate = shape.activations(on_gpu=True) * shape.channels * side**2 * 2 / 2**30
    assert measured <= estimate <= 1.2 * measured
    assert shape.activations(on_gpu=False) > 2 * shape.activations(on_gpu=True)


def test_memory_is_estimated_from_the_headers_of_the_weights(job):
    memory = plan(job).cost().memory
    assert memory.dtype == "float32"
    assert memory.weights == 3 * 1_000_000 * 4
    assert memory.state == (8 + 6) * 4 * 64 * 64 * 4
    assert memory.features == (4 * 2 + 2) * (3 * 1024 * 640 + 3 * 4096 * 320) * 4  # K, V of 4 styles, Q of 2 contents
    assert memory.activations / 2**30 == pytest.approx(4.4, abs=0.1)
    halved = plan(_with(job, model={"dtype": "float16"}, cluster={"micro_batch": 1})).cost().memory
    assert halved.weights * 2 == memory.weights
    assert halved.total == pytest.approx(halved.weights + memory.features / 2 + memory.state + memory.activations / 2)


def test_the_description_of_a_plan(job, tmp_path):
    text = plan(_with(job, shards={"pairs_per_shard": 7})).describe()
    for expected in (
        "rows            24\n",
        "unique images   6 contents, 4 styles\n",
        "shards          4 of 7 pairs, the last of 3\n",
        "UNet passes     3,600 with sharing, 4,800 without\n",
        "an estimate\n",
        f"output          {tmp_path / 'run'}",
    ):
        assert expected in text, text


def test_a_hub_model_is_pinned_before_it_is_downloaded(job, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*_, **__):
        raise LocalEntryNotFoundError("not cached")

    class Hub:
        def model_info(self, repo_id, *, revision=None):
            return huggingface_hub.ModelInfo(id=repo_id, sha="f" * 40)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    made = plan(_with(job, model={"name": "org/model"}))
    assert made.fingerprint["model.commit"] == "f" * 40
    assert made.job.model.revision == "f" * 40  # workers load this commit, even if the hub changes
    assert "org/model@ffff" in made.describe()
    assert "once the model is on this machine" in made.describe()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": {"size": 500}}, JobError, "500×500: sides must be multiples of 64 for this model, such as 512×512"),
        ({"model": {"layers": [10, 16]}}, ModelError, r"layers: there is no self-attention layer 16; .* has 0 down_bl"),
        ({"model": {"layers": "mid_block.attn2"}}, ModelError, r"layers: no self-attention layer is called 'mid_blo"),
        ({"model": {"layers": "up_blocks.3"}}, ModelError, r"'up_blocks.3' matches several layers: 13 up_blocks.3.att"),
        ({"model": {"layers": ["6", "mid_block"]}}, ModelError, r"no self-attention layer is called '6'"),
        ({"model": {"layers": [6, "mid_block"]}}, ModelError, r"layers \[6, 'mid_block'\]: choose distinct layers"),
        ({"sampling": {"layer_weights": [1.0]}}, JobError, r"layer_weights has 1 number for the 6 layers of model.l"),
        ({"model": {"name": "/no/model"}}, ModelError, "no such folder"),
        ({"manifest": "/no/pairs.parquet"}, ManifestError, "no such manifest"),
        ({"output": "gs://bucket/run"}, OutputError, "only local folders"),
    ],
)
def test_jobs_that_cannot_be_planned_are_rejected(job, changes, error, message):
    with pytest.raises(error, match=message):
        plan(_with(job, **changes))


def test_a_broken_model_configuration_is_named(model):
    (model / "unet" / "config.json").write_text('{"block_out_channels": 3}')
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(model)
    (model / "vae" / "config.json").write_text("[")
    with pytest.raises(ModelError, match=r"vae/config\.json: cannot be read"):
        read_shape(model)


def test_repeated_rows_are_numbered_in_the_plan(job, tmp_path):
    pq.write_table(pa.table({"style": ["a.png", "b.png", "a.png", "a.png"]}), tmp_path / "pairs.parquet")
    made: Plan = plan(_with(job, shards={"pairs_per_shard": 2}))
    assert made.occurrences == {2: 2, 3: 3}
