"""Strict reading of config.json as transformers reads it: a family's own defaults, types and spellings of each key.

Types are exact, as in transformers 5's validation: 4.0 is no integer, 1 is no floating-point number, true is neither,
and null is not the same as an absent key.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Final, NamedTuple, NoReturn, get_args, get_origin

from elasticmoe.common.protocol.errors import CheckpointError

REQUIRED: Final = object()  # the default of a key that must be there

_WORDS: Final[dict[Any, str]] = {
    int: "an integer",
    float: "a floating-point number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
    NoneType: "null",
}


class Key(NamedTuple):
    """One key that a family's config class has in transformers 5.

    `type` and `default` equal the class's (a test compares them). `neutral` says why the key changes nothing at
    inference; it is empty where the family reads the key.
    """

    type: Any
    default: Any = REQUIRED
    neutral: str = ""


class Config:
    """config.json's fields, read by a family's keys. Every error names the key, the limit and the value."""

    def __init__(self, fields: Mapping[str, Any], keys: Mapping[str, Key], spellings: Mapping[str, str]) -> None:
        """`spellings`: other name of a key -> the key. It wins where both are there, as in transformers, which sets
        it last (`attribute_map`). Raises CheckpointError for a value of another type than the key's."""
        self.fields = fields
        self._keys = keys
        self._values: dict[str, Any] = {}
        for spelling in (*keys, *spellings):
            if spelling in fields:
                name = spellings.get(spelling, spelling)
                check_type(spelling, fields[spelling], keys[name].type)
                self._values[name] = fields[spelling]

    def value(self, name: str) -> Any:
        """The key's value or default, of the key's type. Raises CheckpointError for a required key that is absent."""
        if name in self._values:
            return self._values[name]
        default = self._keys[name].default
        if default is REQUIRED:
            raise CheckpointError(f"config.json: {name} is missing")
        return default

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer in [low, high]. Raises CheckpointError."""
        value = self.value(name)
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(f"config.json: {name} must be an integer in [{low}, {high}], is {value!r:.80}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A number in [low, high]. Raises CheckpointError."""
        return number(name, self.value(name), low, high)

    def has(self, name: str) -> bool:
        """Whether the family knows the key, set or not."""
        return name in self._keys

    def flag(self, name: str) -> bool:
        """A boolean."""
        return bool(self.value(name))

    def must_be(self, name: str, *allowed: Any) -> None:
        """Raise CheckpointError for a value that changes the computation in a way that is not implemented."""
        value = self.value(name)
        if value not in allowed:
            refuse_value(name, value, allowed)


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float in [low, high]. Raises CheckpointError that calls it `name`."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise CheckpointError(f"config.json: {name} must be a number in [{low}, {high}], is {value!r:.80}")
    return float(value)


def refuse_value(name: str, value: Any, allowed: tuple[Any, ...]) -> NoReturn:
    """Raise the CheckpointError of a key whose value is not built."""
    supported = ", ".join("null" if each is None else str(each) for each in allowed)
    raise CheckpointError(f"config.json: {name}={value!r:.80} is not supported; supported: {supported}")


def check_type(name: str, value: Any, kind: Any, file: str = "config.json") -> None:
    """Raise CheckpointError unless `value`, which JSON made, is of `kind`: a type, `list[...]`, or a union of these."""
    arms = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not any(_fits(value, arm) for arm in arms):
        wanted = " or ".join(_word(arm) for arm in arms)
        raise CheckpointError(f"{file}: {name} must be {wanted}, is {value!r:.80}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(type(item) is get_args(kind)[0] for item in value)
    return type(value) is kind


def _word(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list of {_WORDS[get_args(kind)[0]].split(maxsplit=1)[1]}s"
    return _WORDS[kind]
