"""Calls of tools as a grammar, in each form that the project's parsers read (answer_parsers/). Where models of a form
differ, all their ways are allowed: the model takes its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from llguidance import regex_to_lark

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.answer_parsers.forms import parser_of
from elasticmoe.services.router.answer_parsers.keyed_calls import NAME_CHARS_MAX, QWEN_ENDS, named_types
from elasticmoe.services.router.grammar.schema import OPTIONS, read_schema
from elasticmoe.services.router.grammar.structure import Structure, WrittenCalls, WrittenTool

LarkMark = Callable[[str], str]
"""A mark of the model's as Lark has it: a special token, or its text."""

_NOTHING: Final = {"type": "object", "additionalProperties": False}
_ANYTHING: Final = {"type": "object"}
_SEPARATOR: Final = '", "'
_KEYED: Final = frozenset({"glm", "qwen_coder"})
_LINE: Final = '"\\n"?'
_QWEN_END: Final = '"\\n</parameter>\\n"'
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
    """One call or several, alone or in a text. Raises InvalidRequest."""
    asked = msgspec.json.decode(structure.text, type=WrittenCalls)
    return _Form(asked, structure.param, mark).lark()


class _Run(NamedTuple):
    """Calls behind one mark. `rest`: what follows it; `between`: what stands before a further run; None: there is
    none."""

    mark: str
    rest: str
    between: str | None = None


class _Form:
    """The rules of one request's calls, as they are written."""

    def __init__(self, asked: WrittenCalls, param: str, mark: LarkMark) -> None:
        self._asked = asked
        self._param = param
        self._mark = mark
        self._tools = [(tool, self._schema(tool, param)) for tool in asked.tools]
        self._rules: list[str] = []

    def lark(self) -> str:
        """The grammar."""
        runs = {
            "hermes": self._hermes,
            "granite": self._granite,
            "mistral": self._mistral,
            "deepseek": self._deepseek,
            "glm": self._glm,
            "qwen_coder": self._qwen_coder,
        }[self._asked.form]()
        start = self._in_text(runs) if self._asked.is_in_text else " | ".join(map(self._alone, runs))
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _alone(self, run: _Run) -> str:
        whole = self._rule(f"run_{len(self._rules)}", f"{self._mark(run.mark)} {run.rest}")
        return whole if run.between is None else self._several(whole, run.between)

    def _in_text(self, runs: Sequence[_Run]) -> str:
        """A text in which whatever the form's parser takes for a call's mark begins calls. A lexeme goes on as long as
        it can, so a mark that has to be spelled is one with the text before it."""
        parser = parser_of(self._asked.form, "")
        assert parser is not None
        text = self._rule("TEXT", "/(?s:.*)/" + "".join(map(_without, parser.markers)))
        rests: dict[str, list[str]] = {}
        for run in runs:
            rests.setdefault(run.mark, []).append(run.rest)
        calls: list[str] = []
        for mark, written in rests.items():
            spelled = self._mark(mark)
            is_token = spelled.startswith("<[")
            lead = f"{text} {spelled}" if is_token else self._rule(f"lead_{len(calls)}[lazy]", f"{text} {spelled}")
            calls.append(self._rule(f"calls_{len(calls)}", f"{lead} ({' | '.join(written)})"))
        return f"({' | '.join(calls)}){'?' if self._asked.is_single else '*'} {text}"

    @staticmethod
    def _schema(tool: WrittenTool, param: str) -> dict[str, Any]:
        if tool.is_free:
            return _ANYTHING
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
        """A rule of that name, or a text's where it is in capitals. `name` may end with an attribute in brackets."""
        self._rules.append(f"{name}: {body}")
        return name.partition("[")[0]

    def _each(self, name: str, body: Callable[[WrittenTool, dict[str, Any]], str]) -> str:
        """A call of one of the tools."""
        calls = [self._rule(f"{name}_{n}", body(tool, schema)) for n, (tool, schema) in enumerate(self._tools)]
        return self._rule(name, " | ".join(calls))

    def _several(self, call: str, between: str) -> str:
        return call if self._asked.is_single else f"{call} ({between} {call})*"

    # ---- calls in JSON

    @staticmethod
    def _object(tool: WrittenTool, schema: dict[str, Any]) -> str:
        """`{"name": …, "arguments": {…}}`."""
        head = literal(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        return f'{head} {json_rule(schema)} "}}"'

    def _hermes(self) -> list[_Run]:
        call = self._each("object", self._object)
        return [_Run("<tool_call>", f'"\\n"? {call} "\\n"? {self._mark("</tool_call>")}', _LINE)]

    def _array(self) -> str:
        call = self._each("object", self._object)
        return self._rule("array", f'" "? "[" {self._several(call, _SEPARATOR)} "]"')

    def _granite(self) -> list[_Run]:
        array = self._array()
        return [_Run("<|tool_call|>", array), _Run("<tool_call>", array)]

    def _mistral(self) -> list[_Run]:
        def body(tool: WrittenTool, schema: dict[str, Any]) -> str:
            call_id = f"({self._mark('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/)?"
            return f"{literal(tool.name)} {call_id} {self._mark('[ARGS]')} {json_rule(schema)}"

        return [_Run("[TOOL_CALLS]", self._array()), _Run("[TOOL_CALLS]", self._each("named", body), "")]

    def _deepseek(self) -> list[_Run]:
        separator = self._mark("<｜tool▁sep｜>")

        def body(tool: WrittenTool, schema: dict[str, Any]) -> str:
            name = tool.name
            fenced = (
                f'"function" {separator} {literal(f"{name}{chr(10)}```json{chr(10)}")} {json_rule(schema)} "\\n```"'
            )
            if name == "function":  # which the parser takes for the head of the other form
                return fenced
            return f"{literal(name)} {separator} {json_rule(schema)} | {fenced}"

        call = self._each("body", body)
        whole = self._rule("call", f"{self._mark('<｜tool▁call▁begin｜>')} {call} {self._mark('<｜tool▁call▁end｜>')}")
        return [_Run("<｜tool▁calls▁begin｜>", f"{self._several(whole, _LINE)} {self._mark('<｜tool▁calls▁end｜>')}")]

    # ---- calls key by key

    def _glm(self) -> list[_Run]:
        key, key_end, value, end = map(self._mark, ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))

        def argument(name: str, given: dict[str, Any]) -> str:
            written = self._value(given, ("</arg_value>",), end)
            return f'{key} {name} {key_end} "\\n"? {value} {written} "\\n"?'

        def body(tool: WrittenTool, schema: dict[str, Any]) -> str:
            return f'{literal(tool.name)} "\\n"? {self._arguments(tool, schema, argument)}'

        call = self._each("body", body)
        return [_Run("<tool_call>", f"{call} {self._mark('</tool_call>')}", _LINE)]

    def _qwen_coder(self) -> list[_Run]:
        def argument(name: str, given: dict[str, Any]) -> str:
            return f'"<parameter=" {name} ">\\n" {self._value(given, QWEN_ENDS, _QWEN_END)}'

        def body(tool: WrittenTool, schema: dict[str, Any]) -> str:
            head = literal(f"{tool.name}>" + chr(10))
            return f'{head} {self._arguments(tool, schema, argument)} "</function>"'

        call, end = self._each("body", body), self._mark("</tool_call>")
        runs = [_Run("<tool_call>", f'"\\n"? "<function=" {call} "\\n"? {end}', _LINE)]
        if self._asked.is_in_text:  # a model that may leave the outer mark out does
            runs.append(_Run("<function=", f'{call} ("\\n"? {end})?'))
        return runs

    def _arguments(
        self, tool: WrittenTool, schema: dict[str, Any], argument: Callable[[str, dict[str, Any]], str]
    ) -> str:
        """All that a schema's properties say, in their order; any texts of a tool that is free. `argument`: a name as
        Lark has it and its schema to what is written."""
        if tool.is_free:
            name = self._rule(f"NAME_{len(self._rules)}", f"/[^<>\\n]{{1,{NAME_CHARS_MAX}}}/")
            return self._rule(f"argument_{len(self._rules)}", argument(name, {"type": "string"})) + "*"
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
            rule = self._rule(f"argument_{len(self._rules)}", argument(literal(name), one))
            written.append(rule if name in required else f"{rule}?")
        return " ".join(written)

    def _value(self, schema: dict[str, Any], ends: Sequence[str], end: str) -> str:
        """A text as it is, without a mark that would end it, and of other types JSON; then `end`, as Lark has it."""
        if named_types(schema) != {"string"}:
            return f"{json_rule(schema)} {end}"
        named = next((word for word in ("const", "enum") if word in schema), None)
        kept = {named} if named else {"minLength", "maxLength", "pattern"}
        unread = sorted(set(schema) - _TEXT_WORDS - {"$defs", "definitions"} - kept)
        unread.sort(key=lambda word: word != "format")  # whose readable times are further keywords
        if unread:
            beside = f" beside {named!r}" if named else ""
            raise self._refusal(f"cannot keep to the keyword {unread[0]!r} of a text{beside}")
        written = self._one_of(schema, named, ends) if named else self._text(schema, ends)
        if end.startswith("<["):
            return f"{written} {end}"
        # A text goes on as long as it can, and so would take the beginning of a spelled end: both are one.
        return self._rule(f"ENDED_{len(self._rules)}", f"{written} {end}")

    def _one_of(self, schema: dict[str, Any], named: str, ends: Sequence[str]) -> str:
        texts = schema["enum"] if named == "enum" else [schema["const"]]
        found = [text for text in texts if isinstance(text, str) and not any(end in f"\n{text}" for end in ends)]
        if not found:
            raise self._refusal(f"can write none of the texts of {named!r}")
        return "(" + " | ".join(map(literal, found)) + ")"

    def _text(self, schema: dict[str, Any], ends: Sequence[str]) -> str:
        pattern = schema.get("pattern", "^$")
        if re.fullmatch(r"\^(?:.*[^\\])?(?:\\\\)*\$", pattern, re.DOTALL) is None:
            raise self._refusal(f"cannot keep to the pattern {pattern[:80]!r}, which needs ^ and $, of a text")
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        allowed = f"/(?s:.{{{least},{most}}})/"
        for end in ends:
            allowed += _without(end)
            if end.startswith("\n"):  # a line end stands before the text
                allowed += f" & ~/{_spelled(end[1:])}(?s:.*)/"
        if "pattern" in schema:
            allowed += f" & /{regex_to_lark(pattern[1:-1], 'dw')}/"
        return self._rule(f"TEXT_{len(self._rules)}", allowed)

    def _refusal(self, text: str) -> InvalidRequest:
        text = f"{self._param}: calls of this model {text}"
        return InvalidRequest(text, code="unsupported_schema", param=self._param)


def _spelled(mark: str) -> str:
    """A mark as a pattern of Lark's."""
    return str(regex_to_lark(re.escape(mark).replace("/", "[/]").replace("\\\n", "\\n"), ""))


def _without(mark: str) -> str:
    """Of what stands before it: texts that do not hold the mark."""
    return f" & ~/(?s:.*){_spelled(mark)}(?s:.*)/"
