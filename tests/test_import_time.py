"""`import stylemill` and every `--help` are fast: heavy libraries are loaded only by commands that need them.

Tests check which modules are loaded, which is the same on every machine. One test compares CPU time with that of
importing torch, because both depend on the machine in the same way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli_commands import COMMANDS, words_of

HEAVY = {
    *("torch", "ray", "pyarrow", "diffusers", "transformers", "accelerate", "datasets", "pandas", "numpy", "PIL"),
    "aiohttp",
}
HELP = """
import sys
from stylemill.cli import main
sys.argv = ["stylemill", *{command!r}, "--help"]
assert main() == 0
print("loaded:", *sys.modules)
"""


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after `code`, which prints them on its last line."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def cpu_seconds(code: str) -> float:
    """CPU time of a new interpreter that runs `code`: the lowest of three, because other processes can only add."""

    def once() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


def test_importing_the_package_loads_only_the_standard_library():
    code = "import sys; before = set(sys.modules); import stylemill; print(*set(sys.modules) - before)"
    assert loaded_by(code) - sys.stdlib_module_names == {"stylemill"}


def test_importing_a_submodule_does_not_hide_a_public_function():
    """A submodule becomes an attribute of its package when it is imported. `stylemill.run` must stay the function."""
    code = """
import stylemill
names = [name for name in stylemill.__all__ if name != "Engine"]  # the only one that needs torch
first = [getattr(stylemill, name) for name in names]
assert all(map(callable, first)) and [getattr(stylemill, name) for name in names] == first, first
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=words_of)
def test_help_loads_nothing_heavy(command: tuple[str, ...]):
    assert not loaded_by(HELP.format(command=command)) & HEAVY


def test_help_takes_less_than_half_the_time_of_importing_torch():
    assert cpu_seconds(HELP.format(command=("run",))) < cpu_seconds("import torch") / 2


def test_console_script_is_the_same_program():
    script = Path(sys.executable).with_name("stylemill")
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: stylemill" in done.stdout
