"""From the pairs of a shard to its initial state: each image and text is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.engine.attention import Layer
from stylemill.engine.controls import control_tensor, controls_or_blanks, controls_problem, unique_controls
from stylemill.engine.inputs import Pair
from stylemill.engine.masks import masks_on_grids, masks_problem, missing_label, resize_labels, unique_masks
from stylemill.engine.noise import Noise, identity
from stylemill.engine.schedulers import Scheduler
from stylemill.engine.state import PairFailure, PairInputs, SampleState, ShardInputs
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.windows import windows_problem
from stylemill.errors import ModelError
from stylemill.images.input_image import InputImage


def create_initial_state(
    model: DiffusionModel, pairs: Sequence[Pair], settings: Sampling, noise: Noise, layers: Sequence[Layer]
) -> SampleState:
    """Encode each unique image and text once and draw the initial latents.

    A pair that cannot be sampled is excluded, with its reason, also if an image or a text of it is encoded to NaN or
    Inf. `layers` decide the grids on which each label of a content mask must be in a style mask. Raises ModelError for
    sizes off the model's grid, and ValueError for pairs that are inconsistent in themselves, with each other or with
    the settings.
    """
    _check_window(model, settings)
    _check_predictions(model, pairs, settings)
    for pair in pairs:
        _check_pair(model, pair)
    inputs = _shard_inputs(model, pairs, settings)
    inputs, images, texts = _without_overflows(inputs)
    excluded: dict[int, PairFailure] = {}
    for number, (pair, pair_inputs) in enumerate(zip(pairs, inputs.pairs, strict=True)):
        if reason := (
            _pair_problem(pair, settings)
            or masks_problem(pair)
            or windows_problem(pair_inputs, settings)
            or controls_problem(pair, model.controlnets)
            or missing_label(inputs, pair_inputs, layers)
        ):
            excluded[number] = PairFailure("sample", reason)
        elif reason := _encoding_problem(model, pair, pair_inputs, images, texts):
            excluded[number] = PairFailure("encode", reason)
    scheduler = Scheduler(model.scheduler, settings)
    latents = [
        torch.zeros(inputs.pairs[number].shape, dtype=model.latent_dtype)
        if number in excluded
        else _initial_latents(scheduler, pair, inputs.pairs[number], inputs, settings, noise)
        for number, pair in enumerate(pairs)
    ]
    one_adam = settings.method == "optimization"
    return SampleState(
        inputs=replace(inputs, starts=[z for z, pair in zip(latents, pairs, strict=True) if pair.content is None]),
        latents_of=latents,
        lost_at=torch.full((len(pairs),), -1),
        excluded=excluded,
        step=settings.first_step,
        moments_of=[torch.zeros(2, *z.shape, dtype=z.dtype) for z in latents] if one_adam else [],
        history_of=[torch.zeros(n, *z.shape, dtype=z.dtype) for z in latents] if (n := scheduler.history) else [],
        predictions_of=[torch.zeros_like(z) for z in latents] if settings.reuse_prediction else [],
    )


def _shard_inputs(model: DiffusionModel, pairs: Sequence[Pair], settings: Sampling) -> ShardInputs:
    images, sizes = _unique_images(pairs)
    image_numbers = {name: number for number, name in enumerate(images)}
    grids = {name: _latent_shape(model, size)[1:] for name, size in sizes.items()}
    masks_of = [
        masks_on_grids(pair, [_latent_shape(model, pair.size)[1:], *(grids[style.name] for style in pair.styles)])
        for pair in pairs
    ]
    masks = unique_masks(masks_of)
    mask_numbers = {key: number for number, key in enumerate(masks)}
    controls_of = [controls_or_blanks(pair, len(model.controlnets)) for pair in pairs]
    controls = unique_controls(
        (pair.size, image) for pair, own in zip(pairs, controls_of, strict=True) for image in own
    )
    control_numbers = {key: number for number, key in enumerate(controls)}
    texts = list(dict.fromkeys(["", *(text for pair in pairs for text in (pair.prompt, pair.negative_prompt))]))
    return ShardInputs(
        pairs=[
            PairInputs(
                content=image_numbers[pair.content.name] if pair.content else None,
                styles=tuple(image_numbers[style.name] for style in pair.styles),
                prompt=texts.index(pair.prompt),
                negative=texts.index(pair.negative_prompt),
                content_weight=settings.content_weight if pair.content_weight is None else pair.content_weight,
                shape=_latent_shape(model, pair.size if pair.size_known else (model.grid, model.grid)),
                slot=pair.size_known,
                masks=tuple(mask_numbers[key] for key, _ in own_masks),
                controls=tuple(control_numbers[image.name, pair.size] for image in own_controls),
                identity=identity(pair),
            )
            for pair, own_masks, own_controls in zip(pairs, masks_of, controls_of, strict=True)
        ],
        # Zeros for an unreadable image: slots and micro-batches are then those of a run in which it is readable.
        images=[
            torch.zeros(_latent_shape(model, sizes[name]), dtype=model.latent_dtype)
            if image.pixels is None
            else model.encode_image(image.pixels)
            for name, image in images.items()
        ],
        digests=[image.digest for image in images.values()],
        texts=[model.encode_text(text) for text in texts],
        tiling=settings.tiling,
        window=settings.window,
        masks=[resize_labels(mask, grid) for (_, grid), mask in masks.items()],
        controls=[control_tensor(image, size) for (_, size), image in controls.items()],
        pixels=_first_style_pixels(pairs, images) if settings.refine_decoder_steps else [],
        refine_steps=settings.refine_decoder_steps,
        refine_rate=settings.refine_decoder_lr,
    )


def _without_overflows(inputs: ShardInputs) -> tuple[ShardInputs, set[int], set[int]]:
    """The inputs with zeros for images and texts that were encoded to NaN or Inf, and the numbers of these."""
    images = {number for number, image in enumerate(inputs.images) if not image.isfinite().all()}
    texts = {number for number, text in enumerate(inputs.texts) if not text.is_finite()}
    inputs = replace(
        inputs,
        images=[torch.zeros_like(one) if number in images else one for number, one in enumerate(inputs.images)],
        texts=[one.zeros_like() if number in texts else one for number, one in enumerate(inputs.texts)],
    )
    return inputs, images, texts


def _encoding_problem(
    model: DiffusionModel, pair: Pair, inputs: PairInputs, bad_images: set[int], bad_texts: set[int]
) -> str | None:
    """Which image or text of a pair was encoded to NaN or Inf, and what to do; None if none was."""
    numbers = inputs.styles if inputs.content is None else (inputs.content, *inputs.styles)
    for number, image in zip(numbers, pair.images, strict=True):
        if number in bad_images:
            return f"{image.name}: the VAE's encoder gave {_not_finite(model.vae.dtype)}"
    for number, text in ((0, ""), (inputs.prompt, pair.prompt), (inputs.negative, pair.negative_prompt)):
        if number in bad_texts:
            return f"prompt {text!r}: the text encoder gave {_not_finite(model.text_encoders[0].dtype)}"
    return None


def _not_finite(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "NaN or Inf in float16; set model.dtype to bfloat16 or float32"
    return "NaN or Inf; check the weights of the model"


def _unique_images(pairs: Sequence[Pair]) -> tuple[dict[str, InputImage], dict[str, tuple[int, int]]]:
    """The content and style images of all pairs by name, and their widths and heights in pixels."""
    images: dict[str, InputImage] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for pair in pairs:
        for image in pair.images:
            if images.setdefault(image.name, image).digest != image.digest:
                raise ValueError(
                    f"two different images of a shard have the name {image.name!r}; give each its own name"
                )
            sizes[image.name] = image.size or sizes.get(image.name, pair.size)
    return images, sizes


def _first_style_pixels(pairs: Sequence[Pair], images: dict[str, InputImage]) -> list[Tensor]:
    """The pixels of each image that is the first style of a pair, an empty tensor for other images.

    A resumed shard refines its decoders on them without reading the images again.
    """
    first_styles = {pair.styles[0].name for pair in pairs}
    return [
        torch.tensor(image.pixels if name in first_styles and image.pixels is not None else [], dtype=torch.uint8)
        for name, image in images.items()
    ]


def _pair_problem(pair: Pair, settings: Sampling) -> str | None:
    if pair.placeholder:
        return "this pair was not requested"
    if any(image.pixels is None for image in pair.images):
        return "an image of this pair could not be read"
    if settings.init == "content" and pair.content is None:
        return "init: content needs a content image, and this pair has none"
    return None


def _initial_latents(
    scheduler: Scheduler, pair: Pair, pair_inputs: PairInputs, inputs: ShardInputs, settings: Sampling, noise: Noise
) -> Tensor:
    """Noise, the content latent, or the content latent noised to the first timestep, as `init` and `method` say."""
    content = None if pair_inputs.content is None else inputs.images[pair_inputs.content].to("cpu")
    if settings.method == "optimization" and settings.init != "noise" and content is not None:
        return content.clone()
    drawn = torch.from_numpy(noise.initial_latents(pair, pair_inputs.shape)).to(inputs.images[0].dtype)
    if settings.init == "content" and content is not None:
        return scheduler.add_noise(content, drawn, scheduler.timesteps[settings.first_step])
    return drawn


def _latent_shape(model: DiffusionModel, size: tuple[int, int]) -> tuple[int, int, int]:
    width, height = size
    return model.latent_channels, height // model.pixels_per_latent, width // model.pixels_per_latent


def _check_window(model: DiffusionModel, settings: Sampling) -> None:
    if settings.window and settings.window * model.pixels_per_latent % model.grid:
        raise ModelError(
            f"sampling.window {settings.window}: must be a multiple of {model.grid // model.pixels_per_latent} latents"
        )


def _check_predictions(model: DiffusionModel, pairs: Sequence[Pair], settings: Sampling) -> None:
    """The prediction of a gradient pass is that of denoising only with the null prompt and without ControlNets."""
    if not settings.reuse_prediction:
        return
    if model.controlnets:
        raise ValueError(
            "sampling.reuse_prediction takes predictions made without ControlNets, and this model has some"
        )
    for number, pair in enumerate(pairs):
        if pair.prompt:
            raise ValueError(
                f"sampling.reuse_prediction takes predictions for the empty prompt, and pair {number} has the prompt"
                f" {pair.prompt!r}"
            )


def _check_pair(model: DiffusionModel, pair: Pair) -> None:
    if not pair.styles:
        raise ValueError("a pair needs at least one style image")
    for name, size in [("the pair", pair.size), *((image.name, image.size) for image in pair.images)]:
        if size and (size[0] % model.grid or size[1] % model.grid or min(size) < model.grid):
            raise ModelError(
                f"{name}: {size[0]}×{size[1]} pixels; for this model both sides must be multiples of {model.grid}"
            )
    of_pair_size = [("content", image) for image in (pair.content,) if image]
    of_pair_size += [("control", image) for image in pair.controls]
    for role, image in of_pair_size:
        if image.size not in (None, pair.size):
            raise ValueError(f"{role} {image.name} has size {image.size}, its pair {pair.size}; resize it first")
