"""How well a model stylizes: contents × styles, evaluated by numbers and on a contact sheet.

    python benchmarks/stylization.py                                       # the quickstart's images, embedded model
    python benchmarks/stylization.py --ways --size 128                     # several λ, guided sampling, KV injection
    python benchmarks/stylization.py --opt-ins --size 128 --steps 50 --rate 0.05    # what saves passes of the UNet
    python benchmarks/stylization.py --model MODEL --contents DIR --styles DIR --sheet FOLDER

A pair's colours, or patches, count as stylized if they are nearer to the style's than the content's are. Its content
counts as kept if its edges agree more with that content's than with any other content's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from appearance import Pixels, colour_distance, edge_agreement, patch_distance
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.engine import Engine, InputImage, Pair, SampleState
from stylemill.images.read import load_image

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "manifests" / "quickstart"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
DISTANCES = (colour_distance, patch_distance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contents", type=Path, nargs="+", default=[QUICKSTART / "content"], help="folders or files")
    parser.add_argument("--styles", type=Path, nargs="+", default=[QUICKSTART / "style"], help="folders or files")
    parser.add_argument("--model", default="demo", help="demo, a diffusers folder or hub id")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.12, help="learning rate of Adam")
    parser.add_argument("--content-weight", type=float, default=0.25, help="λ")
    parser.add_argument("--ways", action="store_true", help="also λ 0 and 1, guided sampling and KV injection")
    parser.add_argument("--opt-ins", action="store_true", help="only guided sampling, with what saves passes of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", type=Path, help="folder for a contact sheet of each run")
    options = parser.parse_args()

    contents, styles = (read(folders, options.size) for folders in (options.contents, options.styles))
    engine = Engine.load(options.model, device="auto", threads=options.threads, micro_batch=8)
    print(f"{len(contents)} contents × {len(styles)} styles, {options.size}², {options.steps} steps, {options.model}")
    runs = opt_in_settings(options) if options.opt_ins else sampling_settings(options)
    for name, settings in runs.items():
        started = time.perf_counter()
        state = sample(engine, contents, styles, settings)
        seconds = (time.perf_counter() - started) / len(state.latents_of)
        images = decode(engine, state, len(styles))
        scores = describe(evaluate(contents, styles, images))
        print(f"{name}: {scores}; {distances(engine, state, settings)}; {seconds:.1f} s a pair", flush=True)
        if options.sheet:
            options.sheet.mkdir(parents=True, exist_ok=True)
            contact_sheet(contents, styles, images).save(
                options.sheet / f"{name.replace(',', '').replace(' ', '-')}.jpg", quality=90
            )
    if options.opt_ins:
        print_times(engine, contents[:1], styles, runs)


def sampling_settings(options: argparse.Namespace) -> dict[str, Sampling]:
    """The settings of each run, by its name."""
    common = {"steps": options.steps, "learning_rate": options.rate, "content_weight": options.content_weight}
    runs = {"optimization": Sampling(**PRESETS["style-transfer"] | common)}
    if options.ways:
        for weight in (0.0, 0.25, 1.0):
            runs[f"optimization λ {weight:g}"] = Sampling(
                **PRESETS["style-transfer"] | common | {"content_weight": weight}
            )
        from_content = common | {"init": "content", "strength": 0.6}
        runs["guided from the noised content"] = Sampling(**PRESETS["guided-transfer"] | from_content)
        runs["kv injection"] = Sampling(**PRESETS["kv-injection"] | from_content)
    return runs


def opt_in_settings(options: argparse.Namespace) -> dict[str, Sampling]:
    """Guided sampling from the noised content and from noise: as it is, with what saves passes, with half the steps."""
    common = {"steps": options.steps, "learning_rate": options.rate, "content_weight": options.content_weight}
    starts: dict[str, dict[str, Any]] = {"noised content": {"init": "content", "strength": 0.6}, "noise": {}}
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        "reuse_prediction": {"reuse_prediction": True},
        "guided_every 2": {"guided_every": 2},
        "both": {"reuse_prediction": True, "guided_every": 2},
        "half the steps": {"steps": options.steps // 2},
    }
    return {
        f"from {start}, {change}": Sampling(**PRESETS["guided-transfer"] | common | starts[start] | changes[change])
        for start in starts
        for change in changes
    }


def read(paths: Sequence[Path], size: int) -> list[InputImage]:
    """The images of folders, sorted by name, and of files, cropped to size × size."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [
        InputImage(str(file), load_image(str(file), None, ".", (size, size), "crop").pixels)
        for file in files
        if file.suffix.lower() in SUFFIXES
    ]


def stylize(
    engine: Engine, contents: Sequence[InputImage], styles: Sequence[InputImage], settings: Sampling
) -> list[list[Pixels]]:
    """The image of each content (down) in each style (across)."""
    return decode(engine, sample(engine, contents, styles, settings), len(styles))


def sample(
    engine: Engine, contents: Sequence[InputImage], styles: Sequence[InputImage], settings: Sampling
) -> SampleState:
    pairs = [Pair(styles=(style,), size=content.size, content=content) for content in contents for style in styles]
    *_, last = engine.sample(pairs, settings)
    return last


def decode(engine: Engine, state: SampleState, columns: int) -> list[list[Pixels]]:
    images = engine.decode(state)
    return [images[start : start + columns] for start in range(0, len(images), columns)]


def distances(engine: Engine, state: SampleState, settings: Sampling) -> str:
    """The medians of the engine's own distances."""
    found = [one for one in engine.distances(state, settings) if one is not None]
    before, style, content = (
        np.median([getattr(one, name) for one in found]) for name in ("style_before", "style", "content")
    )
    return f"distance to the style {style:.3f}, before {before:.3f}, to the content {content:.3f}"


def print_times(
    engine: Engine, contents: Sequence[InputImage], styles: Sequence[InputImage], runs: dict[str, Sampling]
) -> None:
    """Print the seconds of sampling of each run: the least of three, taken in turns, as other work may disturb one."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, settings in runs.items():
            started = time.perf_counter()
            sample(engine, contents, styles, settings)
            seconds[name].append((time.perf_counter() - started) / (len(contents) * len(styles)))
    for name, found in seconds.items():
        default = min(seconds[name.split(", ")[0] + ", default"])
        print(f"{name}: {min(found):.2f} s a pair, default / this {default / min(found):.2f}; all {np.round(found, 2)}")


def evaluate(
    contents: Sequence[InputImage], styles: Sequence[InputImage], images: Sequence[Sequence[Pixels]]
) -> dict[str, float]:
    """Medians and shares over all pairs.

    `colour` and `patch` are medians of the distance from image to style, divided by that from content to style, and
    `…_nearer` the shares of pairs below 1. `edges` is the median agreement with the pair's content, `unrelated` that
    with the most similar other content, and `kept` the share of pairs that agree most with their own content.
    """
    ratios, edges = [], []
    for row, content in enumerate(contents):
        for column, style in enumerate(styles):
            image = images[row][column]
            ratios.append(
                [distance(image, style.pixels) / distance(content.pixels, style.pixels) for distance in DISTANCES]
            )
            others = [edge_agreement(image, other.pixels) for other in contents if other is not content]
            edges.append((edge_agreement(image, content.pixels), max(others, default=0.0)))
    colour, patch = np.array(ratios).T
    own_content, other_content = np.array(edges).T
    return {
        "colour": float(np.median(colour)),
        "colour_nearer": float((colour < 1).mean()),
        "patch": float(np.median(patch)),
        "patch_nearer": float((patch < 1).mean()),
        "edges": float(np.median(own_content)),
        "unrelated": float(np.median(other_content)),
        "kept": float((own_content > other_content).mean()),
    }


def describe(scores: dict[str, float]) -> str:
    return (
        f"colours nearer in {scores['colour_nearer']:.0%}, median {1 - scores['colour']:.0%}; "
        f"patches in {scores['patch_nearer']:.0%}, median {1 - scores['patch']:.0%}; "
        f"edges {scores['edges']:.2f} against {scores['unrelated']:.2f}, kept in {scores['kept']:.0%}"
    )


def contact_sheet(
    contents: Sequence[InputImage], styles: Sequence[InputImage], images: Sequence[Sequence[Pixels]]
) -> Image.Image:
    """Contents down, styles across."""
    blank = np.full_like(contents[0].pixels, 255)
    rows = [[blank, *(style.pixels for style in styles)]]
    rows += [[content.pixels, *row] for content, row in zip(contents, images, strict=True)]
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows], 0))


if __name__ == "__main__":
    main()
