"""Error messages for the problems that pydantic finds in a job, in terms of the keys of the job file."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, get_args, get_origin

from pydantic import BaseModel

FieldTable = dict[str, Any]  # the fields of a model by key

# What messages about a value of the wrong type say, by pydantic's name of the error.
_EXPECTED = {
    "string_type": "expected text (in quotes, where YAML would read another type)",
    "bool_type": "expected true or false",
}


def describe_problem(problem: Any, values: dict[str, Any], job: type[BaseModel]) -> tuple[str, str]:
    """The dotted key of one of pydantic's problems with `values`, and the message about it.

    `job` is the model that was validated. Each member of a union has a problem of its own, with the same key.
    """
    kind, location = problem["type"], [str(part) for part in problem["loc"] if not isinstance(part, int)]
    keys, allowed = _keys_of(location, job)
    key = ".".join(keys)
    if kind in ("extra_forbidden", "invalid_key"):
        unknown = str(problem["loc"][-1])
        key = ".".join([*keys, unknown])
        return key, _describe_unknown_key(key, unknown, allowed, job)
    if kind == "missing" and keys == location:  # not an item that is missing in a list
        required = [name for name, field in job.model_fields.items() if field.is_required() and name != "name"]
        return key, f"key '{key}' is missing; a job names at least {', '.join(required)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        return key, message
    value, field = _look_up(keys, values, job)
    if field.description:
        message = f"expected {field.description}"
    elif kind in _EXPECTED:
        message = _EXPECTED[kind]
    elif kind == "model_type":
        message = f"expected keys below it: {', '.join(_fields_below(field))}"
    elif kind == "value_error" and isinstance(value, dict):  # about several keys, which the message names
        return key, f"{key}: {message}"
    return key, f"{key}: {message.replace('Input should be', 'expected')}, not {reprlib.repr(value)}"


def _describe_unknown_key(key: str, unknown: str, allowed: list[str], job: type[BaseModel]) -> str:
    near = difflib.get_close_matches(unknown, allowed, n=1) or _same_keys_below_others(unknown, job)
    suggestion = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown key '{key}'; {suggestion}allowed here: {', '.join(allowed)}"


def _keys_of(location: list[str], job: type[BaseModel]) -> tuple[list[str], list[str]]:
    """The keys of the job at the start of a location, before members of unions; and the keys allowed below them."""
    keys: list[str] = []
    fields: FieldTable = dict(job.model_fields)
    for part in location:
        if part not in fields:
            break
        keys.append(part)
        fields = _fields_below(fields[part])
    return keys, list(fields)


def _look_up(keys: list[str], values: dict[str, Any], job: type[BaseModel]) -> tuple[Any, Any]:
    """The value at `keys`, and its field."""
    value: Any = values
    field: Any = None
    fields: FieldTable = dict(job.model_fields)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else value
        field = fields[key]
        fields = _fields_below(field)
    return value, field


def _fields_below(field: Any) -> FieldTable:
    annotation = field.annotation
    if get_origin(annotation) is tuple:  # of any number of models
        annotation = get_args(annotation)[0]
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}


def _same_keys_below_others(unknown: str, job: type[BaseModel]) -> list[str]:
    """Keys of this name that are allowed below another key."""
    return [f"{name}.{unknown}" for name, field in job.model_fields.items() if unknown in _fields_below(field)]
