"""The calls of the UNet: one graph each for torch.compile, passes that end early, and no waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from precision import content_style_pairs
from small_unet import small_unet
from stylemill.config.sampling import Sampling
from stylemill.engine import Engine, Noise, Pair, SampleState
from stylemill.engine import calls as unet_calls
from stylemill.engine.attention import Target
from stylemill.engine.kernels import constant, repeatable, repeatable_backward, to_device
from stylemill.engine.memory import fastest_micro_batch
from stylemill.engine.unet.compiling import prepare_for_compiling
from stylemill.errors import ModelError

SETTINGS = Sampling(steps=3, guidance_scale=2.0)
PAIRS = content_style_pairs(5, 64)
GRAPHS = {"backend": "aot_eager"}  # makes the graphs, with their backward passes, and no kernels, which takes minutes


def small_engine(engine32: Engine, **options: Any) -> Engine:
    return Engine(replace(engine32.model, unet=small_unet()), micro_batch=3, **options)


def last(engine: Engine, pairs: list[Pair], settings: Sampling = SETTINGS) -> SampleState:
    *_, state = engine.sample(pairs, settings)
    return state


def latents(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_graphs_left() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.usefixtures("no_graphs_left")
def test_each_way_of_calling_is_one_graph_that_serves_all_steps_and_sizes(
    engine32: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet_calls, "COMPILER", GRAPHS)
    eager, compiled = small_engine(engine32), small_engine(engine32, compiled=True)
    z = latents(5)
    expected, found = (one.gradient(PAIRS, SETTINGS, z, 1) for one in (eager, compiled))
    assert relative_difference(expected, found) < 1e-4
    states = compiled.sample(PAIRS, SETTINGS)
    next(states)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted == 2, "noise and activations; losses"
    with torch._dynamo.config.patch(error_on_recompile=True):
        *_, state = states
        for pairs in (PAIRS[:1], PAIRS[:2]):
            last(compiled, pairs, SETTINGS.model_copy(update={"guidance_scale": 1.0}))
        compiled.distances(state, SETTINGS)
    torch.testing.assert_close(state.latents, last(eager, PAIRS).latents, rtol=0, atol=1e-3)
    assert compiled.passes["gradient"] == 5 + 3 * 5 + 3 * (1 + 2), "padding does not count"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("no_graphs_left")
def test_injection_is_compiled_too_and_circular_padding_is_not(
    engine32: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet_calls, "COMPILER", GRAPHS)
    compiled = small_engine(engine32, compiled=True)
    for changes in ({"method": "kv_injection"}, {"tiling": "both"}):
        settings = SETTINGS.model_copy(update={**changes, "steps": 2})
        state, expected = (last(one, PAIRS[:3], settings) for one in (compiled, small_engine(engine32)))
        torch.testing.assert_close(state.latents, expected.latents, rtol=0, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "none for tiling"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("no_graphs_left")
def test_the_kernels_that_torch_makes_on_a_cpu_give_the_same_gradients(engine32: Engine) -> None:
    calls = small_engine(engine32, compiled=True).calls
    z, text, ones, calls.slot = latents(2), calls.model.encode_text(""), torch.ones(2), 2
    targets = [Target(one.k, one.v, one.q) for one in calls.eager.activations(0.9 * z, 401, text)]
    expected, found = (one.gradient(z, 401, text, targets, ones, [1.0] * 3, 1.0, ones) for one in (calls.eager, calls))
    assert relative_difference(expected[0], found[0]) < 1e-4
    torch.testing.assert_close(expected[1], found[1])


def test_wrong_gradients_of_the_compiler_are_found(engine32: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def miscompiled(call: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def wrong(z: Tensor, *rest: Any) -> Any:
            return call(z.detach() + z.flip(-1) - z.flip(-1).detach(), *rest)

        return wrong

    monkeypatch.setattr(torch, "compile", miscompiled)
    with pytest.raises(ModelError, match=r"wrong gradients on cpu: their cosine .*set cluster.compile to false"):
        small_engine(engine32, compiled=True).gradient(PAIRS[:2], SETTINGS, latents(2), 1)


def test_a_failure_of_the_compiler_says_what_to_do(engine32: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        from torch._dynamo.exc import Unsupported

        def compile_it(*_: Any) -> Any:
            raise Unsupported("no C compiler was found")

        return compile_it

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ModelError, match=r"torch.compile: no C compiler.*; set cluster.compile to false"):
        last(small_engine(engine32, compiled=True), PAIRS[:1])


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (63, 41)])
def test_a_unet_prepared_for_compiling_computes_the_same(size: tuple[int, int]) -> None:
    results = []
    for prepare in (False, True):
        unet = small_unet(levels=2)
        if prepare:
            prepare_for_compiling(unet)
        z = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
        results.append(unet_and_gradient(unet, z))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.usefixtures("no_graphs_left")
@pytest.mark.parametrize("prepare", [False, True])
def test_preparing_removes_the_slow_addition_of_gradients(prepare: bool) -> None:
    operations: list[str] = []

    def collect(graph: torch.fx.GraphModule, _: Any) -> Any:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    unet = small_unet(levels=2)
    if prepare:
        prepare_for_compiling(unet)
    unet_and_gradient(torch.compile(unet, backend=aot_autograd(fw_compiler=collect)), latents(2))
    assert any("convolution_backward" in name for name in operations)
    assert any("index_put" in name for name in operations) != prepare


def unet_and_gradient(unet: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    z.requires_grad_()
    out = unet(z, 401, torch.ones(2, 3, 32), return_dict=False)[0]
    return out, torch.autograd.grad(out.square().sum(), z)[0]


# --- passes -----------------------------------------------------------------------------------------------------------


def test_passes_for_features_and_gradients_end_after_the_last_layer(engine32: Engine) -> None:
    engine, ended = small_engine(engine32), []
    handle = engine.model.unet.conv_out.register_forward_hook(lambda *_: ended.append(True))
    text = engine.model.encode_text("")
    engine.calls.activations(latents(1), 401, text)
    engine.gradient(PAIRS[:1], SETTINGS, latents(1), 1)
    assert ended == []
    engine.calls.predict_noise(latents(1), 401, text)
    assert ended == [True]
    handle.remove()


def test_after_an_error_in_a_pass_nothing_is_recorded_any_more(engine32: Engine) -> None:
    engine = small_engine(engine32)
    handle = engine.model.unet.up_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.calls.activations(latents(1), 401, engine.model.encode_text(""))
    handle.remove()
    for layer in engine.layers:
        assert (layer.processor.recorded, layer.processor.target) == (None, None)


def test_two_engines_with_other_layers_share_a_model(engine32: Engine) -> None:
    one = small_engine(engine32)
    other = Engine(one.model, layers=[0])
    assert len(one.calls.activations(latents(1), 401, one.model.encode_text(""))) == 3
    assert len(other.calls.activations(latents(1), 401, one.model.encode_text(""))) == 1


# --- waiting for the device -------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's values by Python, each of which waits for the device on CUDA, and new constants."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 1.0, "adain": True, "iterations": 2},
        {"guidance_scale": 1.0, "reuse_prediction": True},
        {"method": "optimization"},
        {"window": 8, "content_weight": 0.0},
    ],
    ids=["guided", "adain", "reused predictions", "optimization", "windows"],
)
def test_no_operation_of_a_step_reads_a_value(
    engine32: Engine, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    engine, settings = small_engine(engine32), SETTINGS.model_copy(update=changes)
    state = next(engine.sample(PAIRS, settings))
    sampler = engine._sampler(state, settings, Noise(0))
    # diffusers' schedulers read tables that are on the CPU with every device.
    monkeypatch.setattr(sampler.scheduler, "step", lambda epsilon, z, *rest: (z - 0.1 * epsilon, None))
    monkeypatch.setattr(sampler.scheduler, "add_noise", lambda latent, noise, timestep: latent + noise)
    with HostReads() as host:
        sampler.queue_step(state)
    assert host.reads == []


def test_a_read_would_be_found() -> None:
    with HostReads() as host:
        assert torch.ones(1).sum() > 0
    assert len(host.reads) == 1


def test_constants_and_noise_are_copied_as_they_are(engine32: Engine) -> None:
    like = torch.zeros(1, dtype=torch.float32)
    drawn = Noise(0).image_noise("any", 1, (4, 8, 8))
    assert torch.equal(to_device(drawn, like), torch.from_numpy(drawn).float())
    assert constant((1.0, 0.5), torch.float32, like.device) is constant((1.0, 0.5), torch.float32, like.device)


# --- kernels and the micro-batch --------------------------------------------------------------------------------------


def test_the_callers_settings_of_torch_come_back() -> None:
    def settings() -> tuple[Any, ...]:
        cudnn, utilities = torch.backends.cudnn, torch.utils.deterministic
        deterministic = torch.are_deterministic_algorithms_enabled(), utilities.fill_uninitialized_memory
        return torch.get_num_threads(), cudnn.benchmark, cudnn.deterministic, *deterministic

    before = settings()
    with repeatable(3), repeatable_backward():
        assert settings() == (3, False, True, True, False)
    assert settings() == before
    with repeatable_backward(False):
        assert torch.are_deterministic_algorithms_enabled() == before[3]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 10}, 1),
        ({1: 10, 2: 19, 4: 36, 8: 60, 16: 61, 32: 62}, 8),
        ({4: 36, 8: 60, 16: 70, 32: 60, 64: 50}, 16),
        ({4: 10, 8: 20, 16: 40, 32: 80, 64: 160}, 64),
    ],
)
def test_the_smallest_micro_batch_near_the_fastest_is_chosen(rates: dict[int, float], expected: int) -> None:
    measured: list[int] = []

    def seconds(size: int) -> float:
        measured.append(size)
        return size / rates.get(size, 1e-3)

    assert fastest_micro_batch(max(rates), seconds) == expected
    assert max(measured) == max(rates)
    assert len(measured) <= 5
