"""The engine: a resident model that samples all pairs of a shard in lockstep."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from stylemill.config.sampling import Sampling
from stylemill.engine.attention import self_attention_layers
from stylemill.engine.batching import Block, blocks, cpu_micro_batch, feature_parts, micro_batches
from stylemill.engine.calls import COMPILED_MICRO_BATCH, UNetCalls
from stylemill.engine.decoding import ImageDecoder, decode_shard
from stylemill.engine.distances import Distances, measure_distances, style_inputs
from stylemill.engine.initial_state import create_initial_state
from stylemill.engine.inputs import Pair
from stylemill.engine.kernels import prepare_cuda, repeatable, repeatable_backward
from stylemill.engine.memory import fastest_micro_batch, measured_micro_batch, translate_out_of_memory
from stylemill.engine.noise import Noise
from stylemill.engine.objective import Objective
from stylemill.engine.sampler import Sampler
from stylemill.engine.state import SampleState, ShardInputs, styles_and_contents
from stylemill.engine.unet.compiling import prepare_for_compiling
from stylemill.engine.unet.controlnet import load_controlnet
from stylemill.engine.unet.decoder_refinement import DecoderCache, RecentDecoders
from stylemill.engine.unet.lora import fuse_lora
from stylemill.engine.unet.model import DiffusionModel, check_dtype
from stylemill.engine.unet.tiling import circular_padding
from stylemill.engine.windows import Windows
from stylemill.errors import DeviceMemoryError
from stylemill.images.input_image import InputImage, Pixels
from stylemill.models.attention_layers import select_layers
from stylemill.models.file_sets import CONTROLNET
from stylemill.models.lora import fetch_lora_file
from stylemill.models.resolve import fetch_model_folder
from stylemill.models.single_file import fetch_config_folder, is_single_file

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Engine:
    """A resident model of Stable Diffusion 1.x, 2.x or SDXL that samples shards of pairs.

    >>> engine = Engine.load("demo")                                            # doctest: +SKIP
    >>> for state in engine.sample(pairs, Sampling(steps=20)):                  # doctest: +SKIP
    ...     print(state.step)
    >>> images = engine.decode(state)                                           # doctest: +SKIP

    `passes` counts UNet passes (batch rows, not calls) by kind: denoise, feature and gradient while sampling, distance
    in `distances`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        layers: Sequence[int | str] | None = None,
        threads: int = 1,
        micro_batch: int = 1,
        feature_budget_mb: int = 4096,
        compiled: bool = False,
        deterministic: bool = True,
    ) -> None:
        if compiled:
            prepare_for_compiling(model.unet)
        self.model = model
        self.compiled = compiled
        self.deterministic = deterministic
        self.threads = threads
        self.micro_batch = micro_batch
        self.feature_budget_mb = feature_budget_mb
        self.layers = select_layers(self_attention_layers(model.unet), layers)
        self.calls = UNetCalls(model, self.layers, deterministic, compiled)
        self.passes: Counter[str] = Counter()
        self.decoder = ImageDecoder(model)
        self.refined_decoders = RecentDecoders()

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
        compiled: bool = False,
        deterministic: bool = True,
    ) -> Engine:
        """Load a diffusers folder, hub id or single-file checkpoint with its `config`, safetensors only.

        `dtype` "auto" is float16 on CUDA and float32 on a CPU; `micro_batch` "auto" is 1 until `calibrate` sets it.
        `compiled` calls of the UNet are faster on a GPU, after minutes of compiling. Without `deterministic`, two runs
        may differ in low bits. `loras` are added to the weights; `controlnets` act while denoising, in the order of
        `Pair.controls`.
        Raises ModelError when the model, a LoRA or a ControlNet is absent, pickled or of another architecture, or where
        the device cannot compute in `dtype`.
        """
        prepare_cuda()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float16" if device.startswith("cuda") else "float32"
        check_dtype(dtype, device)
        if is_single_file(str(model)):
            loaded = DiffusionModel.load(
                fetch_config_folder(str(model), config), dtype, device, Path(model).expanduser()
            )
        else:
            loaded = DiffusionModel.load(fetch_model_folder(str(model), revision), dtype, device)
        for lora in loras:
            fuse_lora(loaded, fetch_lora_file(lora), lora)
        folders = [fetch_model_folder(net.name, net.revision, CONTROLNET) for net in controlnets]
        nets = [load_controlnet(folder, net, loaded.unet) for folder, net in zip(folders, controlnets, strict=True)]
        loaded = replace(loaded, controlnets=tuple(nets))
        return cls(
            loaded,
            layers=layers,
            threads=threads,
            micro_batch=micro_batch if isinstance(micro_batch, int) else 1,
            feature_budget_mb=feature_budget_mb,
            compiled=compiled,
            deterministic=deterministic,
        )

    @property
    def numerics(self) -> dict[str, str | int]:
        """What the low bits of a result depend on besides the job."""
        device = self.model.device
        on_cuda = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
            "capability": str(torch.cuda.get_device_capability(device)) if on_cuda else _cpu_capability(),
            "dtype": str(self.model.unet.dtype).removeprefix("torch."),
            "threads": self.threads,
            "micro_batch": self.micro_batch,
            "kernels": "compiled" if self.compiled else "eager",
            "gradients": "deterministic" if self.deterministic else "fastest",
            "decoding": "tiles" if self.decoder.in_tiles else "whole images",
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
        """Sample `pairs` in lockstep, and yield after every step the same state, changed in place.

        The caller reports progress, saves checkpoints and decides when to stop. With a `state` restored from a
        checkpoint, sampling continues after `state.step` and `pairs` is not used. `excluded` has the numbers of pairs
        that must not be sampled, each with its reason. A pair that cannot be sampled is in `state.failures`; the
        results of the others are the same as if it could.
        If a step runs out of memory, the micro-batch is halved for good and the step is repeated. Raises
        DeviceMemoryError if the micro-batch is 1 or an image cannot be encoded, and what `create_initial_state` raises.
        """
        noise = noise or Noise(settings.seed)
        with repeatable(self.threads):
            if state is None:
                create = partial(create_initial_state, self.model, pairs, settings, noise, self.layers)
                advice = "take a smaller image.size or image.style_size"
                state = translate_out_of_memory(create, "encoding the images of a shard, one at a time", advice)
            if excluded:
                state.exclude(excluded)
            state.to(self.model.device)
            sampler = self._sampler(state, settings, noise)
        if len(state.excluded) == len(state.latents_of):
            state.step = settings.steps  # there is nothing to sample
            yield state
        while state.step < settings.steps:
            with repeatable(self.threads):
                step = partial(self._step, sampler, state, settings, noise)
                sampler, after_step = self._retry_with_smaller_batches(step)
                state.assign(after_step)
            yield state

    def decode(self, state: SampleState, decoders: DecoderCache | None = None) -> list[Pixels | None]:
        """The image of each pair, (H, W, 3) uint8; None where the pair failed.

        With `refine_decoder_steps`, the VAE's decoder is first refined on the pair's first style, or taken from
        `decoders`. Without that cache, the engine keeps the last few refined decoders itself.
        If an image does not fit into the memory, it is decoded in tiles, and so are all later ones. Raises
        DeviceMemoryError if a tile does not fit, if the image is not larger than a tile, or if it has `tiling`.
        """
        cache = self.refined_decoders if decoders is None else decoders
        # Refinement of the decoder has a backward pass.
        with repeatable(self.threads), repeatable_backward(self.deterministic):
            decode = partial(decode_shard, self.decoder, state, self.numerics, cache)
            return translate_out_of_memory(decode, "decoding a shard", "take a smaller image.size")

    def distances(self, state: SampleState, settings: Sampling) -> list[Distances | None]:
        """How far each pair is from its styles and its content after the last step; None where the pair failed.

        Measured alike for all settings: of these, only the windows and the tiling matter.
        """
        with repeatable(self.threads):
            return self._retry_with_smaller_batches(partial(self._distances, state, settings))

    def gradient(
        self, pairs: Sequence[Pair], settings: Sampling, latents: Tensor, step: int, noise: Noise | None = None
    ) -> Tensor:
        """∂L_total/∂z of every pair as guided sampling computes it, at the timestep that follows `step`.

        `latents` (P, C, h, w) -> (P, C, h, w). For measurements of precision; `sample` does not use it.
        """
        noise, settings = noise or Noise(settings.seed), settings.model_copy(update={"window": None})
        with repeatable(self.threads), circular_padding(settings.tiling, self.model.unet):
            state = create_initial_state(self.model, pairs, settings, noise, self.layers).to(self.model.device)
            state.step = step
            latents = latents.to(self.model.device, self.model.latent_dtype)
            return self._sampler(state, settings, noise).gradient(state, latents)

    def calibrate(self, size: tuple[int, int], share: float = 1.0) -> int:
        """Choose, set and return the micro-batch for images of `size` (width, height) in pixels.

        Call it once a run, because the micro-batch is part of the numerics. On a CPU it follows from the size. On CUDA
        it is measured, without compiling: the smallest power of two within 5% of the fastest of those, up to 64 (32 if
        compiled), that fit into 80% of what this process may use, beside `feature_budget_mb`. The process may use
        `share` of the GPU (0 to 1), and of that what is free.
        """
        if self.model.device.type == "cuda":
            calls, self.calls = self.calls, self.calls.eager
            try:
                self.micro_batch = self._measured_micro_batch(size, share)
            finally:
                self.calls = calls
        else:
            self.micro_batch = cpu_micro_batch(size)
        return self.micro_batch

    def _measured_micro_batch(self, size: tuple[int, int], share: float) -> int:
        blank = InputImage("grey", np.full((size[1], size[0], 3), 127, np.uint8))
        pair = Pair((blank,), size, content=blank, controls=(blank,) * len(self.model.controlnets))

        def step_seconds(count: int) -> float:
            """Of the second step of `count` pairs: the first one warms up."""
            self.micro_batch = count
            states = self.sample([pair] * count, Sampling(steps=2, guidance_scale=2.0, content_weight=1.0))
            next(states)
            start = time.perf_counter()
            next(states)
            return time.perf_counter() - start

        height, width = (side // self.model.pixels_per_latent for side in reversed(size))
        # The features of the grey image are in the memory of the steps.
        features = max(self.feature_budget_mb * 2**20 - self._feature_bytes((height, width), True, True), 0)
        fitting = measured_micro_batch(self.model.device, step_seconds, features, share)
        if self.micro_batch == 1:  # it was halved, since two did not fit
            return 1
        return fastest_micro_batch(min(fitting, COMPILED_MICRO_BATCH) if self.compiled else fitting, step_seconds)

    def _step(
        self, sampler: Sampler, state: SampleState, settings: Sampling, noise: Noise
    ) -> tuple[Sampler, SampleState]:
        """The state one step after `state`, which does not change, and the sampler for the current micro-batch."""
        if sampler.objective.micro_batch != self.micro_batch:
            sampler = self._sampler(state, settings, noise)
        after_step = state.copy()
        sampler.take_step(after_step)
        return sampler, after_step

    def _retry_with_smaller_batches(self, work: Callable[[], T]) -> T:
        """Call `work`; each time that it runs out of memory, halve the micro-batch for good and call it again."""
        while True:
            try:
                return translate_out_of_memory(work)
            except DeviceMemoryError:
                if self.micro_batch == 1:
                    raise
            self.micro_batch //= 2
            _log.warning("out of memory: from now on at most %d pairs in a UNet call", self.micro_batch)

    def _distances(self, state: SampleState, settings: Sampling) -> list[Distances | None]:
        windows, passes = Windows(state.inputs, settings), Counter[str]()
        objective = Objective(self._calls(windows), Sampling(), self.micro_batch, passes)
        found = measure_distances(objective, state, windows, self._blocks(style_inputs(windows.inputs)))
        self.passes["distance"] += passes.total()
        return found

    def _sampler(self, state: SampleState, settings: Sampling, noise: Noise) -> Sampler:
        windows = Windows(state.inputs, settings)
        objective = Objective(self._calls(windows), settings, self.micro_batch, self.passes)
        return Sampler(objective, settings, noise, self._blocks(windows.inputs), windows)

    def _calls(self, windows: Windows) -> UNetCalls:
        self.calls.slot = self.micro_batch
        return self.calls if windows.tiling == "none" else self.calls.eager  # circular padding changes the modules

    def _blocks(self, inputs: ShardInputs) -> list[Block]:
        batches = micro_batches(inputs.kinds(), self.micro_batch)
        images_of = [pair.feature_images for pair in inputs.pairs]
        styles, contents = styles_and_contents(inputs.pairs)
        sizes = [
            self._feature_bytes(image.shape, number in styles, number in contents)
            for number, image in enumerate(inputs.images)
        ]
        return blocks(batches, images_of, sizes, self.feature_budget_mb * 2**20)

    def _feature_bytes(self, shape: Sequence[int], is_style: bool, is_content: bool) -> int:
        """Size of what is kept of an image with latents of `shape` (C, h, w)."""
        elements = sum(layer.config.elements((shape[-1], shape[-2])) for layer in self.layers)
        return feature_parts(is_style, is_content) * elements * int(self.model.unet.dtype.itemsize)


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
