"""Answers that no well-meaning model writes: parts of every form in any order, cut anywhere, and very long."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.services.router.answer_parsers.forms import NAMES, parser_of
from elasticmoe.services.router.answer_parsers.parts import AnswerPart, CallArguments, CallStart, Reasoning, Text
from elasticmoe.services.router.answer_parsers.reasoning import FORMS, ReasoningParser
from elasticmoe.services.router.answer_parsers.tools import READ_AGAIN_CHARS_MAX, ToolParser
from elasticmoe.services.router.api.answer_reader import AnswerForm, AnswerReader
from elasticmoe.services.router.api.tool_use import ToolUse

SCHEMAS = {"f": {"properties": {"s": {"type": "string"}, "o": {"type": "object"}}}}
PARSERS = {name: found for name in NAMES if (found := parser_of(name, "")) is not None}
EXTRAS = ["<function=", "</function>", "<parameter=", "</parameter>", "s>", "f>", "o</arg_key>", "f\n", "```json\n"]
JSON = ['{"name": "f", "arguments": {}}', '{"name": "f', '"arguments": ', '{"', *'":,}[]\\', "\\u"]
PLAIN = [" ", "\n", "  \n ", "a", "b c", "<", "[", "é", "function", "null", "1e999", "\n```"]
SECONDS = 8.0  # for what takes one at most, and minutes where the work grows with the square


def pieces_of(name: str) -> st.SearchStrategy[list[str]]:
    specials = [*PARSERS[name].specials, *PARSERS[name].markers]
    return st.lists(st.sampled_from([*specials, *specials, *EXTRAS, *JSON, *PLAIN]), max_size=24)


def read(parser: ToolParser | ReasoningParser, pieces: list[str]) -> list[AnswerPart]:
    """The parts, neighbours of a kind as one."""
    whole: list[AnswerPart] = []
    for part in [part for piece in pieces for part in parser.feed(piece)] + list(parser.finish()):
        last = whole[-1] if whole else None
        if last is not None and type(part) is type(last) and isinstance(part, Text | Reasoning | CallArguments):
            whole[-1] = type(part)(last.text + part.text)  # type: ignore[union-attr]
        else:
            whole.append(part)
    return whole


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300)
@given(st.data())
def test_parts_depend_on_the_text_alone(name: str, data: st.DataObject) -> None:
    pieces = data.draw(pieces_of(name))
    text = "".join(pieces)
    whole = read(PARSERS[name](SCHEMAS), [text])
    assert read(PARSERS[name](SCHEMAS), pieces) == whole
    assert read(PARSERS[name](SCHEMAS), list(text)) == whole
    assert all(part.text.encode() for part in whole if isinstance(part, Text | CallArguments))
    if not any(isinstance(part, CallStart) for part in whole) and name not in ("granite", "mistral", "deepseek"):
        assert "".join(part.text for part in whole if isinstance(part, Text)) == text  # those have an empty list


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        # Space after the only call of an array that is never closed, and what follows it.
        (
            "hermes",
            '<tool_call>[{"name": "f", "arguments": {}} </tool_call>',
            [CallStart("f"), CallArguments("{}"), Text(" </tool_call>")],
        ),
        # An array without a call, which is none.
        ("hermes", "<tool_call>[]<tool_call>", [Text("<tool_call>[]<tool_call>")]),
        ("hermes", "a <tool_call>[ ]</tool_call>", [Text("a <tool_call>[ ]</tool_call>")]),
        # The answer ends in the middle of an escape.
        ("mistral", '[TOOL_CALLS]f{"a": "b\\', [CallStart("f"), CallArguments('{"a": "b')]),
    ],
)
def test_what_once_depended_on_the_cut(name: str, text: str, parts: list[AnswerPart]) -> None:
    assert read(PARSERS[name](SCHEMAS), [text]) == parts
    assert read(PARSERS[name](SCHEMAS), list(text)) == parts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_inside", [False, True])
@settings(max_examples=200)
@given(st.data())
def test_thinking_depends_on_the_text_alone(form: str, is_inside: bool, data: st.DataObject) -> None:
    marks = FORMS[form]
    words = [*marks, marks.close[:-1], " ", "\n", "a", "<", "</", "[/"]
    pieces = data.draw(st.lists(st.sampled_from(words), max_size=12))
    text = "".join(pieces)
    whole = read(ReasoningParser(marks, is_inside=is_inside), [text])
    assert read(ReasoningParser(marks, is_inside=is_inside), pieces) == whole
    assert read(ReasoningParser(marks, is_inside=is_inside), list(text)) == whole
    said = "".join(part.text for part in whole if isinstance(part, Text | Reasoning))
    kept = squeezed(text)
    assert squeezed(said) in (
        kept,
        kept.replace(marks.close, "", 1) if is_inside else kept,
        kept.removeprefix(marks.open).replace(marks.close, "", 1),
    )


@pytest.mark.parametrize("name", NAMES)
def test_spaces_before_what_is_no_call_stay(name: str) -> None:
    parser = PARSERS[name]
    text = f"Write the \n {parser.markers[0]} tag, once"
    assert read(parser(SCHEMAS), [text]) == [Text(text)]
    assert read(parser(SCHEMAS), list(text)) == [Text(text)]


def test_text_after_a_call_is_told_to_its_last_character() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    after = " Now a <tool_call> is: a <"
    assert read(PARSERS["hermes"](SCHEMAS), [call + after])[2:] == [Text(after)]
    assert read(PARSERS["hermes"](SCHEMAS), [call + " <tool"])[2:] == []  # cut off: a further one


def test_text_after_a_further_call_that_is_not_told() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reader = AnswerReader(AnswerForm(ToolUse(PARSERS["hermes"], SCHEMAS, is_single=True)))
    assert reader.take(f"{call}{call} Done.", is_last=True) == [CallStart("f"), CallArguments("{}"), Text(" Done.")]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (r'"{\"a\": \"\ud800\"}"', r'"{\"a\": \"\ud800\"}"'),  # half a surrogate pair is no text: it stays as written
        (r'"a \q"', r'"a \q"'),
        (r'"\ud83d\ude00"', "😀"),
    ],
)
def test_arguments_that_are_a_text_of_any_kind(written: str, told: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>'
    assert read(PARSERS["hermes"](SCHEMAS), [text]) == [CallStart("f"), CallArguments(told)]


def test_a_name_that_is_no_unicode_is_none() -> None:
    text = r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'
    assert read(PARSERS["hermes"](SCHEMAS), [text]) == [Text(text)]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("x", "1e999", "1e999"),
        ("x", "[-1e999]", "[-1e999]"),
        ("o", "{'a': 1e999}", "{'a': 1e999}"),
        ("x", r'["\ud800"]', ["\ud800"]),
        ("x", r'{"\udc00": 1}', {"\udc00": 1}),
    ],
)
def test_values_that_json_can_hardly_say(key: str, written: str, value: object) -> None:
    text = f"<tool_call>f\n<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>"
    _, arguments = read(PARSERS["glm"](SCHEMAS), [text])
    assert isinstance(arguments, CallArguments)
    assert arguments.text.encode()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(arguments.text, parse_constant=refuse) == {key: value}


HOSTILE = {
    "markers": "{marker}",
    "beginnings": '{marker}{{"x":[[[',
    "calls in texts": '{marker}{{"x": "',
    "brackets in arguments": '{{"a":"",',
    "spaces": " ",
    "half markers": "<｜tool▁calls▁begin｜ [TOOL_CALLS <tool_cal ",
    "ends": "</tool_call></parameter></function>[ARGS]{sep}",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("cut", [1_000_000, 4])
def test_the_work_grows_with_the_text(name: str, kind: str, cut: int) -> None:
    parser = PARSERS[name]
    unit = HOSTILE[kind].format(marker=parser.markers[0], sep="<｜tool▁sep｜>")
    length = 200_000
    begin = parser.markers[0] + '{"name": "f", "arguments": ' if kind.startswith("brackets") else "x"
    text = begin + unit * (length // len(unit))
    began = time.process_time()
    read_parser = parser(SCHEMAS)
    for at in range(0, len(text), cut):
        read_parser.feed(text[at : at + cut])
    read_parser.finish()
    assert time.process_time() - began < SECONDS


def test_what_is_read_again_is_bounded_and_calls_are_still_found() -> None:
    junk = '<tool_call>{"x": "' + "y" * 1000 + '"; '
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = junk * (READ_AGAIN_CHARS_MAX // 500)
    whole = read(PARSERS["hermes"](SCHEMAS), [text + call])
    assert whole == [Text(text.rstrip()), CallStart("f"), CallArguments("{}")]
    assert read(PARSERS["hermes"](SCHEMAS), list(text + call)) == whole
