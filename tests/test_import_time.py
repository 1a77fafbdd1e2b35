"""`import stylemill` and every `--help` answer at once: what is heavy loads when work starts.

Asserted by what is loaded, which is the same on every machine, and once by CPU time beside that of importing torch,
which grows and shrinks with the machine as ours does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "pyarrow", "diffusers", "transformers", "accelerate", "datasets", "pandas", "numpy", "PIL"}
VERBS = [
    *([], ["manifest"], ["manifest", "build"], ["manifest", "validate"], ["manifest", "show"]),
    *(["plan"], ["run"], ["status"], ["verify"], ["demo-model"]),
]
HELP = """
import sys
from stylemill.cli import main
sys.argv = ["stylemill", *{verb!r}, "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sys.modules)
"""


def loaded_by(code: str) -> set[str]:
    """Top-level modules that stand in a fresh interpreter after `code`, which prints them in its last line."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def cpu_seconds(code: str) -> float:
    """CPU time of a fresh interpreter that runs `code`; the least of three, to leave out others' work."""

    def once() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


def test_importing_the_package_loads_only_the_standard_library():
    code = "import sys; before = set(sys.modules); import stylemill; print(*set(sys.modules) - before)"
    assert loaded_by(code) - sys.stdlib_module_names == {"stylemill"}


def test_public_functions_outlive_the_import_of_their_modules():
    """A submodule becomes an attribute of its package when imported: `stylemill.run` must stay the function."""
    code = """
import stylemill
names = [name for name in stylemill.__all__ if name != "Engine"]  # the only one that needs torch
first = [getattr(stylemill, name) for name in names]
assert all(map(callable, first)) and [getattr(stylemill, name) for name in names] == first, first
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb) or "stylemill")
def test_help_loads_nothing_heavy(verb: list[str]):
    assert not loaded_by(HELP.format(verb=verb)) & HEAVY


def test_help_takes_a_small_part_of_importing_torch():
    assert cpu_seconds(HELP.format(verb=[])) < cpu_seconds("import torch") / 2


def test_console_script_is_the_same_program():
    script = Path(sys.executable).with_name("stylemill")
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: stylemill" in done.stdout
