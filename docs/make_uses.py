"""Write docs/uses.md from the job files in jobs/, and its pictures from the embedded model.

    python docs/make_uses.py --pictures            # runs each job on a few of its pairs; about ten minutes on 2 cores
    python docs/make_uses.py --pictures texture    # the picture of one job, and the page
    python docs/make_uses.py                       # only the page

Of a job file, the page has the comment before the first key, the settings that make the use, and the commands.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import stylemill
from stylemill.images.encode import encode_image
from stylemill.report.contact_sheet import write_contact_sheet
from stylemill.store.ledger import Ledger

DOCS = Path(__file__).resolve().parent
JOBS, MANIFESTS = DOCS.parent / "jobs", DOCS.parent / "manifests"
NOISE = "there is no small trained one, and of an untrained one the picture would be noise"
USES = {  # job file: title and, if there is no picture, why
    "style-transfer": ("Style transfer", ""),
    "guided-transfer": ("Guided sampling", ""),
    "kv-injection": ("KV injection", ""),
    "few-steps": ("Few steps, with a LoRA", f"No picture of the LoRA: {NOISE}."),
    "own-sizes": ("Images of their own sizes", ""),
    "refined": ("Refined decoder", ""),
    "controllable": ("Controllable synthesis", ""),
    "text-to-image": ("Text to image", ""),
    "texture": ("Texture synthesis", ""),
    "texture-fast": ("Texture synthesis, fast", ""),
    "texture-expansion": ("Texture expansion", ""),
    "tiling": ("Seamless tiles", ""),
    "controlnet": ("ControlNet", f"No picture of a ControlNet: {NOISE}."),
    "sdxl-transfer": ("Style transfer with SDXL", f"No picture of SDXL: {NOISE}."),
    "sdxl-text-to-image": ("Text to image with SDXL", f"No picture of SDXL: {NOISE}."),
}
MOST_PAIRS = 8  # of a manifest with more, a picture has 2 contents × 3 styles
HEAD = """# Uses

Each use is a job file in [`jobs/`](../jobs). It runs on a CPU and without a network, those of SDXL and ControlNets
after a `stylemill demo-model` command that they name, and with a real model by the second command. The pictures come
from the embedded model, of 12 million parameters, at 128 pixels: they show what a setting does, not how good the images
of a real model are. `python docs/make_uses.py --pictures` makes this page and its pictures from the job files.
`stylemill plan JOB` says what a job costs.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", nargs="*", metavar="USE", help="make the pictures of all uses, or of some")
    wanted = parser.parse_args().pictures
    for name, (_, why_none) in USES.items():
        if wanted is not None and not why_none and (not wanted or name in wanted):
            write_picture(name)
    (DOCS / "uses.md").write_text(page(), encoding="utf-8")


def page() -> str:
    return HEAD + "".join(map(section, USES))


def section(name: str) -> str:
    title, why_none = USES[name]
    description, flags, settings = read_job(name)
    command = f"stylemill run jobs/{name}.yaml"
    picture = why_none or f"![{title}](uses/{name}.jpg)"
    return f"""
## {title}

{description}

```yaml
{settings}
```

    {command}
    {command} \\
        {flags}

{picture}
"""


def read_job(name: str) -> tuple[str, str, str]:
    """The description of a job file, its flags for a real model, and the lines of the settings that make the use."""
    comment, *blocks = re.split(r"^(?=\w)", (JOBS / f"{name}.yaml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.removeprefix("#").strip() for line in comment.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("Real model: "))
    flags = " \\\n        ".join(lines[first:]).removeprefix("Real model: ")
    shown = [block.rstrip() for block in blocks if _makes_the_use(block)]
    return " ".join(lines[:first]), flags, "\n".join(shown)


def _makes_the_use(block: str) -> bool:
    """Whether a top-level key of a job file is part of what the job shows; most keys are those of any job."""
    key, lines = block.split(":")[0], block.rstrip().splitlines()
    return (
        key in ("preset", "sampling", "images_per_pair")
        or (key == "manifest" and "#" in block)
        or (key in ("model", "image") and len(lines) > 2)
    )


def write_picture(name: str) -> None:
    """Run the job on a few of its pairs, and write its contact sheet to docs/uses/."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder, "pairs.parquet")
        pq.write_table(few_pairs(stylemill.plan(JOBS / f"{name}.yaml").manifest.path), pairs)
        result = stylemill.run(
            JOBS / f"{name}.yaml", {"manifest": str(pairs), "output": f"{folder}/run"}, inline=True, quiet=True
        )
        print(name, result.describe(), flush=True)
        paths, ledger = result.summary.paths, Ledger(result.summary.paths, read_only=True)
        ledger.refresh()
        manifest = stylemill.plan(JOBS / f"{name}.yaml", {"manifest": str(pairs)}).manifest
        sheet = write_contact_sheet(paths, manifest, ledger.records(), limit=(3, 5))
        assert sheet
        with Image.open(sheet) as image:
            (DOCS / "uses" / f"{name}.jpg").write_bytes(encode_image(np.asarray(image), "jpeg", 75))


def few_pairs(manifest: Path) -> pa.Table:
    """The rows of a manifest, or some of them, with absolute paths."""
    table = pq.read_table(manifest)
    rows = table.to_pylist()
    if len(rows) > MOST_PAIRS:
        contents, styles = (list(dict.fromkeys(row[name] for row in rows)) for name in ("content", "style"))
        rows = [row for row in rows if row["content"] in contents[:3:2] and row["style"] in styles[:3]]
    for row in rows:
        for column in ("content", "style", "content_mask", "style_mask"):
            if row.get(column):
                row[column] = _absolute(manifest.parent, row[column])
    return pa.Table.from_pylist(rows, schema=table.schema)


def _absolute(base: Path, value: object) -> object:
    return [_absolute(base, item) for item in value] if isinstance(value, list) else str(base / str(value))


if __name__ == "__main__":
    main()
