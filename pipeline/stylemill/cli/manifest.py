"""Commands on a manifest: manifest build, manifest validate, manifest show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stylemill.cli.command import Command
from stylemill.cli.options import Tile
from stylemill.plural import counted

if TYPE_CHECKING:
    from stylemill.manifest import ImageRef

app = typer.Typer(
    help="Build, validate or show a manifest of pairs.", epilog="example: stylemill manifest show pairs.parquet"
)

ManifestArgument = Annotated[str, typer.Argument(metavar="MANIFEST", help="Parquet file of the manifest.")]


@app.command(
    "build", cls=Command, epilog="example: stylemill manifest build pairs.parquet --content photos --style art"
)
def build(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    content: Annotated[
        str | None,
        typer.Option(
            metavar="CONTENT",
            help="Content images: folder, glob, image, or .txt or .csv list. Without it, rows have a style only.",
        ),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(metavar="STYLE", help="Style images: folder, glob, image, or .txt or .csv list."),
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(metavar="CSV", help="Finished pairs. The header names manifest columns.")
    ] = None,
    pairing: Annotated[
        Literal["product", "zip"], typer.Option(help="Pair every content with every style, or the n-th with the n-th.")
    ] = "product",
    sample: Annotated[
        int | None, typer.Option(metavar="N", help="Draw N distinct pairs of the product at random.")
    ] = None,
    sample_seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the random choice of --sample.")] = 0,
    tile: Annotated[
        Tile | None,
        typer.Option(
            parser=Tile.parse, metavar="CxS", help="Contents and styles of a block of consecutive rows, such as 16x16."
        ),
    ] = None,
    rows_per_group: Annotated[
        int | None,
        typer.Option(metavar="N", help="Rows of a Parquet row group. Without it: the rows of a tile, or 64."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="PROMPT", help="Prompt of every row.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="PROMPT", help="Negative prompt of every row.")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="SEED", help="Seed of every row. Without it, each pair has its own noise.")
    ] = None,
    content_weight: Annotated[
        float | None, typer.Option(metavar="WEIGHT", help="Content weight (lambda) of every row.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> int:
    """Pair images of folders, globs or lists, and write the manifest."""
    from stylemill.manifest import build_manifest

    rows = build_manifest(
        out,
        content,
        style,
        pairs=pairs,
        pairing="sample" if sample else pairing,
        tile=tile,
        rows_per_group=rows_per_group,
        samples=sample,
        sample_seed=sample_seed,
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        content_weight=content_weight,
        force=force,
    )
    print(f"{out}: {counted(rows, 'row')}")
    return 0


@app.command("validate", cls=Command, epilog="example: stylemill manifest validate pairs.parquet --decode")
def validate(
    manifest: ManifestArgument,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", help="List at most N problems. All are counted.")] = 100,
) -> int:
    """Check every row of a manifest. The exit code is 2 if there is a problem."""
    from stylemill.manifest import validate_manifest

    report = validate_manifest(manifest, _image_decoder(Path(manifest)) if decode else None, limit=limit)
    print(report)
    return 0 if report.ok else 2


@app.command("show", cls=Command, epilog="example: stylemill manifest show pairs.parquet")
def show(
    manifest: ManifestArgument, limit: Annotated[int, typer.Option(metavar="N", help="Show at most N rows.")] = 5
) -> int:
    """Print the size, the columns and the first rows of a manifest."""
    from stylemill.manifest import show_manifest

    print(show_manifest(manifest, limit))
    return 0


def _image_decoder(manifest: Path) -> Callable[[str, ImageRef], None]:
    """A function that decodes one image of a manifest column and raises ImageError or TransientError if it cannot.

    The manifest does not import the image reader, so the command brings both together.
    """
    from stylemill.images.masks import load_labels
    from stylemill.images.read import load_image

    base = manifest.absolute().parent

    def decode(column: str, ref: ImageRef) -> None:
        load = load_labels if column.endswith("_mask") else load_image
        load(ref.path, ref.data, base, (64, 64), "crop")

    return decode
