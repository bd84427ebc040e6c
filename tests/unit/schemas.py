"""Random JSON schemas: most can be followed, some have what cannot. And of random models of pydantic: the dialect that
applications send."""

from __future__ import annotations

import datetime
import ipaddress
import random
import uuid
from enum import Enum
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

_PATTERNS = ("^[a-c]{1,4}$", "^\\d{3}-\\d{2}$", "^(x|yz)+$", "^[A-Z][a-z]*$")
FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_ODD = ({"not": {"type": "null"}}, {"uniqueItems": True, "type": "array"}, {"type": "string", "format": "iri"})


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """One of bounded texts."""
    kinds = [_string, _integer, _number, _enum, _plain]
    if depth < 3:
        kinds += [_object, _object, _array, _any, _map_of, _all]
        kinds += [_reference] if depth == 0 else []
    if rng.random() < 0.03:
        return dict(rng.choice(_ODD))
    return rng.choice(kinds)(rng, depth)


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    kind = rng.randrange(3)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(9)}


def _map_of(rng: random.Random, depth: int) -> dict[str, Any]:
    """Names of a pattern, so many of them."""
    values = {"patternProperties": {"^[a-c]{1,3}$": random_schema(rng, depth + 1)}}
    if rng.random() < 0.4:
        values["properties"] = {"a": random_schema(rng, depth + 1)}
    least = rng.randrange(3)
    return {
        "type": "object",
        **values,
        "additionalProperties": False,
        "minProperties": least,
        "maxProperties": least + 2,
    }


def _all(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"allOf": [_integer(rng, depth), {"type": "integer", "multipleOf": rng.randrange(1, 4)}]}
    names = ("left", "right")
    parts = [{"properties": {name: random_schema(rng, depth + 1)}, "required": [name]} for name in names]
    return {"type": "object", "allOf": parts, "additionalProperties": True, "maxProperties": 3}


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randrange(-500, 500)
    schema: dict[str, Any] = {"type": "integer", rng.choice(("minimum", "exclusiveMinimum")): least}
    schema[rng.choice(("maximum", "exclusiveMaximum"))] = least + rng.randrange(9, 400)
    return schema | ({"multipleOf": rng.choice((2, 5))} if rng.random() < 0.2 else {})


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    least = round(rng.uniform(-9, 9), 2)
    return {"type": "number", "minimum": least, "maximum": least + rng.randrange(1, 30)}


def _enum(rng: random.Random, _: int) -> dict[str, Any]:
    values = [1, "one", None, True, 2.5, 'zwei "ö"', [1, 2], {"a": None}]
    return {"const": rng.choice(values)} if rng.random() < 0.3 else {"enum": rng.sample(values, rng.randrange(1, 5))}


def _plain(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b c", "name", "ü", "x1", "$y"], rng.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(3)
    schema: dict[str, Any] = {"type": "array", "items": random_schema(rng, depth + 1)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [random_schema(rng, depth + 1)]
    return schema | {"minItems": least, "maxItems": least + rng.randrange(1, 3)}


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    among = [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
    return {rng.choice(("anyOf", "anyOf", "oneOf")): among}


def _reference(rng: random.Random, _: int) -> dict[str, Any]:
    """A list whose end may be anywhere."""
    node = {
        "type": "object",
        "properties": {"value": random_schema(rng, 2), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


# ---- of models of pydantic: titles, defaults, `$defs`, unions with null, maps, discriminated unions

_NAMES = ("name", "count", "when", "kind_of", "parts", "ref", "note", "Größe")


def random_model(rng: random.Random, depth: int = 0) -> type[pydantic.BaseModel]:
    """A model whose schema is `model_json_schema()`; what satisfies it is what `model_validate_json` takes."""
    fields: dict[str, Any] = {}
    for name in rng.sample(_NAMES, rng.randrange(1, 5)):
        kind = _field(rng, depth)
        default: Any = ...
        if rng.random() < 0.3:
            kind, default = kind | None, None
        described = rng.choice((None, 'said of it: "this"'))
        fields[name] = (kind, Field(default, description=described))
    strictness = pydantic.ConfigDict(extra=rng.choice(("forbid", "forbid", "ignore")))
    return pydantic.create_model(f"Model{rng.randrange(1_000_000)}", __config__=strictness, **fields)


def _field(rng: random.Random, depth: int) -> Any:
    kinds = [_bounded_text, _bounded_number, _choice, lambda *_: bool, _free_text, _of_a_format]
    if depth < 2:
        kinds += [_model_list, lambda *given: random_model(given[0], given[1] + 1), _either, _map]
    return rng.choice(kinds)(rng, depth)


def _bounded_text(rng: random.Random, _: int) -> Any:
    if rng.random() < 0.5:
        return Annotated[str, Field(pattern=rng.choice(_PATTERNS))]
    return Annotated[str, Field(min_length=rng.randrange(3), max_length=rng.randrange(3, 9))]


def _of_a_format(rng: random.Random, _: int) -> Any:
    """But for durations: the format has some that no program can hold."""
    return rng.choice((datetime.datetime, datetime.date, datetime.time, uuid.UUID, ipaddress.IPv4Address))


def _free_text(rng: random.Random, _: int) -> Any:
    return Annotated[str, Field(max_length=12)]


def _bounded_number(rng: random.Random, _: int) -> Any:
    least = rng.randrange(-50, 50)
    if rng.random() < 0.5:
        return Annotated[int, Field(ge=least, lt=least + rng.randrange(2, 90))]
    return Annotated[float, Field(gt=least, le=least + rng.randrange(1, 90))]


def _choice(rng: random.Random, _: int) -> Any:
    words = rng.sample(("red", "green", 'a "quote"', "ü", "1"), rng.randrange(1, 4))
    if rng.random() < 0.5:
        return Literal[tuple(words)]
    return Enum(f"Choice{rng.randrange(1_000_000)}", {f"V{at}": word for at, word in enumerate(words)})


def _model_list(rng: random.Random, depth: int) -> Any:
    least = rng.randrange(2)
    return Annotated[list[_field(rng, depth + 1)], Field(min_length=least, max_length=least + 2)]  # type: ignore[misc]


def _either(rng: random.Random, depth: int) -> Any:
    return _field(rng, depth + 1) | random_model(rng, depth + 1)


def _map(rng: random.Random, depth: int) -> Any:
    return Annotated[dict[str, _field(rng, depth + 1)], Field(max_length=2)]  # type: ignore[misc]
