"""The command line: each verb parses, calls the function of the same name, prints what it returns."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stylemill import __version__
from stylemill.errors import JobError, StylemillError

if TYPE_CHECKING:
    from stylemill.manifest import ImageRef

# Flags that stand for a key of the job file; every other key is reached by --set.
JOB_FLAGS = {
    "--output": ("output", "DIR", "run folder or s3:// URI, instead of the job's"),
    "--manifest": ("manifest", "FILE", "manifest, instead of the job's"),
    "--model": ("model.name", "MODEL", "folder or hub id, instead of the job's"),
    "--preset": ("preset", "NAME", "preset, instead of the job's"),
    "--workers": ("cluster.workers", "N", "number of workers, or auto"),
    "--address": ("cluster.address", "ADDRESS", "Ray cluster to work on, instead of this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 ok, 1 incomplete, 2 bad input, 3 finished with failed rows."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options = _parser().parse_args(argv)
    try:
        return int(options.call(options))
    except StylemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `stylemill … | head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def _plan(options: argparse.Namespace) -> int:
    from stylemill.planning.plan import plan

    print(plan(options.job, _overrides(options)).describe())
    return 0


def _run(options: argparse.Namespace) -> int:
    from stylemill.execution.driver import run

    result = run(options.job, _overrides(options), inline=options.inline)
    print(result.describe())
    if result.exit_code == 3 and options.failures_ok:
        return 0
    return result.exit_code


def _status(options: argparse.Namespace) -> int:
    from stylemill.report.status import status

    print(status(options.run).describe())
    return 0


def _retry_failed(options: argparse.Namespace) -> int:
    from stylemill.execution.retry import retry_failed

    result = retry_failed(options.run, _overrides(options), inline=options.inline)
    print(result.describe())
    return 0 if result.exit_code == 3 and options.failures_ok else result.exit_code


def _repair(options: argparse.Namespace) -> int:
    from stylemill.execution.repair import repair

    result = repair(options.run, _overrides(options), deep=options.deep, inline=options.inline)
    print(result.describe())
    return 0 if result.exit_code == 3 and options.failures_ok else result.exit_code


def _verify(options: argparse.Namespace) -> int:
    from stylemill.store.verify import verify

    report = verify(options.run, deep=options.deep)
    print(report.describe())
    return 0 if report.ok else 1


def _demo_model(options: argparse.Namespace) -> int:
    from stylemill.demo.untrained import write_demo_model
    from stylemill.demo.untrained_controlnet import write_demo_controlnet

    write = write_demo_controlnet if options.controlnet else write_demo_model
    print(write(options.folder, options.seed, "sdxl" if options.sdxl else "sd"))
    return 0


def _build(options: argparse.Namespace) -> int:
    from stylemill.manifest import build_manifest

    rows = build_manifest(
        options.out,
        options.content,
        options.style,
        pairs=options.pairs,
        pairing="sample" if options.sample else options.pairing,
        tile=options.tile,
        rows_per_group=options.rows_per_group,
        samples=options.sample,
        sample_seed=options.sample_seed,
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        content_weight=options.content_weight,
    )
    print(f"{options.out}: {rows:,} rows")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from stylemill.manifest import validate_manifest

    decode = None
    if options.decode:
        from stylemill.images.masks import load_labels
        from stylemill.images.read import load_image

        base = Path(options.manifest).absolute().parent

        def decode(column: str, ref: ImageRef) -> None:
            load = load_labels if column.endswith("_mask") else load_image
            load(ref.path, ref.data, base, (64, 64), "crop")

    report = validate_manifest(options.manifest, decode, limit=options.limit)
    print(report)
    return 0 if report.ok else 2


def _show(options: argparse.Namespace) -> int:
    from stylemill.manifest import show_manifest

    print(show_manifest(options.manifest, options.limit))
    return 0


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Flags as dotted job keys; values are YAML, so that `--set sampling.adain=true` is a truth value."""
    from stylemill.config.yaml import load_yaml

    given: dict[str, Any] = {}
    for assignment in options.set:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise JobError(f"--set {assignment}: write it as key=value, such as sampling.steps=20")
        given[key] = load_yaml(value, f"--set {assignment}")
    for flag, (key, _, _) in JOB_FLAGS.items():
        value = getattr(options, flag.removeprefix("--"), None)
        if value is not None:
            given[key] = int(value) if flag == "--workers" and value.isdecimal() else value
    return given


def _tile(text: str) -> tuple[int, int]:
    contents, _, styles = text.partition("x")
    if not (contents.isdecimal() and styles.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: write contents x styles, such as 16x16")
    return int(contents), int(styles)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stylemill",
        description="Turn a Parquet manifest of content × style pairs into a dataset of stylized images.",
        epilog="example: stylemill manifest build pairs.parquet --content photos/ --style paintings/",
    )
    parser.add_argument("--version", action="version", version=f"stylemill {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(where: Any, name: str, call: Any, text: str, example: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = where.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"example: stylemill {example}"
        )
        made.set_defaults(call=call)
        return made

    manifest = verbs.add_parser(
        "manifest",
        help="build, validate or show a manifest of pairs",
        epilog="example: stylemill manifest show pairs.parquet",
    ).add_subparsers(metavar="COMMAND", required=True)
    build = verb(
        manifest,
        "build",
        _build,
        "pair images of folders, globs or lists, and write the manifest",
        "manifest build pairs.parquet --content photos/ --style paintings/ --tile 16x16",
    )
    build.add_argument("out", help="Parquet file to write")
    build.add_argument("--content", help="folder, glob, image, or .txt/.csv list of contents; without it, styles only")
    build.add_argument("--style", help="folder, glob, image, or .txt/.csv list of styles")
    build.add_argument("--pairs", metavar="CSV", help="finished pairs; the header names manifest columns")
    build.add_argument("--pairing", choices=["product", "zip"], default="product", help="default: product")
    build.add_argument("--sample", type=int, metavar="N", help="N pairs of the product, drawn at random, none twice")
    build.add_argument("--sample-seed", type=int, default=0, metavar="SEED")
    build.add_argument("--tile", type=_tile, metavar="CxS", help="contents × styles of consecutive rows, such as 16x16")
    build.add_argument(
        "--rows-per-group", type=int, metavar="N", help="rows of a row group; default: the tile's, or 64"
    )
    build.add_argument("--prompt")
    build.add_argument("--negative-prompt")
    build.add_argument("--seed", type=int, help="one seed for all rows; without it each pair has noise of its own")
    build.add_argument("--content-weight", type=float, metavar="λ")

    validate = verb(
        manifest,
        "validate",
        _validate,
        "check every row of a manifest; exit code 2 when there is a problem",
        "manifest validate pairs.parquet --decode",
    )
    validate.add_argument("manifest")
    validate.add_argument("--decode", action="store_true", help="also open every image")
    validate.add_argument("--limit", type=int, default=100, metavar="N", help="problems listed; all are counted")

    show = verb(
        manifest, "show", _show, "print size, columns and first rows of a manifest", "manifest show pairs.parquet"
    )
    show.add_argument("manifest")
    show.add_argument("--limit", type=int, default=5, metavar="N", help="rows shown")

    plan = verb(
        verbs,
        "plan",
        _plan,
        "show what a job will do, without doing it",
        "plan jobs/quickstart.yaml --set sampling.steps=20",
    )
    run = verb(
        verbs,
        "run",
        _run,
        "run a job, or resume it: the same command does both",
        "run jobs/quickstart.yaml --output runs/first --workers 2",
    )
    for job in (plan, run):
        job.add_argument("job", help="YAML job file")
        for flag, (key, metavar, text) in JOB_FLAGS.items():
            job.add_argument(flag, metavar=metavar, help=f"{text} ({key})")
        job.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="any key of the job, such as sampling.steps=20",
        )
    retry = verb(
        verbs,
        "retry-failed",
        _retry_failed,
        "try the failed rows of a run again, and no others, or go on with that",
        "retry-failed runs/first --workers 2",
    )
    repair = verb(
        verbs,
        "repair",
        _repair,
        "redo from the manifest whatever verify finds wrong; damaged files go to quarantine",
        "repair runs/first --deep",
    )
    repair.add_argument("--deep", action="store_true", help="also decode every image")
    for folder in (retry, repair):
        folder.add_argument("run", help="run folder, or its s3:// URI")
        for flag in ("--workers", "--address"):
            key, metavar, text = JOB_FLAGS[flag]
            folder.add_argument(flag, metavar=metavar, help=f"{text} ({key})")
        folder.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the job")
    for works in (run, retry, repair):
        works.add_argument("--inline", action="store_true", help="work in this process, without Ray")
        works.add_argument("--failures-ok", action="store_true", help="exit 0 even if rows failed for good")

    status = verb(verbs, "status", _status, "show how far a run is", "status runs/quickstart")
    status.add_argument("run", help="run folder, or its s3:// URI")

    verify = verb(
        verbs,
        "verify",
        _verify,
        "check every digest, and that every row is there once",
        "verify runs/quickstart --deep",
    )
    verify.add_argument("run", help="run folder, or its s3:// URI")
    verify.add_argument("--deep", action="store_true", help="also decode every image")

    demo = verb(
        verbs,
        "demo-model",
        _demo_model,
        "write a small untrained model of Stable Diffusion's shape, to try things offline",
        "demo-model runs/models/demo",
    )
    demo.add_argument("folder")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--sdxl", action="store_true", help="of SDXL's shape instead")
    demo.add_argument("--controlnet", action="store_true", help="a ControlNet that fits the demo model instead")
    return parser
