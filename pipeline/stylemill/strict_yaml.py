"""YAML as job files hold it: a key stands once, `1e-2` is a number, and a mistake is named by line and column."""

from __future__ import annotations

import re
from typing import Any

import yaml

from stylemill.errors import JobError


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' stands there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where a number with an exponent needs a point and a sign: `1e-2` would be text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str, where: str) -> Any:
    """The one document of `text` as plain values. Raises JobError naming `where`, line and column."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context
        advice = "; indent with spaces" if mark and mark.buffer and mark.buffer[mark.pointer] == "\t" else ""
        raise JobError(f"{where}: {place}not valid YAML: {problem}{advice}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that looks right and is none
        raise JobError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
