"""Half precision against float32 with the untrained model: how far its gradients and latents may differ."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch

import precision
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine

SETTINGS = Sampling(steps=4)
LEAST_COSINE = {"float16": 0.999, "bfloat16": 0.99}
MOST_ZEROS = 0.001
# More than rounding: the gradient of |a − b| changes its sign at 0, where a small difference is enough.
ALONE_AND_TOGETHER = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 0.1}


@pytest.fixture(scope="module")
def engines(engine32: Engine) -> dict[str, Engine]:
    exact = Engine(engine32.model)
    halves = {name: precision.in_precision(exact, dtype) for name, dtype in precision.HALVES.items()}
    return {"float32": exact, **halves}


def test_half_precision_gradients_are_close_to_float32_at_every_step(engines: dict[str, Engine]) -> None:
    exact, halves = engines["float32"], [engines[name] for name in LEAST_COSINE]
    pairs = precision.content_style_pairs(1, 128)
    steps = list(precision.agreements(exact, halves, pairs, SETTINGS))
    assert len(steps) == SETTINGS.steps
    for name, found in zip(LEAST_COSINE, zip(*steps, strict=True), strict=True):
        assert min(one.cosine for one in found) >= LEAST_COSINE[name]
        assert max(one.zeros for one in found) <= MOST_ZEROS
        assert not any(one.broken for one in found)


def test_agreement_measures_underflow_and_infinities() -> None:
    exact = torch.tensor([[3e-8, 4e-8, 1e-3, 1e-3]]).reshape(1, 1, 2, 2)
    lost = precision.Agreement.between((exact / 2).half().float(), exact)
    assert lost.zeros == 0.5
    assert precision.Agreement.between(exact / 0, exact).broken == 4


@pytest.mark.parametrize(
    "name", ["float32", *(pytest.param(half, marks=pytest.mark.slow) for half in precision.HALVES)]
)
def test_the_gradient_of_a_pair_alone_is_close_to_that_in_a_batch_of_16(engines: dict[str, Engine], name: str) -> None:
    pairs = precision.content_style_pairs(16, 64)
    assert precision.alone_against_batch(engines[name], pairs, SETTINGS, 1) <= ALONE_AND_TOGETHER[name]


@pytest.mark.slow
def test_float16_stays_finite_over_50_steps(engines: dict[str, Engine]) -> None:
    *_, state = engines["float16"].sample(precision.content_style_pairs(2, 64), Sampling(steps=50))
    assert not state.failures
    for found in engines["float16"].distances(state, Sampling(steps=50)):
        assert found is not None
        assert np.isfinite(astuple(found)).all()
