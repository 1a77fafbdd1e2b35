"""Makes controllable.parquet and control.parquet, and draws their masks and edges: python make_conditions.py

Masks are drawn from nothing but the shapes below; edges are those of the quickstart's photos. Needs Pillow and pyarrow.
Given away under CC0 1.0 like this file.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).parent
HEIGHT = 64  # pixels of a mask; any resolution does, if the shape is that of the image it belongs to

NOBODY, SKY, GROUND, FIGURE = range(4)
COLOURS = (0, 0, 0, 120, 180, 240, 90, 140, 60, 230, 80, 40)  # for the eye only: the palette's index is the label

# Masks as shapes drawn over each other, in parts of width and height: (label, points of a polygon) or
# (label, (left, upper, right, lower) of a disc). The first label fills the background.
Shape = tuple[int, tuple[float, ...]]
MASKS: dict[str, tuple[float, int, list[Shape]]] = {  # aspect ratio, background, shapes
    # contents
    "cameraman": (1, SKY, [
        (GROUND, (0, .43, 1, .43, 1, 1, 0, 1)),
        (FIGURE, (0, .5, .06, .32, .3, .2, .34, .12, .52, .14, .52, .27, .64, .3, .62, .4, .55, .6, .42, .59, .3, .75,
                  .3, 1, 0, 1)),
    ]),
    "rocket": (1.5, SKY, [(GROUND, (0, .85, 1, .85, 1, 1, 0, 1)), (FIGURE, (.47, .3, .53, .3, .53, 1, .47, 1))]),
    "island": (1, SKY, [  # a layout of its own, for a picture without content
        (FIGURE, (.5, .05, .95, .5)), (GROUND, (0, .7, .3, .45, .55, .65, 1, .6, 1, 1, 0, 1)),
    ]),
    # styles
    "meadow": (1, SKY, [(GROUND, (0, .4, 1, .4, 1, .68, 0, .68)), (FIGURE, (0, .68, 1, .68, 1, 1, 0, 1))]),
    "mosaic": (1, SKY, [(GROUND, (0, .62, 1, .62, 1, 1, 0, 1)), (FIGURE, (.31, .18, .69, .56))]),
    "night": (1, SKY, [(GROUND, (0, .8, .4, .75, 1, .57, 1, 1, 0, 1)), (FIGURE, (.62, .05, .94, .37))]),
    "woodblock": (1, SKY, [(GROUND, (0, .35, 1, .38, 1, 1, 0, 1)), (FIGURE, (.6, .08, .86, .34))]),
    # parts of styles: what is nobody's label is left out
    "meadow-field": (1, NOBODY, [(GROUND, (0, .4, 1, .4, 1, 1, 0, 1))]),
    "night-sky": (1, SKY, [(NOBODY, (0, .8, .4, .75, 1, .57, 1, 1, 0, 1)), (FIGURE, (.62, .05, .94, .37))]),
}  # fmt: skip
EDGES = ("cameraman.png", "coffee.jpg", "rocket.jpg")

# content, its mask, styles with their masks
CONTROLLABLE = [
    ("cameraman.png", "cameraman", {"mosaic": "mosaic"}),
    ("cameraman.png", "cameraman", {"woodblock": "woodblock"}),
    ("cameraman.png", "cameraman", {"night": "night-sky", "meadow": "meadow-field"}),
    ("rocket.jpg", "rocket", {"night": "night"}),
    (None, "island", {"woodblock": "woodblock"}),
    (None, "island", {"meadow": "meadow"}),
]


def mask(aspect: float, background: int, shapes: list[Shape]) -> Image.Image:
    size = round(HEIGHT * aspect), HEIGHT
    image = Image.new("P", size, background)
    image.putpalette(COLOURS)
    draw = ImageDraw.Draw(image)
    for label, numbers in shapes:
        points = [(x * size[0], y * size[1]) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        if len(points) == 2:
            draw.ellipse(points, fill=label)
        else:
            draw.polygon(points, fill=label)
    return image


def edges(photo: Path) -> Image.Image:
    """White where brightness jumps, as ControlNets trained on edges expect it."""
    grey = Image.open(photo).convert("L").filter(ImageFilter.GaussianBlur(1.5)).filter(ImageFilter.FIND_EDGES)
    small = grey.resize((grey.width // 2, grey.height // 2), Image.Resampling.BOX)
    border = Image.new("L", small.size, 0)
    border.paste(small.crop((2, 2, small.width - 2, small.height - 2)), (2, 2))  # the filter takes the rim for an edge
    return border.point([255 * (value > 10) for value in range(256)]).convert("1")


def main() -> None:
    for folder in ("masks", "edges"):
        (HERE / folder).mkdir(exist_ok=True)
    for name, (aspect, background, shapes) in MASKS.items():
        mask(aspect, background, shapes).save(HERE / "masks" / f"{name}.png", optimize=True)
    for name in EDGES:
        photo = HERE.parent / "quickstart" / "content" / name
        edges(photo).save(HERE / "edges" / f"{photo.stem}.png", optimize=True)

    rows = [
        {
            "pair_id": "-".join([content, *styles]),
            "content": photo and f"quickstart/content/{photo}",
            "style": [f"quickstart/style/{style}.jpg" for style in styles],
            "content_mask": f"conditions/masks/{content}.png",
            "style_mask": [f"conditions/masks/{name}.png" for name in styles.values()],
        }
        for photo, content, styles in CONTROLLABLE
    ]
    pq.write_table(pa.Table.from_pylist(rows), HERE.parent / "controllable.parquet")
    rows = [
        {
            "pair_id": f"{Path(photo).stem}-{style}",
            "style": f"quickstart/style/{style}.jpg",
            "control": f"conditions/edges/{Path(photo).stem}.png",
        }
        for photo in EDGES
        for style in ("mosaic", "woodblock")
    ]
    pq.write_table(pa.Table.from_pylist(rows), HERE.parent / "control.parquet")


if __name__ == "__main__":
    main()
