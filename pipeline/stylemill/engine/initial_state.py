"""From pairs of images and texts to the first state of a shard: everything is encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stylemill.config.sampling import Sampling
from stylemill.engine.attention import Layer
from stylemill.engine.inputs import Pair
from stylemill.engine.masks import absent_label, masks_problem, placed_masks, to_grid, unique_masks
from stylemill.engine.noise import Noise, identity
from stylemill.engine.schedulers import Scheduler
from stylemill.engine.state import PairInputs, SampleState, ShardInputs
from stylemill.engine.unet.controlnet import control_images, control_problem, to_tensor, unique_controls
from stylemill.engine.unet.model import DiffusionModel
from stylemill.engine.windows import windows_problem
from stylemill.errors import ModelError
from stylemill.images.input_image import InputImage


def begin(
    model: DiffusionModel, pairs: Sequence[Pair], settings: Sampling, noise: Noise, layers: Sequence[Layer]
) -> SampleState:
    """Encode each unique image and text once and draw the initial latents.

    On the grids of `layers`, each label of a pair's content mask must stand in its style masks; else the pair is lost.
    Raises ModelError for sizes off the model's grid and ValueError for pairs that contradict themselves.
    """
    if settings.window and settings.window * model.pixels_per_latent % model.grid:
        raise ModelError(
            f"window {settings.window}: must be a multiple of {model.grid // model.pixels_per_latent} latents"
        )
    images: dict[str, InputImage] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for pair in pairs:
        _check(model, pair)
        for image in pair.images:
            if images.setdefault(image.name, image).digest != image.digest:
                raise ValueError(f"two different images of a shard have the name {image.name!r}")
            sizes[image.name] = image.size or sizes.get(image.name, pair.size)
    places = {name: place for place, name in enumerate(images)}
    grids = {name: _latent_shape(model, size)[1:] for name, size in sizes.items()}
    masks_of = [
        placed_masks(pair, [_latent_shape(model, pair.size)[1:], *(grids[style.name] for style in pair.styles)])
        for pair in pairs
    ]
    masks = unique_masks(masks_of)
    mask_places = {key: place for place, key in enumerate(masks)}
    controls_of = [control_images(pair, len(model.controls)) for pair in pairs]
    controls = unique_controls(
        (pair.size, image) for pair, own in zip(pairs, controls_of, strict=True) for image in own
    )
    control_places = {key: place for place, key in enumerate(controls)}
    texts = list(dict.fromkeys(["", *(text for pair in pairs for text in (pair.prompt, pair.negative_prompt))]))

    inputs = ShardInputs(
        pairs=[
            PairInputs(
                content=places[pair.content.name] if pair.content else None,
                styles=tuple(places[style.name] for style in pair.styles),
                prompt=texts.index(pair.prompt),
                negative=texts.index(pair.negative_prompt),
                content_weight=settings.content_weight if pair.content_weight is None else pair.content_weight,
                shape=_latent_shape(model, pair.size if pair.size_known else (model.grid, model.grid)),
                slot=pair.size_known,
                masks=tuple(mask_places[key] for key, _ in own_masks),
                controls=tuple(control_places[image.name, pair.size] for image in own_controls),
                identity=identity(pair),
            )
            for pair, own_masks, own_controls in zip(pairs, masks_of, controls_of, strict=True)
        ],
        # An unreadable image stands in as zeros, so that slots and batches are what they would be with it.
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
        masks=[to_grid(mask, grid) for (_, grid), mask in masks.items()],
        controls=[to_tensor(image, size) for (_, size), image in controls.items()],
        pixels=[] if not settings.refine_decoder_steps else _refined_on(pairs, images),
        refine_steps=settings.refine_decoder_steps,
        refine_rate=settings.refine_decoder_lr,
    )
    lost = {
        place: why
        for place, (pair, made) in enumerate(zip(pairs, inputs.pairs, strict=True))
        if (
            why := _impossible(pair, made, settings)
            or control_problem(pair, model.controls)
            or absent_label(inputs, made, layers)
        )
    }
    scheduler = Scheduler(model.scheduler, settings)
    latents = [
        torch.zeros(inputs.pairs[place].shape, dtype=model.latent_dtype)
        if place in lost
        else _initial_latents(scheduler, place, pair, inputs, settings, noise)
        for place, pair in enumerate(pairs)
    ]
    one_adam = settings.method == "optimization"
    return SampleState(
        inputs=inputs,
        latents_of=latents,
        lost_at=torch.full((len(pairs),), -1),
        excluded=lost,
        step=settings.first_step,
        moments_of=[torch.zeros(2, *z.shape, dtype=z.dtype) for z in latents] if one_adam else [],
        history_of=[torch.zeros(n, *z.shape, dtype=z.dtype) for z in latents] if (n := scheduler.history) else [],
        losses=torch.full((len(pairs), 2, 2), torch.nan),
    )


def _refined_on(pairs: Sequence[Pair], images: dict[str, InputImage]) -> list[Tensor]:
    """The pixels of each image that is the first style of a pair, for a resume reads no image again; else nothing."""
    wanted = {pair.styles[0].name for pair in pairs}
    return [
        torch.tensor(image.pixels if name in wanted and image.pixels is not None else [], dtype=torch.uint8)
        for name, image in images.items()
    ]


def _impossible(pair: Pair, made: PairInputs, settings: Sampling) -> str | None:
    if pair.placeholder:
        return "this pair was not asked for"
    if any(image.pixels is None for image in pair.images):
        return "an image of this pair could not be read"
    if settings.init == "content" and pair.content is None:
        return "init: content needs a content image, and this pair has none"
    return masks_problem(pair) or windows_problem(made, settings)


def _initial_latents(
    scheduler: Scheduler, place: int, pair: Pair, inputs: ShardInputs, settings: Sampling, noise: Noise
) -> Tensor:
    """Where a pair starts: at noise, at its content, or at its content noised to the first timestep."""
    made = inputs.pairs[place]
    content = None if made.content is None else inputs.images[made.content].to("cpu")
    if settings.method == "optimization" and settings.init != "noise" and content is not None:
        return content.clone()
    drawn = torch.from_numpy(noise.initial_latents(pair, made.shape)).to(inputs.images[0].dtype)
    if settings.init == "content" and content is not None:
        return scheduler.add_noise(content, drawn, scheduler.timesteps[settings.first_step])
    return drawn


def _latent_shape(model: DiffusionModel, size: tuple[int, int]) -> tuple[int, int, int]:
    width, height = size
    return model.latent_channels, height // model.pixels_per_latent, width // model.pixels_per_latent


def _check(model: DiffusionModel, pair: Pair) -> None:
    if not pair.styles:
        raise ValueError("a pair needs at least one style image")
    for name, size in [("the pair", pair.size), *((image.name, image.size) for image in pair.images)]:
        if size and (size[0] % model.grid or size[1] % model.grid or min(size) < model.grid):
            raise ModelError(f"{name}: {size[0]}×{size[1]} is off this model's grid of {model.grid} pixels")
    own = [("content", image) for image in (pair.content,) if image] + [("control", image) for image in pair.controls]
    for role, image in own:
        if image.size not in (None, pair.size):
            raise ValueError(f"{role} {image.name} has size {image.size}, its pair {pair.size}; fit it first")
