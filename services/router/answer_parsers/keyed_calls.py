"""Calls whose arguments are written key by key and without JSON: the tools' schemas say what a value is."""

from __future__ import annotations

import ast
import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final

from elasticmoe.services.router.answer_parsers.tools import NoCall, Reading, Schemas, ToolParser

NAME_CHARS_MAX: Final = 256
PYTHON_CHARS_MAX: Final = 65_536
TYPES_MAX: Final = 256  # schemas and values that are looked at for the type of a value
_WORDS: Final = {"true": True, "false": False, "null": None, "none": None}  # models write Python's, too


class KeyedCalls(ToolParser):
    """Makes the JSON of arguments from keys and values."""

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(schemas)
        self._name = ""
        self._types: dict[tuple[str, str], frozenset[str]] = {}  # by tool and key: what was found out
        self._properties: Mapping[str, Any] = {}
        self._num_keys = 0

    def _begin(self, name: str) -> None:
        """A call's name is out."""
        self._start(name)
        self._name = name
        properties = self._schemas.get(name, {}).get("properties")
        self._properties = properties if isinstance(properties, dict) else {}
        self._num_keys = 0

    def _argument(self, key: str, ends: Sequence[str]) -> Generator[None, None, str]:
        """A value, up to one of `ends`, which is returned. A text goes out as it comes."""
        self._key(key)
        schema = self._properties.get(key)
        if named_types(schema) == {"string"}:
            self._arguments('"')
            end = yield from self._until(ends, lambda text: self._arguments(_json(text)[1:-1]))
            self._arguments('"')
            return end
        pieces: list[str] = []
        end = yield from self._until_whole(ends, pieces.append)
        self._arguments(_json(value_of("".join(pieces), self._types_of(key, schema))))
        return end

    def _key(self, key: str) -> None:
        """A value follows."""
        self._arguments(f"{', ' if self._num_keys else '{'}{_json(key)}: ")
        self._num_keys += 1

    def _types_of(self, key: str, schema: Any) -> frozenset[str]:
        place = self._name, key
        if place not in self._types:
            self._types[place] = types_of(schema, self._schemas.get(self._name, {}))
        return self._types[place]

    def _end(self) -> None:
        """The call has all its arguments."""
        self._arguments("}" if self._num_keys else "{}")

    def _word(self, *ends: str) -> Generator[None, None, tuple[str, str]]:
        """A name or key up to one of `ends`, and which."""
        pieces: list[str] = []
        end = yield from self._until(ends, pieces.append, NAME_CHARS_MAX)
        return "".join(pieces).strip(), end


class GlmParser(KeyedCalls):
    """`<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value>…</tool_call>`, line ends between. The source of the
    form: the chat template of zai-org/GLM-4.5."""

    name = "glm"
    markers = ("<tool_call>",)
    specials = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def _calls(self) -> Reading:
        key, close = "<arg_key>", "</tool_call>"
        name, end = yield from self._word("\n", key, close)
        if end == "\n":  # a line of prose about the marker is no name
            yield from self._spaces()
            end = yield from self._which(key, close)
            if not end:
                raise NoCall
        self._begin(name)
        while end != close:
            if end != key:
                yield from self._spaces()
                _, end = yield from self._word(key, close)
                continue
            argument, _ = yield from self._word("</arg_key>")
            yield from self._until(("<arg_value>",), _ignore)
            yield from self._argument(argument, ("</arg_value>",))
            end = ""
        self._end()


QWEN_ENDS: Final = ("</parameter>", "\n<parameter=", "\n</function>")
"""Of a value: models leave its end mark out, and go on with the next one or the call's end. A value begins with none of
them either, less the line end, which stands before it."""


class QwenCoderParser(KeyedCalls):
    """`<tool_call><function=name><parameter=k>v</parameter>…</function></tool_call>`, each on lines of its own. The
    source of the form: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct, and its parser, qwen3coder_tool_parser.
    """

    name = "qwen_coder"
    markers = ("<tool_call>", "<function=")  # the model may leave the outer one out
    specials = ("<tool_call>", "</tool_call>")

    def _calls(self) -> Reading:
        if self._marker != "<function=":
            yield from self._spaces()
            if not (yield from self._has("<function=")):
                raise NoCall
        name, _ = yield from self._word(">")
        self._begin(name)
        key, close = "<parameter=", "</function>"
        end = ""
        while end != close:
            if end != key:
                _, end = yield from self._word(key, close)
                continue
            argument, _ = yield from self._word(">")
            if (yield from self._has("\n")):
                end = yield from self._which(key, close)
                if end:  # an empty value without its end mark
                    self._key(argument)
                    self._arguments('""')
                    continue
            ended = yield from self._argument(argument, ("\n</parameter>", *QWEN_ENDS))
            end = {f"\n{key}": key, f"\n{close}": close}.get(ended, "")
        self._end()
        yield from self._spaces()
        yield from self._has("</tool_call>")


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types of what satisfies a schema, which `root` has the definitions of; none where that is not said, or
    only after more than TYPES_MAX schemas and values."""
    try:
        return _Types(root).of(schema)
    except _TooMany:
        return frozenset()


class _TooMany(Exception):
    """Schemas and values."""


class _Types:
    """Of one schema, as far as TYPES_MAX goes."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._num_left = TYPES_MAX

    def of(self, schema: Any) -> frozenset[str]:
        """See `types_of`. Raises _TooMany."""
        self._spend(1)
        if not isinstance(schema, dict):
            return frozenset()
        if (named := named_types(schema)) or not schema:
            return named
        values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
        if isinstance(values, list):
            self._spend(len(values))
            return frozenset().union(*map(_type_of, values))
        if isinstance(schema.get("$ref"), str):
            return self.of(_referred(schema["$ref"], self._root))
        for word in ("anyOf", "oneOf"):
            if isinstance(schema.get(word), list):
                among = [self.of(one) for one in schema[word]]
                return frozenset().union(*among) if all(among) else frozenset()
        if isinstance(schema.get("allOf"), list):
            said = [types for one in schema["allOf"] if (types := self.of(one))]
            return frozenset.intersection(*said) if said else frozenset()
        return frozenset()

    def _spend(self, num: int) -> None:
        self._num_left -= num
        if self._num_left < 0:
            raise _TooMany


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema leads to; None for others."""
    found: Any = root
    head, *path = reference.split("/")
    for part in path if head == "#" else [""]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def named_types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema's own `type` names; none where it has none."""
    named = schema.get("type") if isinstance(schema, dict) else None
    names = named if isinstance(named, list) else [named]
    return frozenset(name for name in names if isinstance(name, str))


def value_of(text: str, types: frozenset[str]) -> Any:
    """What was written, as one of `types`: of any where there are none, and a text where it is nothing else."""
    word = text.strip()
    if word.lower() in _WORDS:
        value: Any = _WORDS[word.lower()]
    else:
        value = _read(word, is_python=bool(types & {"object", "array"}))
        if value is None:
            return text
    return value if not types or _type_of(value) & types else text


def _read(text: str, *, is_python: bool) -> Any:
    """A JSON value; None where it is none. `is_python`: or one that Python prints so, as models do whose template
    prints the arguments of former calls without a filter."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        json.dumps(value, allow_nan=False)  # what is too large for a float was read as infinite
        return value
    except (ValueError, RecursionError):
        pass
    if is_python and len(text) <= PYTHON_CHARS_MAX:
        try:
            value = ast.literal_eval(text)
            json.dumps(value, allow_nan=False)  # sets, bytes and infinities are no JSON
            return value if isinstance(value, dict | list) else None
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pass
    return None


def _type_of(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number", "integer"} if value.is_integer() else {"number"}
        case dict():
            return {"object"}
        case list():
            return {"array"}
        case _:
            return {"string"}


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can only escape
        return json.dumps(value)
    return text


def _no_constant(name: str) -> None:
    """NaN and the infinities are no JSON."""
    raise ValueError(name)


def _ignore(_: str) -> None:
    """What stands between."""
