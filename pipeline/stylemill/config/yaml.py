"""Load the YAML of a job file: duplicate keys are errors, `1e-2` is a number, and errors name line and column."""

from __future__ import annotations

import re
from typing import Any

import yaml

from stylemill.errors import JobError

# Of one document, with each alias counted as the values it stands for: nine lines of aliases can stand for billions.
_MAX_VALUES = 10_000


class _StrictLoader(yaml.SafeLoader):
    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = int(super().construct_yaml_int(node))
        if abs(value) >= 2**64:  # beyond every setting; and Python refuses to print much larger numbers
            raise yaml.MarkedYAMLError(problem="a number beyond 64 bits", problem_mark=node.start_mark)
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)

# PyYAML follows YAML 1.1, where a number with an exponent needs a point and a sign: `1e-2` would be text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str, where: str) -> Any:
    """The one document of `text` as plain values. Raises JobError with `where`, line and column."""
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context
        advice = "; indent with spaces" if mark and mark.buffer and mark.buffer[mark.pointer] == "\t" else ""
        raise JobError(f"{where}: {place}not valid YAML: {problem}{advice}") from None
    except RecursionError:
        raise JobError(f"{where}: not valid YAML: lists or keys are nested too deeply") from None
    except (TypeError, KeyError, AttributeError):  # PyYAML raises them for values such as '!!bool 7'
        raise JobError(f"{where}: not valid YAML: a value does not fit its '!!' tag; leave the tag out") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise JobError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values in `node`, with each alias counted as the values it stands for.

    `counts` has the counts of the nodes visited before, by id; 0 while a node is being counted. Raises MarkedYAMLError
    where there are more than `_MAX_VALUES`, where a value contains itself, and for text that is not valid Unicode.
    """
    if (known := counts.get(id(node))) is not None:
        if not known:
            raise yaml.MarkedYAMLError(
                problem="an alias refers to a value that contains it", problem_mark=node.start_mark
            )
        return known
    if isinstance(node, yaml.ScalarNode) and re.search("[\ud800-\udfff]", node.value):
        raise yaml.MarkedYAMLError(problem="half of a surrogate pair is no character", problem_mark=node.start_mark)
    counts[id(node)] = 0
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    flat = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
    values = 1 + sum(_count_values(child, counts) for child in flat)
    if values > _MAX_VALUES:
        problem = f"more than {_MAX_VALUES:,} values, with each alias counted as the values it stands for"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    counts[id(node)] = values
    return values
