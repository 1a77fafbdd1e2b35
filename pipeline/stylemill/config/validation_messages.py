"""Error messages for what pydantic found wrong in a job, in the words of a user who knows only the keys of the file."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, get_args, get_origin

from pydantic import BaseModel

FieldTable = dict[str, Any]


def describe_problem(problem: Any, values: dict[str, Any], job: type[BaseModel]) -> tuple[str, str]:
    """The dotted key of one of pydantic's problems with `values`, and the message about it.

    Each member of a union has a problem of its own with the same key. `job` is the model that was validated.
    """
    kind, location = problem["type"], [str(part) for part in problem["loc"] if not isinstance(part, int)]
    keys, allowed = _known_part(location, job)
    if kind in ("extra_forbidden", "invalid_key"):
        unknown = str(problem["loc"][-1])
        near = difflib.get_close_matches(unknown, allowed, n=1) or _keys_elsewhere(unknown, job)
        meant = f"did you mean '{near[0]}'? " if near else ""
        return ".".join([*keys, unknown]), (
            f"unknown key '{'.'.join([*keys, unknown])}'; {meant}allowed here: {', '.join(allowed)}"
        )
    key = ".".join(keys)
    if kind == "missing" and keys == location:  # else an item of a list
        required = [name for name, field in job.model_fields.items() if field.is_required() and name != "name"]
        return key, f"key '{key}' is missing; a job names at least {', '.join(required)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        return key, message
    given: Any = values
    field = None
    fields: FieldTable = dict(job.model_fields)
    for part in keys:
        given = given.get(part) if isinstance(given, dict) else given
        field = fields[part]
        fields = _fields(field.annotation)
    if field is not None and field.description:
        message = f"expected {field.description}"
    elif kind == "value_error" and isinstance(given, dict):  # of several keys together, which it names
        return key, f"{key}: {message}"
    elif kind == "model_type":
        message = f"expected keys below it: {', '.join(fields)}"
    elif kind == "string_type":
        message = "expected text, if need be in quotes"
    elif kind == "bool_type":
        message = "expected true or false"
    return key, f"{key}: {message.replace('Input should be', 'expected')}, not {reprlib.repr(given)}"


def _known_part(location: list[str], job: type[BaseModel]) -> tuple[list[str], list[str]]:
    """The keys of a job that a location begins with, before union members and indices, and what may stand below."""
    keys: list[str] = []
    fields: FieldTable = dict(job.model_fields)
    for part in location:
        if part not in fields:
            break
        keys.append(part)
        fields = _fields(fields[part].annotation)
    return keys, list(fields)


def _fields(annotation: Any) -> FieldTable:
    if get_origin(annotation) is tuple:  # of models, any number of them
        annotation = get_args(annotation)[0]
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}


def _keys_elsewhere(unknown: str, job: type[BaseModel]) -> list[str]:
    """Keys of this name that belong below another."""
    return [f"{name}.{unknown}" for name, field in job.model_fields.items() if unknown in _fields(field.annotation)]
