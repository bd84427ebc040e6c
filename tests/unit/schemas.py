"""Random JSON schemas: most can be followed, some have what cannot."""

from __future__ import annotations

import random
from typing import Any

_PATTERNS = ("^[a-c]{1,4}$", "^\\d{3}-\\d{2}$", "^(x|yz)+$", "^[A-Z][a-z]*$")
_FORMATS = ("date", "ipv4", "uuid", "date-time")
_ODD = ({"not": {"type": "null"}}, {"uniqueItems": True, "type": "array"}, {"type": "string", "format": "iri"})


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """One of bounded texts."""
    kinds = [_string, _integer, _number, _enum, _plain]
    if depth < 3:
        kinds += [_object, _object, _array, _any, _reference] if depth == 0 else [_object, _array, _any]
    if rng.random() < 0.03:
        return dict(rng.choice(_ODD))
    return rng.choice(kinds)(rng, depth)


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    kind = rng.randrange(3)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    least = rng.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(9)}


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randrange(-500, 500)
    schema: dict[str, Any] = {"type": "integer", rng.choice(("minimum", "exclusiveMinimum")): least}
    schema[rng.choice(("maximum", "exclusiveMaximum"))] = least + rng.randrange(2, 400)
    return schema


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
