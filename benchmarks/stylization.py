"""Whether stylization happens: contents × styles through a model, judged in numbers and on a sheet.

    python benchmarks/stylization.py                                       # the quickstart's pictures, embedded model
    python benchmarks/stylization.py --ways --size 128                     # λ swept, guided sampling, KV injection
    python benchmarks/stylization.py --model MODEL --contents DIR --styles DIR --sheet FOLDER

A pair counts as stylized when colours, or patches, are nearer to the style than the content's are, and as kept when its
edges agree more with its own content's than with any other content's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from appearance import Pixels, colour_distance, edge_agreement, patch_distance
from stylemill.config.sampling import PRESETS, Sampling
from stylemill.engine import Engine, InputImage, Pair
from stylemill.images.read import load_image

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "manifests" / "quickstart"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of each way")
    options = parser.parse_args()

    contents, styles = (read(folders, options.size) for folders in (options.contents, options.styles))
    engine = Engine.load(options.model, device="auto", threads=options.threads, micro_batch=8)
    print(f"{len(contents)} contents × {len(styles)} styles, {options.size}², {options.steps} steps, {options.model}")
    for name, settings in ways(options).items():
        began = time.perf_counter()
        images = stylize(engine, contents, styles, settings)
        seconds = (time.perf_counter() - began) / (len(contents) * len(styles))
        print(f"{name}: {describe(judge(contents, styles, images))}; {seconds:.1f} s a pair", flush=True)
        if options.sheet:
            options.sheet.mkdir(parents=True, exist_ok=True)
            sheet(contents, styles, images).save(options.sheet / f"{name.replace(' ', '-')}.jpg", quality=90)


def ways(options: argparse.Namespace) -> dict[str, Sampling]:
    own = {"steps": options.steps, "learning_rate": options.rate, "content_weight": options.content_weight}
    chosen = {"optimization": Sampling(**PRESETS["style-transfer"] | own)}
    if options.ways:
        for weight in (0.0, 0.25, 1.0):
            chosen[f"optimization λ {weight:g}"] = Sampling(
                **PRESETS["style-transfer"] | own | {"content_weight": weight}
            )
        started = own | {"init": "content", "strength": 0.6}
        chosen["guided from the noised content"] = Sampling(**PRESETS["guided-transfer"] | started)
        chosen["kv injection"] = Sampling(**PRESETS["kv-injection"] | started)
    return chosen


def read(places: Sequence[Path], size: int) -> list[InputImage]:
    """The images of folders, in order of their names, cropped to size × size."""
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    return [
        InputImage(str(file), load_image(str(file), None, ".", (size, size), "crop").pixels)
        for file in files
        if file.suffix.lower() in SUFFIXES
    ]


def stylize(
    engine: Engine, contents: Sequence[InputImage], styles: Sequence[InputImage], settings: Sampling
) -> list[list[Pixels]]:
    """The image of each content (down) in each style (across)."""
    pairs = [Pair(styles=(style,), size=content.size, content=content) for content in contents for style in styles]
    *_, last = engine.sample(pairs, settings)
    images = engine.decode(last)
    return [images[row * len(styles) : (row + 1) * len(styles)] for row in range(len(contents))]


def judge(
    contents: Sequence[InputImage], styles: Sequence[InputImage], images: Sequence[Sequence[Pixels]]
) -> dict[str, float]:
    """Medians and shares over all pairs.

    `colour`, `patch`: distance of result and style over that of content and style, median; `…_nearer`: how many are
    below 1. `edges`: agreement with the own content, median; `unrelated`: with the best of the others, median; `kept`:
    how many agree most with their own.
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
    own, unrelated = np.array(edges).T
    return {
        "colour": float(np.median(colour)),
        "colour_nearer": float((colour < 1).mean()),
        "patch": float(np.median(patch)),
        "patch_nearer": float((patch < 1).mean()),
        "edges": float(np.median(own)),
        "unrelated": float(np.median(unrelated)),
        "kept": float((own > unrelated).mean()),
    }


DISTANCES = (colour_distance, patch_distance)


def describe(judged: dict[str, float]) -> str:
    return (
        f"colours nearer in {judged['colour_nearer']:.0%}, median {1 - judged['colour']:.0%}; "
        f"patches in {judged['patch_nearer']:.0%}, median {1 - judged['patch']:.0%}; "
        f"edges {judged['edges']:.2f} against {judged['unrelated']:.2f}, kept in {judged['kept']:.0%}"
    )


def sheet(
    contents: Sequence[InputImage], styles: Sequence[InputImage], images: Sequence[Sequence[Pixels]]
) -> Image.Image:
    """Contents down, styles across."""
    blank = np.full_like(contents[0].pixels, 255)
    rows = [[blank, *(style.pixels for style in styles)]]
    rows += [[content.pixels, *row] for content, row in zip(contents, images, strict=True)]
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows], 0))


if __name__ == "__main__":
    main()
