"""A frozen dataclass from the JSON object that describes a folder, each field being what its annotation says."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar

AnyDescription = TypeVar("AnyDescription")


def described(kind: type[AnyDescription], fields: object) -> AnyDescription:
    """The dataclass `kind` with these fields.

    Raises:
        TypeError: they are no object, one is missing, unknown, or of another type.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"a JSON {type(fields).__name__} where an object is needed")
    types_by_name = typing.get_type_hints(kind)
    for name, value in fields.items():
        if name in types_by_name and not fits(value, types_by_name[name]):
            raise TypeError(f"{name} is {str(value)[:60]!r}")
    return kind(**fields)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value of JSON is of this type; a number may not be below 0."""
    if annotation is Any:
        return True
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, inner[0]) and fits(part, inner[1]) for key, part in value.items())
    return type(value) is annotation and (annotation is not int or value >= 0)

