"""Calls of tools as a grammar, in each form that the project's parsers read (answer_parsers/). Where models of a form
differ, all their ways are allowed: the model takes its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from llguidance import regex_to_lark

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.answer_parsers.keyed_calls import NAME_CHARS_MAX, QWEN_ENDS, named_types
from elasticmoe.services.router.grammar.schema import OPTIONS, read_schema
from elasticmoe.services.router.grammar.structure import Structure, WrittenCalls, WrittenTool

LarkMark = Callable[[str], str]
"""A mark of the model's as Lark has it: a special token, or its text."""

_NOTHING: Final = {"type": "object", "additionalProperties": False}
_SEPARATOR: Final = '", "'
_KEYED: Final = frozenset({"glm", "qwen_coder"})
_LINE: Final = '"\\n"?'
# Keywords of parameters that calls key by key keep to, or that say nothing.
_OF_KEYS: Final = frozenset(
    {
        "$comment",
        "$defs",
        "$id",
        "$schema",
        "additionalProperties",
        "definitions",
        "description",
        "properties",
        "required",
        "title",
        "type",
    }
)
_TEXT_WORDS: Final = frozenset({"type", "title", "description", "default", "examples"})  # that say nothing of a text


def literal(text: str) -> str:
    """A text as Lark has it."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: dict[str, Any]) -> str:
    """JSON of that schema."""
    return "%json " + json.dumps({**schema, "x-guidance": OPTIONS}, ensure_ascii=False)


def calls_in_json(structure: Structure) -> Structure | None:
    """The same calls in a form of JSON, where theirs is none; of two, those that come instead."""
    if structure.kind != "calls":
        return None if structure.instead is None else calls_in_json(structure.instead)
    asked = msgspec.json.decode(structure.text, type=WrittenCalls)
    if asked.form not in _KEYED:
        return None
    text = msgspec.json.encode(msgspec.structs.replace(asked, form="hermes")).decode()
    return msgspec.structs.replace(structure, text=text)


def lark_of_calls(structure: Structure, mark: LarkMark) -> str:
    """One call or several. Raises InvalidRequest."""
    asked = msgspec.json.decode(structure.text, type=WrittenCalls)
    return _Form(asked, structure.param, mark).lark()


class _Form:
    """The rules of one request's calls, as they are written."""

    def __init__(self, asked: WrittenCalls, param: str, mark: LarkMark) -> None:
        self._tools = [(tool, self._schema(tool, param)) for tool in asked.tools]
        self._is_single = asked.is_single
        self._form = asked.form
        self._param = param
        self._mark = mark
        self._rules: list[str] = []

    def lark(self) -> str:
        """The grammar."""
        start = {
            "hermes": self._hermes,
            "granite": self._granite,
            "mistral": self._mistral,
            "deepseek": self._deepseek,
            "glm": self._glm,
            "qwen_coder": self._qwen_coder,
        }[self._form]()
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    @staticmethod
    def _schema(tool: WrittenTool, param: str) -> dict[str, Any]:
        if tool.parameters is None:
            return _NOTHING
        text = msgspec.json.encode(tool.parameters).decode()
        where = f"{param}: parameters of {tool.name}"
        try:
            schema = read_schema(text, where)
        except InvalidRequest as error:  # the text says where in the field it is
            error.rename(error.message, param)
            raise
        types = schema.get("type", "object")
        if "object" not in (types if isinstance(types, list) else [types]):
            text = f"{where} have the type {json.dumps(types)[:80]}; arguments are an object"
            raise InvalidRequest(text, code="unsupported_schema", param=param)
        return {**schema, "type": "object"}

    def _rule(self, name: str, body: str) -> str:
        """A rule of that name, or a text's where it is in capitals."""
        self._rules.append(f"{name}: {body}")
        return name

    def _each(self, name: str, body: Callable[[str, dict[str, Any]], str]) -> str:
        """A call of one of the tools."""
        calls = [self._rule(f"{name}_{n}", body(tool.name, schema)) for n, (tool, schema) in enumerate(self._tools)]
        return self._rule(name, " | ".join(calls))

    def _several(self, call: str, between: str) -> str:
        return call if self._is_single else f"{call} ({between} {call})*"

    # ---- calls in JSON

    def _object(self, name: str, schema: dict[str, Any]) -> str:
        """`{"name": …, "arguments": {…}}`."""
        head = literal(f'{{"name": {json.dumps(name)}, "arguments": ')
        return f'{head} {json_rule(schema)} "}}"'

    def _hermes(self) -> str:
        call = self._each("object", self._object)
        whole = self._rule("call", f'{self._mark("<tool_call>")} "\\n"? {call} "\\n"? {self._mark("</tool_call>")}')
        return self._several(whole, _LINE)

    def _array(self) -> str:
        call = self._each("object", self._object)
        return f'"[" {self._several(call, _SEPARATOR)} "]"'

    def _granite(self) -> str:
        return f'({self._mark("<|tool_call|>")} | {self._mark("<tool_call>")}) " "? {self._array()}'

    def _mistral(self) -> str:
        begin = self._mark("[TOOL_CALLS]")
        separate = self._rule(
            "separate",
            f"{begin} "
            + self._each("named", lambda name, schema: f"{literal(name)} {self._mark('[ARGS]')} {json_rule(schema)}"),
        )
        return f'{begin} " "? {self._array()} | {self._several(separate, "")}'

    def _deepseek(self) -> str:
        separator = self._mark("<｜tool▁sep｜>")

        def body(name: str, schema: dict[str, Any]) -> str:
            fenced = (
                f'"function" {separator} {literal(f"{name}{chr(10)}```json{chr(10)}")} {json_rule(schema)} "\\n```"'
            )
            if name == "function":  # which the parser takes for the head of the other form
                return fenced
            return f"{literal(name)} {separator} {json_rule(schema)} | {fenced}"

        call = self._each("body", body)
        whole = self._rule("call", f"{self._mark('<｜tool▁call▁begin｜>')} {call} {self._mark('<｜tool▁call▁end｜>')}")
        begin, end = self._mark("<｜tool▁calls▁begin｜>"), self._mark("<｜tool▁calls▁end｜>")
        return f"{begin} {self._several(whole, _LINE)} {end}"

    # ---- calls key by key

    def _glm(self) -> str:
        key, key_end, value, end = map(self._mark, ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))

        def body(name: str, schema: dict[str, Any]) -> str:
            def argument(property_name: str, given: dict[str, Any]) -> str:
                written = self._value(given, ("</arg_value>",))
                return f'{key} {literal(property_name)} {key_end} "\\n"? {value} {written} {end} "\\n"?'

            return f'{literal(name)} "\\n"? {self._arguments(schema, argument)}'

        call = self._each("body", body)
        whole = self._rule("call", f"{self._mark('<tool_call>')} {call} {self._mark('</tool_call>')}")
        return self._several(whole, _LINE)

    def _qwen_coder(self) -> str:
        def body(name: str, schema: dict[str, Any]) -> str:
            def argument(property_name: str, given: dict[str, Any]) -> str:
                written = self._value(given, QWEN_ENDS)
                return f'{literal(f"<parameter={property_name}>" + chr(10))} {written} "\\n</parameter>\\n"'

            return f'{literal(f"<function={name}>" + chr(10))} {self._arguments(schema, argument)} "</function>"'

        call = self._each("body", body)
        whole = self._rule("call", f'{self._mark("<tool_call>")} "\\n"? {call} "\\n"? {self._mark("</tool_call>")}')
        return self._several(whole, _LINE)

    def _arguments(self, schema: dict[str, Any], argument: Callable[[str, dict[str, Any]], str]) -> str:
        """All that a schema's properties say, in their order."""
        unread = sorted(set(schema) - _OF_KEYS)
        if unread:
            raise self._refusal(f"cannot keep to the keyword {unread[0]!r} of parameters")
        shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        required = schema.get("required") or ()
        properties = schema.get("properties") or {}
        for name in required:
            if name not in properties:
                raise self._refusal(f"have no place for the required {name[:80]!r}, which is none of the properties")
        written = []
        for name, given in properties.items():
            if name != name.strip() or set(name) & set("<>\n") or len(name) > NAME_CHARS_MAX:
                raise self._refusal(f"cannot write the property's name {name[:80]!r}")
            one = {**shared, **given} if isinstance(given, dict) else shared
            rule = self._rule(f"argument_{len(self._rules)}", argument(name, one))
            written.append(rule if name in required else f"{rule}?")
        return " ".join(written)

    def _value(self, schema: dict[str, Any], ends: Sequence[str]) -> str:
        """A text as it is, without a mark that would end it; of other types JSON."""
        if named_types(schema) != {"string"}:
            return json_rule(schema)
        named = next((word for word in ("const", "enum") if word in schema), None)
        kept = {named} if named else {"minLength", "maxLength", "pattern"}
        unread = sorted(set(schema) - _TEXT_WORDS - {"$defs", "definitions"} - kept)
        unread.sort(key=lambda word: word != "format")  # whose readable times are further keywords
        if unread:
            beside = f" beside {named!r}" if named else ""
            raise self._refusal(f"cannot keep to the keyword {unread[0]!r} of a text{beside}")
        if named:
            texts = schema["enum"] if named == "enum" else [schema["const"]]
            found = [text for text in texts if isinstance(text, str) and not any(end in f"\n{text}" for end in ends)]
            if not found:
                raise self._refusal(f"can write none of the texts of {named!r}")
            return "(" + " | ".join(map(literal, found)) + ")"
        pattern = schema.get("pattern", "^$")
        if re.fullmatch(r"\^(?:.*[^\\])?(?:\\\\)*\$", pattern, re.DOTALL) is None:
            raise self._refusal(f"cannot keep to the pattern {pattern[:80]!r}, which needs ^ and $, of a text")
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        allowed = f"/(?s:.{{{least},{most}}})/"
        for end in ends:
            mark = regex_to_lark(end.replace("/", "[/]").replace("\n", "\\n"), "")
            allowed += f" & ~/(?s:.*){mark}(?s:.*)/"
            if end.startswith("\n"):  # a line end stands before the text
                mark = regex_to_lark(end[1:].replace("/", "[/]"), "")
                allowed += f" & ~/{mark}(?s:.*)/"
        if "pattern" in schema:
            allowed += f" & /{regex_to_lark(pattern[1:-1], 'dw')}/"
        return self._rule(f"TEXT_{len(self._rules)}", allowed)

    def _refusal(self, text: str) -> InvalidRequest:
        text = f"{self._param}: calls of this model {text}"
        return InvalidRequest(text, code="unsupported_schema", param=self._param)
