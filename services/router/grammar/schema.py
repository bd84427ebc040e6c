"""A JSON schema, looked at before the library is: its size, and keywords that would not be heeded. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.grammar.structure import too_large

DEPTH_MAX: Final = 64
# Keywords of any draft that llguidance does not read. It refuses those of the draft that a schema names; others it
# would pass over.
UNSUPPORTED: Final = frozenset(
    {
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "disallow",
        "divisibleBy",
        "else",
        "extends",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
        "x-guidance",
    }
)
_ONE: Final = ("additionalItems", "additionalProperties", "items")
_LISTS: Final = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_TABLES: Final = ("$defs", "definitions", "patternProperties", "properties")
# Keywords whose numbers the library reads as floats of 64 bits: it would write other integers.
_OF_NUMBERS: Final = ("const", "enum", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")
_EXACT_MAX: Final = 2**53
# What formats of the library allow and readers refuse: the 29th of February of any year, the year 0, and a leap second
# at the end of each minute.
_YEAR: Final = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR: Final = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE: Final = f"(?:{_YEAR}-(?:(?:0[13-9]|1[0-2])-[0-9]{{2}}|02-(?:[01][0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
_READABLE: Final = {
    "date": f"^{_DATE}$",
    "time": "^[0-9]{2}:[0-9]{2}:[0-5]",
    "date-time": f"^{_DATE}[Tt ][0-9]{{2}}:[0-9]{{2}}:[0-5]",
}
# Between values, as the library's default has it, but for an end: models that find none go on for ever.
OPTIONS: Final = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


def read_schema(text: str, param: str) -> Any:
    """The schema, without what says nothing. Raises InvalidRequest for what is none, and for a keyword that would not
    be heeded, by its name."""
    try:
        schema = msgspec.json.decode(text)
    except RecursionError:
        said = f"{param} is nested too deeply"
        raise InvalidRequest(said, code="invalid_grammar", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest(f"{param} is not valid JSON", code="invalid_grammar", param=param) from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        text = f"{param} is not a JSON schema: it has to be an object"
        raise InvalidRequest(text, code="invalid_grammar", param=param)
    check_depth(schema, param)
    for where, part in _schemas(schema, ""):
        if part.get("uniqueItems") is False:
            del part["uniqueItems"]
        refused = sorted(UNSUPPORTED.intersection(part))
        if refused:
            text = f"{param} has the keyword {refused[0]!r}{f' at {where}' if where else ''}, which is not supported"
            raise InvalidRequest(text, code="unsupported_schema", param=param)
        for keyword in _OF_NUMBERS:
            _check_numbers(part.get(keyword), keyword, param)
        _check_names(part, where, param)
        _keep_to_readable_times(part)
    return schema


def _keep_to_readable_times(part: dict[str, Any]) -> None:
    kind, others = part.get("format"), part.get("allOf", [])
    readable = _READABLE.get(kind) if isinstance(kind, str) else None
    if readable is None or not isinstance(others, list):
        return
    if "pattern" in part:
        part["allOf"] = [*others, {"pattern": readable}]
    else:
        part["pattern"] = readable


def _check_names(part: dict[str, Any], where: str, param: str) -> None:
    """Raises InvalidRequest for an object that has to have several names of its writer's own: the library lets it write
    one of them twice, and readers have one then."""
    least, required = part.get("minProperties"), part.get("required")
    listed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else ()
    num_own = least - len(listed) if type(least) is int else 0
    if num_own > 1 and (part.get("additionalProperties") is not False or part.get("patternProperties")):
        place = f" at {where}" if where else ""
        text = f"{param} has minProperties {least}{place}: of names that are not listed one at most is supported"
        raise InvalidRequest(text, code="unsupported_schema", param=param)


def _check_numbers(value: Any, keyword: str, param: str) -> None:
    """Raises InvalidRequest for integers that a float may not have."""
    entries = [value]
    for entry in entries:
        if isinstance(entry, dict | list):
            entries += entry.values() if isinstance(entry, dict) else entry
        elif isinstance(entry, int | float) and abs(entry) > _EXACT_MAX and entry % 1 == 0:
            text = f"{param} has {entry} in {keyword!r}; integers beyond {_EXACT_MAX} are not supported"
            raise InvalidRequest(text, code="unsupported_schema", param=param)


def check_depth(value: Any, param: str) -> None:
    """Raises InvalidRequest for more than DEPTH_MAX levels. Does not recurse."""
    level, depth = [value], 0
    while level:
        if depth > DEPTH_MAX:
            raise too_large(f"{param} has {depth} levels or more; the limit is {DEPTH_MAX}", param)
        inner: list[Any] = []
        for entry in level:
            inner += entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
        level, depth = inner, depth + 1


def _schemas(schema: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and all those in it, with their paths."""
    yield where, schema
    inner = [(f"{where}/{key}", schema.get(key)) for key in _ONE]
    for key in _LISTS:
        given = schema.get(key)
        inner += [(f"{where}/{key}/{n}", one) for n, one in enumerate(given)] if isinstance(given, list) else []
    for key in _TABLES:
        given = schema.get(key)
        inner += [(f"{where}/{key}/{name}", one) for name, one in given.items()] if isinstance(given, dict) else []
    for path, one in inner:
        if isinstance(one, dict):
            yield from _schemas(one, path)
