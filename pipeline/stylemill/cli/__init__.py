"""The `stylemill` command. Each command parses its options, calls one API function and prints the result."""

from stylemill.cli.app import main

__all__ = ["main"]
