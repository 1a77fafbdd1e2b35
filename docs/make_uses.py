"""Write docs/uses.md and docs/uses/*.jpg: the settings, UNet passes and contact sheet of each job file.

    python docs/make_uses.py            # all job files; a few minutes on 2 cores
    python docs/make_uses.py texture    # the image of one job file, and the page

The SDXL model and the ControlNet are untrained. Their images show that a job runs, not what a trained model makes.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

import stylemill
from stylemill.config.job import Job
from stylemill.config.sampling import Sampling
from stylemill.report.contact_sheet import write_contact_sheet
from stylemill.store.ledger import Ledger

DOCS = Path(__file__).parent
JOBS = sorted((DOCS.parent / "jobs").glob("*.yaml"))
LIMIT = (3, 4)  # contents and styles on a contact sheet
HEAD = """# Uses

Each section is a job file in `jobs/`. UNet passes are samples of UNet batches for each output image, with features
shared within the shards of the job; the number without sharing is in brackets. `python docs/make_uses.py` writes this
page. The images are of the **untrained** demo models: they show that a job runs and which parts of an image it changes,
not what a trained model makes of it.
"""


def main(names: list[str]) -> None:
    (DOCS / "uses").mkdir(exist_ok=True)
    for job in JOBS:
        if not names or job.stem in names:
            _write_image(job)
    (DOCS / "uses.md").write_text("\n".join([HEAD, *map(_describe, JOBS)]), encoding="utf-8")


def _write_image(job: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = stylemill.run(job, {"output": f"{folder}/run"}, inline=True)
        print(result.describe())
        paths = result.summary.paths
        manifest = stylemill.plan(job).manifest
        ledger = Ledger(paths, read_only=True)
        ledger.refresh()
        sheet = write_contact_sheet(paths, manifest, ledger.records(), limit=LIMIT)
        if sheet:
            Image.open(sheet).save(DOCS / "uses" / f"{job.stem}.jpg", quality=85)


def _describe(job: Path) -> str:
    loaded, planned = Job.load(job), stylemill.plan(job)
    cost, images = planned.cost(), planned.rows
    default = Sampling()
    changed = {
        name: value for name, value in loaded.sampling.model_dump().items() if value != getattr(default, name)
    } | {"method": loaded.sampling.method, "steps": loaded.sampling.steps}
    comment = re.match(r"(?:#.*\n)+", job.read_text(encoding="utf-8"))
    description = " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines()) if comment else ""
    settings = ", ".join(f"`{name}: {value}`" for name, value in sorted(changed.items()))
    passes = f"{cost.with_sharing / images:.4g} ({cost.without_sharing / images:.4g})"
    return f"""
## {job.stem}

{description}

{settings}

UNet passes an image: {passes}.

![{job.stem}](uses/{job.stem}.jpg)
"""


if __name__ == "__main__":
    main(sys.argv[1:])
