"""Model folders and hub ids: which are accepted, how they are resolved, and the error messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.numpy import save_file

from stylemill.errors import ModelError
from stylemill.models.file_sets import MODEL
from stylemill.models.folder import model_paths
from stylemill.models.resolve import fetch_model_folder, resolve_model
from stylemill.models.safetensors_file import count_parameters

COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"


def _write_weights(path: Path, shape: tuple[int, ...] = (2, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.zeros(shape, np.float32)}, path)


def _write_model(folder: Path) -> Path:
    """The files of the SD 1.5 repository, with variants and single-file checkpoints among them."""
    for name in (
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "v1-5-pruned-emaonly.safetensors",
    ):
        _write_weights(folder / name)
    for name in (
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.bin",
        "v1-5-pruned.ckpt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stylemill" / "digests"


@pytest.fixture
def model(tmp_path) -> Path:
    return _write_model(tmp_path / "model")


def test_a_folder_is_identified_by_the_files_that_are_loaded(model):
    resolved = resolve_model(str(model))
    assert resolved.folder == model
    assert resolved.commit is None
    assert list(resolved.digests) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert resolved.identity()["model.vae/config.json"] == resolved.digests["vae/config.json"]
    assert fetch_model_folder(str(model)) == model


def test_identity_depends_on_content_and_not_on_location(model, tmp_path):
    before = resolve_model(str(model)).identity()
    shutil.copytree(model, tmp_path / "copy")
    assert resolve_model(str(tmp_path / "copy")).identity() == before
    assert resolve_model(str(model)).label.startswith("model@")
    _write_weights(model / "unet" / "diffusion_pytorch_model.safetensors", (4, 3))
    changed = resolve_model(str(model)).identity()
    assert [key for key in before if changed[key] != before[key]] == ["model.unet/diffusion_pytorch_model.safetensors"]


def test_digests_are_cached_and_a_failing_cache_is_not_an_error(model, cache, monkeypatch):
    digests = resolve_model(str(model)).digests
    assert len(list(cache.iterdir())) == len(digests)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("the file was read again"))
        assert resolve_model(str(model)).digests == digests
    shutil.rmtree(cache)
    cache.write_text("a file at the path of the folder")
    assert resolve_model(str(model)).digests == digests


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("unet", "lacks unet/config.json, unet/diffusion_pytorch_model.safetensors"),
        ("vae/config.json", "lacks vae/config.json"),
        ("tokenizer/merges.txt", "lacks tokenizer/merges.txt"),
        ("scheduler", "lacks scheduler/scheduler_config.json"),
    ],
)
def test_missing_files_are_named(model, broken, message):
    (model / "v1-5-pruned.ckpt").unlink()
    (model / "v1-5-pruned-emaonly.safetensors").unlink()
    shutil.rmtree(model / broken) if (model / broken).is_dir() else (model / broken).unlink()
    with pytest.raises(ModelError, match=message):
        resolve_model(str(model))


def test_unsupported_weight_files_get_advice(model):
    for path in (model / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match=r"pickled only \(unet/diffusion_pytorch_model.bin\).*convert once"):
        resolve_model(str(model))
    (model / "unet" / "diffusion_pytorch_model.bin").unlink()
    (model / "v1-5-pruned.ckpt").unlink()
    with pytest.raises(ModelError, match=r"single-file checkpoint \(v1-5-pruned-emaonly.safetensors\).*from_single"):
        resolve_model(str(model))
    (model / "v1-5-pruned-emaonly.safetensors").unlink()
    _write_weights(model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ModelError, match=r"only a variant.*rename it to diffusion_pytorch_model.safetensors"):
        resolve_model(str(model))


def test_weights_may_be_split_into_numbered_files(model):
    unet = model / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    for piece in (1, 2):
        _write_weights(unet / f"diffusion_pytorch_model-0000{piece}-of-00002.safetensors")
    paths = [path for path in model_paths(model) if path.startswith("unet/diffusion")]
    assert paths == [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert resolve_model(str(model)).folder == model


@pytest.mark.parametrize("kept", [0, 5, 20, -1])
def test_truncated_weights_are_rejected(model, kept):
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    assert count_parameters(weights) == 6
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelError, match="truncated"):
        resolve_model(str(model))


def test_parameters_are_counted_without_reading_weights_or_importing_torch(tmp_path):
    size = 2**30
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    code = """
import re, sys
from pathlib import Path
from stylemill.models.safetensors_file import count_parameters

def peak_memory_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak_memory_kb()
print(count_parameters(Path(sys.argv[1])), peak_memory_kb() - before, "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "sparse.safetensors")]
    parameters, growth_kb, torch = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(parameters) == size
    assert int(growth_kb) < 64 * 1024
    assert torch == "False"


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "a/b/c"])
def test_the_hub_is_not_asked_for_a_name_that_can_only_be_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="no such folder") as error:
        resolve_model(name)
    assert name in str(error.value)


class FakeHub:
    """A hub with one model, and its local cache. With `error`, the hub answers every request with it."""

    def __init__(self, cache: Path) -> None:
        self.snapshots = cache / "snapshots"
        self.error: Exception | None = None
        self.downloads: list[tuple[str, str | None]] = []

    def model_info(self, repo_id: str, *, revision: str | None = None, timeout: float | None = None) -> SimpleNamespace:
        if self.error:
            raise self.error
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        allow_patterns: list[str] | str | None = None,
    ) -> str:
        assert allow_patterns == MODEL.patterns
        folder = self.snapshots / COMMIT
        if local_files_only or self.error:
            if not folder.exists():
                raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
            return str(folder)
        self.downloads.append((repo_id, revision))
        return str(_write_model(folder))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_hub_id_is_resolved_to_its_commit_and_downloaded_only_when_fetched(hub):
    resolved = resolve_model("org/model", "main")
    assert (resolved.folder, resolved.commit, resolved.digests) == (None, COMMIT, {})
    assert resolved.identity() == {"model.name": "org/model", "model.commit": COMMIT}
    assert resolved.label == f"org/model@{COMMIT}"
    assert resolved.pins == {"revision": COMMIT}
    assert hub.downloads == []
    folder = fetch_model_folder("org/model", COMMIT)
    assert folder.name == COMMIT
    assert fetch_model_folder("org/model", COMMIT) == folder
    assert hub.downloads == [("org/model", COMMIT)]  # once, because the second call used the cache
    assert resolve_model("org/model").folder == folder


def test_offline_a_hub_id_is_resolved_to_the_cached_commit(hub):
    fetch_model_folder("org/model")
    hub.error = OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled")
    assert resolve_model("org/model").commit == COMMIT
    assert fetch_model_folder("org/model", COMMIT).name == COMMIT
    assert len(hub.downloads) == 1


def test_an_incomplete_download_is_not_used(hub):
    folder = fetch_model_folder("org/model", COMMIT)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert resolve_model("org/model").folder is None
    fetch_model_folder("org/model", COMMIT)
    assert len(hub.downloads) == 2


@pytest.mark.parametrize("call", [resolve_model, fetch_model_folder])
def test_a_model_in_neither_hub_nor_cache_is_an_error(hub, call):
    hub.error = OfflineModeIsEnabled("offline mode is enabled")
    with pytest.raises(ModelError, match=r"'org/model': no folder.*cannot be reached.*HF_HUB_OFFLINE.*local folder"):
        call("org/model")


def test_an_answer_of_the_hub_overrides_the_cache(hub):
    from huggingface_hub import errors

    fetch_model_folder("org/model")
    for error, message in [
        (errors.RepositoryNotFoundError, "neither a folder on this machine nor a model"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.GatedRepoError, "is gated"),
        (errors.HFValidationError, "neither a folder on this machine nor a model"),
    ]:
        # Their constructors take an HTTP response, whose class depends on the version of huggingface_hub.
        hub.error = error.__new__(error)
        with pytest.raises(ModelError, match=message):
            resolve_model("org/model", "v9")


def test_importing_loads_neither_torch_nor_the_hub():
    code = "import sys, stylemill.models.resolve; print({'torch', 'huggingface_hub', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
