"""The engine of a worker, loaded as the job says, and what the bytes of its output depend on besides the job."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

import PIL
import pyarrow as pa

from stylemill.config.model import DType
from stylemill.execution.attempt import AutoSettings, Run
from stylemill.testing.failpoints import failpoint

if TYPE_CHECKING:
    from stylemill.engine import Engine


def import_engine() -> None:
    """Import the engine ahead of `load_engine`: diffusers and transformers take seconds. Raises ImportError."""
    import_module("stylemill.engine.engine")


def loading_phase(run: Run, auto: AutoSettings) -> str:
    """What a run does while `load_engine` works."""
    calibrates = run.job.cluster.micro_batch == "auto" and not auto.micro_batches
    return "loading the model and calibrating" if calibrates else "loading the model"


def load_engine(run: Run, auto: AutoSettings) -> Engine:
    """Load the resident engine of a worker. Raises ModelError, also where it cannot compute in the dtype of the run.

    What `auto` stands for in the run is taken from there. What is not known yet is chosen here: the dtype by the
    device, the micro-batch by calibration to the job's image size.
    """
    from stylemill.engine import Engine

    model, cluster = run.job.model, run.job.cluster
    gpus = cluster.gpus_per_worker
    failpoint("load")
    engine = Engine.load(
        model.name,
        revision=model.revision,
        config=model.config,
        dtype=cast(DType, auto.dtype or "auto") if model.dtype == "auto" else model.dtype,
        device="cpu" if gpus == 0 else "auto",  # Ray hides no GPU from a worker that reserves none
        layers=model.layers,
        loras=model.loras,
        controlnets=model.controlnet,
        threads=cluster.threads,
        micro_batch=cluster.micro_batch,
        feature_budget_mb=cluster.feature_budget_mb,
        compiled=cluster.compile,
        deterministic=cluster.deterministic,
    )
    if cluster.micro_batch == "auto":
        if size := auto.micro_batches.get(str(engine.numerics["device"])):
            engine.micro_batch = size
        else:
            share = 1.0 if gpus == "auto" else min(gpus, 1.0)
            engine.calibrate(run.job.unet_call_size(engine.model.pixels_per_latent), share)
    return engine


def numerics(engine: Engine) -> dict[str, str | int]:
    """What the bytes of a data file depend on besides the job: device, libraries, threads, micro-batch, dtype."""
    return engine.numerics | {"pillow": PIL.__version__, "pyarrow": pa.__version__}
