"""Write controllable.parquet and control.parquet, and draw their masks and edge images: python make_conditions.py

The masks consist of the shapes below; the edges are those of the quickstart's photos. Needs Pillow and pyarrow.
The images are under CC0 1.0, like this file.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).parent
HEIGHT = 64  # pixels of a mask, which may have any resolution with the aspect ratio of its image

UNUSED, SKY, GROUND, FIGURE = range(4)  # labels
COLOURS = (0, 0, 0, 120, 180, 240, 90, 140, 60, 230, 80, 40)  # for viewers only: the index in the palette is the label

# Masks are shapes drawn over each other, in fractions of width and height: (label, points of a polygon) or
# (label, (left, upper, right, lower) of an ellipse).
Shape = tuple[int, tuple[float, ...]]
MASKS: dict[str, tuple[float, int, list[Shape]]] = {  # aspect ratio, background, shapes
    # contents
    "cameraman": (1, SKY, [
        (GROUND, (0, .43, 1, .43, 1, 1, 0, 1)),
        (FIGURE, (0, .5, .06, .32, .3, .2, .34, .12, .52, .14, .52, .27, .64, .3, .62, .4, .55, .6, .42, .59, .3, .75,
                  .3, 1, 0, 1)),
    ]),
    "rocket": (1.5, SKY, [(GROUND, (0, .85, 1, .85, 1, 1, 0, 1)), (FIGURE, (.47, .3, .53, .3, .53, 1, .47, 1))]),
    "island": (1, SKY, [  # a layout for an image without content
        (FIGURE, (.5, .05, .95, .5)), (GROUND, (0, .7, .3, .45, .55, .65, 1, .6, 1, 1, 0, 1)),
    ]),
    # styles
    "meadow": (1, SKY, [(GROUND, (0, .4, 1, .4, 1, .68, 0, .68)), (FIGURE, (0, .68, 1, .68, 1, 1, 0, 1))]),
    "mosaic": (1, SKY, [(GROUND, (0, .62, 1, .62, 1, 1, 0, 1)), (FIGURE, (.31, .18, .69, .56))]),
    "night": (1, SKY, [(GROUND, (0, .8, .4, .75, 1, .57, 1, 1, 0, 1)), (FIGURE, (.62, .05, .94, .37))]),
    "woodblock": (1, SKY, [(GROUND, (0, .35, 1, .38, 1, 1, 0, 1)), (FIGURE, (.6, .08, .86, .34))]),
    # parts of styles: where the label is UNUSED, the style is not used
    "meadow-field": (1, UNUSED, [(GROUND, (0, .4, 1, .4, 1, 1, 0, 1))]),
    "night-sky": (1, SKY, [(UNUSED, (0, .8, .4, .75, 1, .57, 1, 1, 0, 1)), (FIGURE, (.62, .05, .94, .37))]),
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


def draw_mask(aspect: float, background: int, shapes: list[Shape]) -> Image.Image:
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


def find_edges(photo: Path) -> Image.Image:
    """White where the brightness changes sharply, as ControlNets trained on edges expect."""
    grey = Image.open(photo).convert("L").filter(ImageFilter.GaussianBlur(1.5)).filter(ImageFilter.FIND_EDGES)
    small = grey.resize((grey.width // 2, grey.height // 2), Image.Resampling.BOX)
    border = Image.new("L", small.size, 0)
    # The rim is left out: the filter takes it for an edge.
    border.paste(small.crop((2, 2, small.width - 2, small.height - 2)), (2, 2))
    return border.point([255 * (value > 10) for value in range(256)]).convert("1")


def main() -> None:
    for folder in ("masks", "edges"):
        (HERE / folder).mkdir(exist_ok=True)
    for name, (aspect, background, shapes) in MASKS.items():
        draw_mask(aspect, background, shapes).save(HERE / "masks" / f"{name}.png", optimize=True)
    for name in EDGES:
        photo = HERE.parent / "quickstart" / "content" / name
        find_edges(photo).save(HERE / "edges" / f"{photo.stem}.png", optimize=True)

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
