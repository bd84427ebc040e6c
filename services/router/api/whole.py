"""Whole numbers as JSON has them: 4 and 4.0 are the same number, 4.5 is refused, true is no number.

JSON Schema says so too ("integer" includes 4.0), and writers of some languages have floats only. Decoded strictly by
union types; what is left to do is to turn the whole floats into integers, which costs a request nothing to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

T = TypeVar("T")  # a struct


def whole(least: int | None = None, most: int | None = None) -> Any:
    """The type of a whole number in [`least`, `most`]. For annotations, under a name that the type checker takes for
    `int`: after `to_integers` it is one."""
    return (
        Annotated[int, Meta(ge=least, le=most)]
        | Annotated[float, Meta(ge=_float_in(least, math.inf), le=_float_in(most, -math.inf), multiple_of=1.0)]
    )


def _float_in(bound: int | None, inwards: float) -> float | None:
    """The last float that does not lie beyond `bound`, which a float may be too coarse for."""
    if bound is None:
        return None
    near = float(bound)
    is_beyond = near > bound if inwards < 0 else near < bound
    return math.nextafter(near, inwards) if is_beyond else near


def to_integers(request: T) -> T:
    """Make integers of the whole floats in the fields of a struct that was just decoded, and in their lists. Changes
    the struct in place and returns it."""
    for name in _names(type(request)):  # type: ignore[arg-type]
        value = getattr(request, name)
        if type(value) is float:
            msgspec.structs.force_setattr(request, name, int(value))  # type: ignore[arg-type]
        elif type(value) is list:
            _list_to_integers(value)
    return request


def _list_to_integers(values: list[Any]) -> None:
    kinds = set(map(type, values))
    if float in kinds:
        values[:] = [int(value) if type(value) is float else value for value in values]
    if list in kinds:
        for value in values:
            if type(value) is list:
                _list_to_integers(value)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    """The fields whose type has a whole number in it."""
    described = inspect.type_info(kind)
    if not isinstance(described, inspect.StructType):
        return ()
    return tuple(field.name for field in described.fields if any(_is_whole(part) for part in _parts(field.type)))


def _is_whole(part: inspect.Type) -> bool:
    return isinstance(part, inspect.FloatType) and part.multiple_of == 1.0


def _parts(described: inspect.Type) -> Iterator[inspect.Type]:
    """The type itself, and those that it is made of: what is described, members of unions and items of lists."""
    yield described
    if isinstance(described, inspect.Metadata):
        yield from _parts(described.type)
    elif isinstance(described, inspect.UnionType):
        for member in described.types:
            yield from _parts(member)
    elif isinstance(described, inspect.ListType):
        yield from _parts(described.item_type)
