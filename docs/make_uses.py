"""Write docs/uses.md and docs/uses/*.jpg: each job file's settings, UNet passes and a picture of what it makes.

    python docs/make_uses.py            # all job files, a few minutes on 2 cores
    python docs/make_uses.py texture    # one of them, and the page

SDXL's model and the ControlNet are untrained: their pictures show that a use runs, not what a trained model makes.
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
from stylemill.manifest import open_manifest
from stylemill.report.contact_sheet import write_contact_sheet
from stylemill.store.ledger import Ledger

DOCS = Path(__file__).parent
JOBS = sorted((DOCS.parent / "jobs").glob("*.yaml"))
SHOWN = (3, 4)  # contents down, styles across
HEAD = """# Uses

One job file each, as they stand in `jobs/`. Passes are rows of UNet batches an image, features shared in the shards
of the job; without sharing in brackets. Written by `python docs/make_uses.py` from runs of the embedded model, which is
small and has learnt from drawn pictures only. The models of `controlnet` and the two `sdxl-…` are **untrained**: those
pictures show that the use runs and what it acts on.
"""


def main(names: list[str]) -> None:
    (DOCS / "uses").mkdir(exist_ok=True)
    for job in JOBS:
        if not names or job.stem in names:
            _picture(job)
    (DOCS / "uses.md").write_text("\n".join([HEAD, *map(_section, JOBS)]), encoding="utf-8")


def _picture(job: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = stylemill.run(job, {"output": f"{folder}/run"}, inline=True)
        print(result.describe())
        paths = result.summary.paths
        manifest = open_manifest(Job.load(job).manifest)
        ledger = Ledger(paths, read_only=True)
        ledger.refresh()
        sheet = write_contact_sheet(paths, manifest, ledger.records(), limit=SHOWN)
        if sheet:
            Image.open(sheet).save(DOCS / "uses" / f"{job.stem}.jpg", quality=85)


def _section(job: Path) -> str:
    loaded, planned = Job.load(job), stylemill.plan(job)
    cost, images = planned.cost(), planned.rows
    default = Sampling()
    changed = {
        name: value for name, value in loaded.sampling.model_dump().items() if value != getattr(default, name)
    } | {"method": loaded.sampling.method, "steps": loaded.sampling.steps}
    about = re.match(r"(?:#.*\n)+", job.read_text(encoding="utf-8"))
    said = " ".join(line.removeprefix("#").strip() for line in about[0].splitlines()) if about else ""
    settings = ", ".join(f"`{name}: {value}`" for name, value in sorted(changed.items()))
    passes = f"{cost.with_sharing / images:.4g} ({cost.without_sharing / images:.4g})"
    return f"""
## {job.stem}

{said}

{settings}

UNet passes an image: {passes}.

![{job.stem}](uses/{job.stem}.jpg)
"""


if __name__ == "__main__":
    main(sys.argv[1:])
