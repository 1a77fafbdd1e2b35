"""Output to terminals and pipes of any encoding: what their encoding lacks is written in ASCII."""

from __future__ import annotations

import codecs
import io
import sys

# Of the characters in messages. Any other one, and any byte of a file name that is not text, is written as an escape.
_IN_ASCII = {"×": "x", "λ": "lambda", "ε": "epsilon", "…": "...", "–": "-", "\ufffd": "?"}


def write_any_character() -> None:
    """Let stdout and stderr take every character. By default, one that their encoding lacks ends the command."""
    codecs.register_error("stylemill", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="stylemill")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end
