"""The engine of a worker, loaded as the job says, and what the bytes of its output depend on besides the job."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import PIL
import pyarrow as pa

from stylemill.execution.attempt import Run
from stylemill.testing.failpoints import failpoint

if TYPE_CHECKING:
    from stylemill.engine import Engine


def import_engine() -> None:
    """Import the engine ahead of `load_engine`: diffusers and transformers take seconds. Raises ImportError."""
    import_module("stylemill.engine.engine")


def loading_phase(run: Run, micro_batch: int | None) -> str:
    """What a run does while `load_engine` works."""
    calibrates = micro_batch is None and run.job.cluster.micro_batch == "auto"
    return "loading the model and calibrating" if calibrates else "loading the model"


def load_engine(run: Run, micro_batch: int | None) -> Engine:
    """Load the resident engine of a worker. Raises ModelError.

    `micro_batch` is that of the run, once it is known. With None, "auto" is calibrated here to the job's image size.
    """
    from stylemill.engine import Engine

    model, cluster = run.job.model, run.job.cluster
    failpoint("load")
    engine = Engine.load(
        model.name,
        revision=model.revision,
        config=model.config,
        dtype=model.dtype,
        layers=model.layers,
        loras=model.loras,
        controlnets=model.controlnet,
        threads=cluster.threads,
        micro_batch=micro_batch or cluster.micro_batch,
        feature_budget_mb=cluster.feature_budget_mb,
    )
    if micro_batch is None and cluster.micro_batch == "auto":
        engine.calibrate(run.job.unet_call_size(engine.model.pixels_per_latent))
    return engine


def numerics(engine: Engine) -> dict[str, str | int]:
    """What the bytes of a data file depend on besides the job: device, libraries, threads, micro-batch, dtype."""
    return engine.numerics | {"pillow": PIL.__version__, "pyarrow": pa.__version__}
