"""Answers in which a model may call tools by itself, and the arguments of strict ones satisfy their schemas."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import msgspec
import pytest

from elasticmoe.common.grammar import GrammarError, GrammarMatcher
from elasticmoe.common.grammar_text import unpack_grammar
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.answer_parsers.forms import MARKS, NAMES, parser_of
from elasticmoe.services.router.answer_parsers.parts import CallArguments, CallStart, Text
from elasticmoe.services.router.answer_parsers.tools import ToolParser
from elasticmoe.services.router.grammar.structure import Structure, Thought, WrittenCalls, WrittenTool
from tests.unit.test_grammar_calls import WEATHER, WORDS, tokens_of, written
from tests.written_calls import WAYS, Call

FIND: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "days": {"type": "integer"},
        "deep": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
    },
    "required": ["text"],
    "additionalProperties": False,
}
FREE = WrittenTool("free", {"not": {}}, is_free=True)
TOOLS = [WrittenTool("find", FIND), FREE]
RIGHT: Call = ("find", {"text": 'Å <b> "x" \\ a line\n\n  two </param', "days": 3, "deep": {"a": [1, 2]}})
ANY: Call = ("free", {"more": "?", "text": "a\nb"})
WRITTEN = sorted(WAYS.keys() - {"mistral bare"})  # which is read, and never asked for


def parser_class(form: str) -> type[ToolParser]:
    kind = parser_of(form.split()[0], "")
    assert kind is not None
    return kind


def structure_of(way: str, *tools: WrittenTool, is_single: bool = False, is_in_text: bool = True) -> Structure:
    calls = WrittenCalls(way.split()[0], list(tools), is_single, is_in_text)
    return Structure("calls", msgspec.json.encode(calls).decode(), "tools")


class Writer:
    """A model whose vocabulary has the marks as tokens, or has to spell them, at the beginning of an answer."""

    def __init__(self, structure: Structure, thought: Thought | None = None, *, has_marks: bool) -> None:
        compiler, self.tokens = tokens_of(has_marks=has_marks)
        self.grammar = unpack_grammar(compiler.compile(structure, thought))
        self._marks = sorted(MARKS) if has_marks else []

    def ids(self, text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, self._marks))})", text) if self._marks else [text]
        ids: list[int] = []
        for part in parts:
            ids += [WORDS.index(part.encode())] if part in self._marks else part.encode()
        return ids

    def may_write(self, text: str) -> bool:
        """Whether it may, and may end there."""
        matcher = GrammarMatcher(self.tokens, self.grammar)
        try:
            matcher.consume(self.ids(text))
        except GrammarError:
            return False
        return matcher.state().is_accepting


def read(way: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    """What is said and what is called."""
    parser, said, calls = parser_class(way)({"find": FIND}), "", list[tuple[str, str]]()
    for part in [*parser.feed(text), *parser.finish()]:
        match part:
            case Text(piece):
                said += piece
            case CallStart(name):
                calls.append((name, ""))
            case CallArguments(piece):
                calls[-1] = (calls[-1][0], calls[-1][1] + piece)
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("way", WRITTEN)
def test_calls_may_stand_in_any_text(way: str, has_marks: bool) -> None:
    """Those of strict tools as their schemas say, the others as the model likes."""
    writer = Writer(structure_of(way, *TOOLS), has_marks=has_marks)
    calls = [RIGHT, ANY, ("find", {"text": ""})]
    text = "Let me see: <b> <tool\n" + WAYS[way](calls) + "\nSo. " + WAYS[way]([RIGHT]) + " Done."
    assert writer.may_write(text)
    assert read(way, text) == ("Let me see: <b> <tool\nSo. Done.", [*calls, RIGHT])
    for plain in ("", "No tool is needed. ", "Å\n\n"):
        assert writer.may_write(plain)
    for wrong in (
        WAYS[way]([("find", {"text": "Rome", "more": "?"})]),
        WAYS[way]([("find", {"days": 3})]),
        WAYS[way]([("find", {"text": "Rome", "days": "three"})]),
        WAYS[way]([RIGHT, ("find", {})]),
        WAYS[way]([("nobody", {})]),
        f"{parser_class(way).markers[0]} is how models call.",
    ):
        assert not writer.may_write("So. " + wrong), wrong


@pytest.mark.parametrize("way", WRITTEN)
def test_of_one_call_no_other_follows(way: str) -> None:
    writer = Writer(structure_of(way, *TOOLS, is_single=True), has_marks=True)
    once = "So. " + WAYS[way]([RIGHT])
    assert writer.may_write(once)
    assert writer.may_write(once + "\nDone.")
    assert not writer.may_write("So. " + WAYS[way]([RIGHT, ANY]))
    assert not writer.may_write(f"{once}\n{WAYS[way]([ANY])}")


@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("form", NAMES)
def test_whatever_is_written_behind_a_mark_are_calls(form: str, has_marks: bool) -> None:
    writer = Writer(structure_of(form, WrittenTool("weather", WEATHER), WrittenTool("now")), has_marks=has_marks)
    for marker in parser_class(form).markers:
        for seed in range(4):
            begun = f"So, {marker}"
            text = begun + written(writer.tokens, writer.grammar, random.Random(seed), writer.ids(begun))
            said, calls = read(form, text)
            assert said.startswith("So,")
            assert calls
            for name, arguments in calls:
                jsonschema.validate(arguments, WEATHER if name == "weather" else {"maxProperties": 0})


@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("way", WRITTEN)
def test_what_is_thought_may_hold_anything_but_its_end(way: str, has_marks: bool) -> None:
    writer = Writer(structure_of(way, *TOOLS), Thought("<think>", "</think>", True), has_marks=has_marks)
    thought = f"Perhaps {parser_class(way).markers[0]} nobody?"
    if not has_marks:  # no text has a token's name
        assert writer.may_write(f"{thought}</think>\n\nSo.")
    assert writer.may_write(f"Hm.</think>\n\n{WAYS[way]([RIGHT])}")
    assert writer.may_write("Hm.</think>So.")
    assert not writer.may_write(f"Hm.</think>\n\n{WAYS[way]([('nobody', {})])}")
    assert not writer.may_write("Hm.")


@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("way", ["glm", "qwen_coder"])
def test_a_text_of_any_length_can_be_ended(way: str, has_marks: bool) -> None:
    """A mark of several tokens ended it never: the text took the mark's beginning, and barred its last character."""
    for schema in ({"type": "string"}, {"type": "string", "minLength": 2}, {"type": "string", "enum": ["Rome", "Ro"]}):
        parameters = {"type": "object", "properties": {"text": schema}, "required": ["text"]}
        tool = WrittenTool("find", parameters)
        writer = Writer(structure_of(way, tool, is_in_text=False), has_marks=has_marks)
        for text in ("Rome", "Ro"):
            assert writer.may_write(WAYS[way]([("find", {"text": text})]))


@pytest.mark.parametrize("form", NAMES)
def test_only_strict_tools_need_a_schema_that_can_be_kept_to(form: str) -> None:
    Writer(structure_of(form, FREE, WrittenTool("now")), has_marks=True)
    strict = structure_of(form, FREE, WrittenTool("find", {"type": "object", "properties": {"a": {"not": {}}}}))
    compiler, _ = tokens_of(has_marks=True)
    with pytest.raises(InvalidRequest, match=r"^tools: .*'not'") as refused:
        compiler.compile(strict, None)
    assert (refused.value.code, refused.value.param) == ("unsupported_schema", "tools")
