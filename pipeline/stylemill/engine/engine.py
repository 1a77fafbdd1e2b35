"""The engine: a resident model that samples all pairs of a shard in lockstep."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor

from stylemill.config.model import ControlNet, DType, Lora
from stylemill.config.sampling import Sampling, cpu_micro_batch
from stylemill.engine.attention import choose_layers
from stylemill.engine.batching import blocks, micro_batches
from stylemill.engine.initial_state import begin
from stylemill.engine.inputs import Pair
from stylemill.engine.memory import catch_out_of_memory
from stylemill.engine.noise import Noise
from stylemill.engine.objective import Objective
from stylemill.engine.sampler import Sampler
from stylemill.engine.state import SampleState
from stylemill.engine.unet.controlnet import load_control
from stylemill.engine.unet.decoder_refinement import UNSOUND, DecoderCache, RecentDecoders, by_decoder, refined
from stylemill.engine.unet.lora import fuse_lora
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.unet.tiling import circular
from stylemill.engine.windows import Windows
from stylemill.errors import DeviceMemoryError
from stylemill.images.input_image import InputImage, Pixels
from stylemill.models.hub import CONTROLNET, fetch_model
from stylemill.models.lora import fetch_lora
from stylemill.models.single_file import fetch_config, is_single_file

LARGEST_MICRO_BATCH = 64
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Engine:
    """A resident Stable-Diffusion-1.x-shaped model, ready to sample shards of pairs.

    >>> engine = Engine.load("demo")                                            # doctest: +SKIP
    >>> for state in engine.sample(pairs, Sampling(steps=20)):                  # doctest: +SKIP
    ...     print(state.step)
    >>> images = engine.decode(state)                                           # doctest: +SKIP

    `passes` counts UNet samples (batch rows, not calls) by kind: denoise, feature, gradient.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        layers: Sequence[int | str] | None = None,
        threads: int = 1,
        micro_batch: int = 1,
        feature_budget_mb: int = 4096,
    ) -> None:
        self.model = model
        self.threads = threads
        self.micro_batch = micro_batch
        self.feature_budget_mb = feature_budget_mb
        self.layers = choose_layers(model.unet, layers)
        self.passes: Counter[str] = Counter()
        self.decoders = RecentDecoders()

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        config: str | None = None,
        dtype: DType = "auto",
        device: str = "auto",
        layers: Sequence[int | str] | None = None,
        loras: Sequence[Lora] = (),
        controlnets: Sequence[ControlNet] = (),
        threads: int = 1,
        micro_batch: int | str = "auto",
        feature_budget_mb: int = 4096,
    ) -> Engine:
        """Load a diffusers folder, hub id or single-file checkpoint with its `config`, safetensors only.

        `dtype` auto is float16 on CUDA and float32 on a CPU; `micro_batch` auto is 1 until `calibrate` settles it.
        `loras` are added to the weights; `controlnets` are seen while denoising, in the order of `Pair.controls`.
        Raises ModelError when the model, a LoRA or a ControlNet is absent, pickled or of another architecture.
        """
        # Read by cuBLAS when CUDA starts; without it some of its sums are not repeatable.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float16" if device.startswith("cuda") else "float32"
        if is_single_file(str(model)):
            loaded = DiffusionModel.load(fetch_config(str(model), config), dtype, device, Path(model).expanduser())
        else:
            loaded = DiffusionModel.load(fetch_model(str(model), revision), dtype, device)
        for lora in loras:
            fuse_lora(loaded, fetch_lora(lora), lora)
        folders = [fetch_model(net.name, net.revision, CONTROLNET) for net in controlnets]
        nets = [load_control(folder, net, loaded.unet) for folder, net in zip(folders, controlnets, strict=True)]
        loaded = replace(loaded, controls=tuple(nets))
        return cls(
            loaded,
            layers=layers,
            threads=threads,
            micro_batch=micro_batch if isinstance(micro_batch, int) else 1,
            feature_budget_mb=feature_budget_mb,
        )

    @property
    def numerics(self) -> dict[str, str | int]:
        """Everything, besides the job, that the low bits of a result depend on."""
        device = self.model.device
        on_cuda = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
            "capability": str(torch.cuda.get_device_capability(device)) if on_cuda else _cpu_capability(),
            "dtype": str(self.model.unet.dtype).removeprefix("torch."),
            "threads": self.threads,
            "micro_batch": self.micro_batch,
            "feature_budget_mb": self.feature_budget_mb,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        }

    def sample(
        self,
        pairs: Sequence[Pair],
        settings: Sampling,
        state: SampleState | None = None,
        noise: Noise | None = None,
        excluded: Mapping[int, str] | None = None,
    ) -> Iterator[SampleState]:
        """Sample `pairs` in lockstep, yielding the one state, changed in place, after every step.

        The caller owns progress, checkpoints and stopping. With `state` (restored from a checkpoint) sampling goes
        on after `state.step` and `pairs` is not looked at. A pair that cannot be sampled is noted in
        `state.failures`; the others go on and come out as if it had been well. `excluded` says which pairs must not
        be sampled, and why. Out of memory, a step is repeated with half the micro-batch, which then stays so; raises
        DeviceMemoryError where that is 1 already.
        """
        noise = noise or Noise(settings.seed)
        with self._repeatable():
            if state is None:
                state = catch_out_of_memory(lambda: begin(self.model, pairs, settings, noise, self.layers))
            if excluded:
                state.exclude(excluded)
            state.to(self.model.device)
            sampler = self._sampler(state, settings, noise)
        if len(state.excluded) == len(state.latents_of):
            state.step = settings.steps  # nothing to sample
            yield state
        while state.step < settings.steps:
            with self._repeatable():
                sampler, taken = self._halving(partial(self._step, sampler, state, settings, noise))
                state.become(taken)
            yield state

    def decode(self, state: SampleState, decoders: DecoderCache | None = None) -> list[Pixels | None]:
        """The image of each pair, (H, W, 3) uint8; None where the pair failed.

        With `refine_decoder_steps` the VAE's decoder is first refined on the pair's first style, or taken from
        `decoders`; without that cache the engine remembers the last few itself.
        """
        known = self.decoders if decoders is None else decoders
        with self._repeatable():
            return self._halving(lambda: self._decode(state, known))

    def _decode(self, state: SampleState, decoders: DecoderCache) -> list[Pixels | None]:
        # The micro-batch is measured on windows; an image made in them is larger.
        size = self.micro_batch if state.inputs.window is None else 1
        images: dict[int, Pixels] = {}
        failures = state.failures
        for style, batches in by_decoder(state.inputs, size):
            pairs = [pair for batch in batches for pair in batch]
            if all(pair in failures for pair in pairs):  # a style that could not be read, for one
                continue
            with (
                refined(self.model, state.inputs, style, self.numerics, decoders) as usable,
                circular(state.inputs.tiling, self.model.vae.decoder),
            ):
                if not usable:
                    state.excluded |= {pair: UNSOUND for pair in pairs if pair not in failures}
                    continue
                for batch in batches:
                    decoded = self.model.decode_image(torch.stack([state.latents_of[pair] for pair in batch]))
                    images |= zip(batch, decoded, strict=True)
        return [None if pair in failures else images.get(pair) for pair in range(len(state.latents_of))]

    def gradient(
        self, pairs: Sequence[Pair], settings: Sampling, latents: Tensor, step: int, noise: Noise | None = None
    ) -> Tensor:
        """∂L_total/∂z of every pair where guided sampling takes it: at the timestep that follows `step`.

        `latents` (P, C, h, w) -> (P, C, h, w). For measuring precision; sampling does not pass through here.
        """
        noise, settings = noise or Noise(settings.seed), settings.model_copy(update={"window": None})
        with self._repeatable(), circular(settings.tiling, self.model.unet):
            state = begin(self.model, pairs, settings, noise, self.layers).to(self.model.device)
            state.step = step
            latents = latents.to(self.model.device, self.model.latent_dtype)
            return self._sampler(state, settings, noise).gradient(state, latents)

    def calibrate(self, size: tuple[int, int]) -> int:
        """Choose and set the micro-batch for images of `size` (width, height): once a run, since it is numerics.

        On a CPU by the size alone. On CUDA from the memory that gradients of one and of two blank pairs take: the
        largest power of two that fits in 80% of what is free.
        """
        if self.model.device.type == "cuda":
            blank = InputImage("blank", np.zeros((size[1], size[0], 3), np.uint8))
            pair = Pair((blank,), size, content=blank, controls=(blank,) * len(self.model.controls))
            used = [self._peak_memory(pair, count) for count in (1, 2)]
            if self.micro_batch == 1:  # halved: there is no room for two
                return 1
            room = torch.cuda.mem_get_info(self.model.device)[0] * 0.8 - used[0]
            fitting = 1 + int(room / max(used[1] - used[0], 1))
            self.micro_batch = min(2 ** max(fitting.bit_length() - 1, 0), LARGEST_MICRO_BATCH)
        else:
            self.micro_batch = cpu_micro_batch(size)
        return self.micro_batch

    def _peak_memory(self, pair: Pair, count: int) -> int:
        device, self.micro_batch = self.model.device, count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in self.sample([pair] * count, Sampling(steps=1, guidance_scale=2.0, content_weight=1.0)):
            pass
        return torch.cuda.max_memory_allocated(device) - before

    def _step(
        self, sampler: Sampler, state: SampleState, settings: Sampling, noise: Noise
    ) -> tuple[Sampler, SampleState]:
        """A step from `state`, which stays as it is; the sampler, or another where the micro-batch changed since."""
        if sampler.guide.micro_batch != self.micro_batch:
            sampler = self._sampler(state, settings, noise)
        taken = state.copy()
        sampler.advance(taken)
        return sampler, taken

    def _halving(self, work: Callable[[], T]) -> T:
        """Do `work`, begun anew with half the micro-batch, which stays so, as often as memory is short."""
        while True:
            try:
                return catch_out_of_memory(work)
            except DeviceMemoryError:
                if self.micro_batch == 1:
                    raise
            self.micro_batch //= 2
            _log.warning("out of memory: from here on at most %d in a UNet call", self.micro_batch)

    def _sampler(self, state: SampleState, settings: Sampling, noise: Noise) -> Sampler:
        guide = Objective(self.model, self.layers, settings, self.micro_batch, self.passes)
        windows = Windows(state.inputs, settings)
        batches = micro_batches(windows.inputs, self.micro_batch)
        sizes = [self._feature_bytes(image) for image in state.inputs.images]
        cut = blocks(windows.inputs, batches, sizes, self.feature_budget_mb * 2**20)
        return Sampler(self.model, guide, settings, noise, cut, windows)

    def _feature_bytes(self, latent: Tensor) -> int:
        return sum(layer.feature_bytes(*latent.shape[-2:]) for layer in self.layers)

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Our thread count and deterministic kernels, for as long as the engine works; the caller's afterwards."""
        threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        benchmark = torch.backends.cudnn.benchmark
        try:
            torch.set_num_threads(self.threads)
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
            torch.backends.cudnn.benchmark = benchmark


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
