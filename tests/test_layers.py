"""Imports run one way (docs/design.md, Layout), and modules are short.

Imports are read from the source, so one inside a function counts too. One under `if TYPE_CHECKING` does not count: it
never runs.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import stylemill

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline" / "stylemill"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350  # lines

# Which part may import which, lowest first. A part is a folder or module directly below the package. A new part gets
# its line here and in docs/design.md.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),  # lazy: a public name is imported when it is asked for
    "errors": set(),
    "s3": set(),
    "plural": set(),
    "config": {"errors"},
    "testing": {"errors"},
    # These stand beside each other.
    "manifest": {"errors", "plural", "config"},
    "models": {"errors", "config"},
    "images": {"errors", "config", "s3", "testing"},
    "store": {"errors", "plural", "config", "s3", "testing"},
    "engine": {"errors", "config", "models", "images"},  # images: only the type of an input image
    "demo": {"errors", "config", "models"},
    # These join them.
    # engine, bench: only their torch-free modules, as `test_the_driver_runs_without_torch_and_ray` shows.
    "planning": {"errors", "plural", "config", "manifest", "models", "store", "engine", "bench"},
    "report": {"errors", "plural", "config", "manifest", "images", "store"},
    "execution": {
        *("errors", "plural", "config", "testing", "manifest", "models", "images", "store", "engine"),
        *("planning", "report"),
    },
    "bench": {"errors", "plural", "config", "models", "images", "engine", "demo"},
    "cluster": {"errors", "plural", "config", "store", "execution"},
    "cli": {
        *("errors", "plural", "config", "manifest", "images", "store", "engine", "demo"),
        *("planning", "report", "execution", "bench"),
    },
    "__main__": {"cli"},
}
# The driver chooses the executor, so it imports upwards, when a run starts and not before.
EXCEPTIONS = {"stylemill.execution.driver": {"cluster"}}

# Where the heavy libraries may be imported, and nowhere else.
TORCH_PARTS = {"engine", "demo", "bench"}
ONLY_IN: dict[str, set[str]] = {
    "torch": TORCH_PARTS,
    "diffusers": TORCH_PARTS,
    "transformers": TORCH_PARTS,
    "accelerate": TORCH_PARTS,
    "ray": {"cluster"},
    "grpc": {"cluster"},
    "aiohttp": {"images"},
    "pyarrow": {"manifest", "store", "execution", "report"},
}


def name_of(module: Path) -> str:
    """Dotted name of a source file: `stylemill.store.commit`; a package's own file is the package."""
    parts = module.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(module) for module in MODULES}


def part_of(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that the source of `module` can import when it runs."""
    unseen = [ast.parse(source)]
    while unseen:
        node: ast.AST = unseen.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            unseen.extend(node.orelse)
            continue
        unseen.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: None if is_package else -1]
            above = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, resolve(f"{origin}.{alias.name}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def resolve(name: str) -> str:
    """Where `from a.b import c` leads: to a module of ours, to the home of a lazy public name, else to a.b."""
    origin, _, last = name.rpartition(".")
    if origin == "stylemill" and last in stylemill._MODULE_OF:
        return stylemill._MODULE_OF[last]
    return name if name in NAMES else origin


IMPORTS = [
    (module, line, imported)
    for module in MODULES
    for line, imported in imports_of(module.read_text("utf-8"), name_of(module), module.stem == "__init__")
]


def where(module: Path, line: int) -> str:
    return f"{module.relative_to(ROOT)}:{line}"


def allowed(name: str) -> set[str]:
    return MAY_IMPORT[part_of(name)] | {part_of(name)} | EXCEPTIONS.get(name, set())


def test_the_reader_of_imports_sees_what_it_must():
    source = """
from __future__ import annotations
import torch.nn as nn
from stylemill import __version__, errors, run
from ..config.job import Job
from .. import config
from . import RunPaths
if TYPE_CHECKING:
    import ray
else:
    import pyarrow
def late():
    from PIL import Image
    importlib.import_module("diffusers")
"""
    seen = [imported for _, imported in sorted(imports_of(source, "stylemill.store.paths"))]
    assert seen == [
        *("__future__", "torch.nn"),
        *("stylemill", "stylemill.errors", "stylemill.execution.driver"),
        *("stylemill.config.job", "stylemill.config", "stylemill.store"),
        *("pyarrow", "PIL", "diffusers"),
    ]


def test_every_part_has_a_line_in_the_table():
    unlisted = {part_of(name) for name in NAMES} - MAY_IMPORT.keys()
    assert not unlisted, f"add these to MAY_IMPORT and to docs/design.md: {sorted(unlisted)}"


def test_imports_run_one_way():
    crossings = [
        f"{where(module, line)}: {part_of(name_of(module))} imports {imported}"
        for module, line, imported in IMPORTS
        if imported.split(".")[0] == "stylemill" and imported != "stylemill"
        if part_of(imported) not in allowed(name_of(module))
    ]
    assert not crossings, "\n".join(crossings)


def test_heavy_libraries_are_imported_in_few_parts():
    crossings = [
        f"{where(module, line)}: {imported} is imported only in {sorted(ONLY_IN[imported.split('.')[0]])}"
        for module, line, imported in IMPORTS
        if part_of(name_of(module)) not in ONLY_IN.get(imported.split(".")[0], MAY_IMPORT)
    ]
    # safetensors itself is free of torch; its torch face is not.
    crossings += [
        f"{where(module, line)}: safetensors.torch imports torch"
        for module, line, imported in IMPORTS
        if imported.startswith("safetensors.torch") and part_of(name_of(module)) not in TORCH_PARTS
    ]
    assert not crossings, "\n".join(crossings)


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {canonical(re.split(r"[\[<>=!~; ]", dependency)[0]) for dependency in project["dependencies"]}
    providers = packages_distributions()
    undeclared = [
        f"{where(module, line)}: {imported} is not in pyproject.toml's dependencies"
        for module, line, imported in IMPORTS
        if (top := imported.split(".")[0]) not in sys.stdlib_module_names | {"stylemill"}
        if not declared & {canonical(distribution) for distribution in providers.get(top, [])}
    ]
    assert not undeclared, "\n".join(undeclared)


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_module_is_short_and_says_what_it_is(module: Path):
    source = module.read_text("utf-8")
    assert ast.get_docstring(ast.parse(source)), f"{module.relative_to(ROOT)} has no docstring"
    lines = len(source.splitlines())
    assert lines <= LONGEST, f"{module.relative_to(ROOT)}: {lines} lines, {LONGEST} at most: split it"


def test_no_two_classes_have_one_name():
    """A reader who meets a name in a message or a diff must not have to ask which class it is."""
    modules: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                modules.setdefault(node.name, []).append(name_of(module))
    assert {name: places for name, places in modules.items() if len(places) > 1} == {}


def test_no_modules_import_each_other_in_a_circle():
    imports: dict[str, set[str]] = {}
    for module, _, imported in IMPORTS:
        if imported in NAMES and imported != name_of(module):
            imports.setdefault(name_of(module), set()).add(imported)
    # Packages hand on the names of their modules: an import of the package counts as one of its own module only.
    graph = {name: targets for name, targets in imports.items() if not is_package(name)}
    circles = list(find_circles(graph))
    assert not circles, "\n".join(" -> ".join(circle) for circle in circles)


def is_package(name: str) -> bool:
    return (PACKAGE.parent / name.replace(".", "/") / "__init__.py").exists()


def find_circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                yield from visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        yield from visit(name, [])


def test_the_driver_runs_without_torch_and_ray():
    """Nothing loads them indirectly, through another library either: seen from a fresh interpreter."""
    worker_side = {"checkpointing", "inputs", "local", "output", "rows", "shard", "stages", "worker_engine"}
    with_engine = {f"stylemill.execution.{module}" for module in worker_side}
    parts_with_torch_or_ray = TORCH_PARTS | {"cluster", "__main__"}
    names = sorted(name for name in NAMES - with_engine if part_of(name) not in parts_with_torch_or_ray)
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "diffusers"} & set(loaded)
