"""From texts to calls, in each form, however the text is cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from elasticmoe.services.router.answer_parsers.forms import NAMES, parser_of
from elasticmoe.services.router.answer_parsers.parts import CallArguments, CallStart, Text
from elasticmoe.services.router.answer_parsers.tools import HELD_CHARS_MAX, ToolParser
from tests.written_calls import DEEP_CALL, DEEP_SEP, WAYS, coder, glm

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "at": {"type": ["object", "null"]},
            "any": {},
            "exact": {"type": "boolean"},
        },
    }
}
CITY = 'Å "x" \\ </b> {[\n'
ARGUMENTS = {"city": CITY, "days": 3, "at": {"lat": [1, 2.5, {"deep": "}]"}], "no": None}, "any": True}
# Each with two calls: `weather` with ARGUMENTS, `now` with none.
SAMPLES = {way: write([("weather", ARGUMENTS), ("now", {})]) for way, write in WAYS.items()}


def known(name: str) -> ToolParser:
    parser = parser_of(name, "")
    assert parser is not None
    return parser(SCHEMAS)


def parsed(sample: str, text: str, cuts: list[int] | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of a text that comes in pieces."""
    parser, content, calls = known(sample.split()[0]), "", list[tuple[str, str]]()
    ends = [*(cuts or []), len(text)]
    pieces = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    for part in [part for piece in pieces for part in parser.feed(piece)] + parser.finish():
        match part:
            case Text(piece):
                content += piece
            case CallStart(name):
                calls.append((name, ""))
            case CallArguments(piece):
                name, text = calls[-1]
                calls[-1] = (name, text + piece)
    return content, calls


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("Let me see: <b> [T\n\n", "\n\nDone.")])
def test_calls_however_the_text_is_cut(sample: str, before: str, after: str) -> None:
    text = before + SAMPLES[sample] + after
    content, calls = parsed(sample, text)
    assert [name for name, _ in calls] == ["weather", "now"]
    assert [json.loads(arguments) for _, arguments in calls] == [ARGUMENTS, {}]
    assert content == before.rstrip() + after
    rng = random.Random(sample)
    for _ in range(60):
        cuts = sorted(rng.sample(range(len(text)), rng.randrange(1, 30)))
        assert parsed(sample, text, cuts) == (content, calls), cuts
    assert parsed(sample, text, list(range(len(text)))) == (content, calls)


@pytest.mark.parametrize("sample", SAMPLES)
def test_an_answer_that_is_cut_off_keeps_what_is_known(sample: str) -> None:
    """Nothing is said that the whole answer takes back: a part of it gives a beginning of what all of it does."""
    text = "Hm. " + SAMPLES[sample]
    content, calls = parsed(sample, text)
    for length in range(len(text)):
        some_content, some = parsed(sample, text[:length])
        assert len(some) <= len(calls)
        for (name, arguments), (whole_name, whole) in zip(some, calls, strict=False):
            assert name == whole_name
            assert whole.startswith(arguments) or arguments == "{}", (length, arguments)
        if some:
            assert some_content == content


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_comes_as_it_is_and_at_once(name: str) -> None:
    parser = known(name)
    assert parser.feed("Hello,") == [Text("Hello,")]
    assert parser.feed(" world. \n") == [Text(" world.")]
    assert parser.feed("So") == [Text(" \nSo")]
    rest = parser.feed(" x < [x] {y} ") + parser.feed("z \n") + parser.finish()
    assert "".join(part.text for part in rest if isinstance(part, Text)) == " x < [x] {y} z \n"


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ("hermes", "<tool_call> is how models call."),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call> ?'),
        ("hermes", '<tool_call>{"name": 5}</tool_call>'),
        ("hermes", '<tool_call>{name: "f"}</tool_call>'),
        ("hermes", '<tool_call>{"nam'),
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_c"),
        ("granite", "<|tool_call|>[7]"),
        ("granite", "<|tool_call|>[]"[:-1]),
        ("mistral", "[TOOL_CALLS]" + "x" * 300),
        ("mistral", "[TOOL_CALLS] and so on"),
        ("deepseek", "<｜tool▁calls▁begin｜>no"),
        ("deepseek", f"<｜tool▁calls▁begin｜>{DEEP_CALL}{'n' * 300}{DEEP_SEP}"),
        ("glm", "<tool_call>" + "n" * 300 + "\n</tool_call>"),
        ("qwen_coder", "<tool_call>no function=x"),
        ("qwen_coder", "<tool_call><function="),
        ("glm", "Use <tool_call> blocks when needed.\nAnything else? " + "And more. " * 40),
        ("glm", "<tool_call>weather\nis what it is called"),
        ("qwen_coder", "the `<function=` prefix of a -> b `"),
        ("hermes", '<tool_call>{"name": "a tool of mine", "arguments": {}}</tool_call>'),
        ("mistral", "[TOOL_CALLS]is what `it` says{}"),
    ],
)
def test_what_is_no_call_is_text(sample: str, text: str) -> None:
    assert parsed(sample, text) == (text, [])
    assert parsed(sample, text, list(range(len(text)))) == (text, [])


def test_a_call_is_found_behind_what_is_none() -> None:
    text = '<tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert parsed("hermes", text) == ("<tool_call>", [("f", "{}")])


def test_members_in_any_order_and_arguments_that_are_a_text() -> None:
    text = '<tool_call>{"id": [1, "}"], "arguments": {"a": "\\"}"} , "name": "f", "more": -1.5e3}</tool_call>'
    assert parsed("hermes", text) == ("", [("f", '{"a": "\\"}"}')])
    assert parsed("hermes", '<tool_call>{"name": "f", "parameters": "{\\"a\\": 1}"}') == ("", [("f", '{"a": 1}')])
    assert parsed("hermes", '<tool_call>{"name": "f"}') == ("", [("f", "{}")])
    assert parsed("granite", "<|tool_call|>[]") == ("", [])


def test_what_is_held_before_a_name_is_bounded() -> None:
    text = '<tool_call>{"arguments": "' + "x" * HELD_CHARS_MAX + '", "name": "f"}</tool_call>'
    assert parsed("hermes", text) == (text, [])
    long = '<tool_call>{"name": "f", "arguments": "' + "x" * HELD_CHARS_MAX * 2 + '"}</tool_call>'
    assert parsed("hermes", long) == ("", [("f", "x" * HELD_CHARS_MAX * 2)])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("days", "3", 3),
        ("days", "3.0", 3.0),
        ("days", "three", "three"),
        ("city", "3", "3"),
        ("city", "true", "true"),
        ("exact", "True", True),
        ("exact", "false", False),
        ("at", "None", None),
        ("at", "[1]", "[1]"),
        ("at", "{'a': True, 'b': [None]}", {"a": True, "b": [None]}),
        ("at", "{'a': {1, 2}}", "{'a': {1, 2}}"),
        ("at", "{" * 70_000, "{" * 70_000),
        ("any", "{'a': True}", "{'a': True}"),
        ("any", "NaN", "NaN"),
        ("any", "[1, 2]", [1, 2]),
        ("any", "[" * 100_000, "[" * 100_000),
        ("other", "plain", "plain"),
    ],
)
def test_values_by_their_schemas(key: str, text: str, value: object) -> None:
    call = f"<tool_call>weather\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    ((_, arguments),) = parsed("glm", call)[1]
    assert json.loads(arguments) == {key: value}


OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
MANY = {
    "many": {
        "type": "object",
        "$defs": {"Colour": {"enum": ["red", "1"]}, "Node": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "integer"}]}},
        "properties": {
            "text": OPTIONAL,
            "colour": {"$ref": "#/$defs/Colour"},
            "constant": {"const": "7"},
            "either": {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
            "all": {"allOf": [{"type": ["string", "number"]}, {"type": "number"}]},
            "unsaid": {"anyOf": [{"type": "string"}, {"minimum": 3}]},
            "loop": {"$ref": "#/$defs/Node"},
            "nowhere": {"$ref": "https://example.org/schema"},
            "list": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "long": {"anyOf": [*({"type": "string", "maxLength": n} for n in range(40)), {"type": "null"}]},
            "wide": {"anyOf": [{"enum": ["x"] * 100}] * 32},
        },
    }
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "1.10", "1.10"),
        ("text", "12345", "12345"),
        ("text", "true", "true"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", "null", None),
        ("text", "Rome", "Rome"),
        ("colour", "1", "1"),
        ("colour", "red", "red"),
        ("constant", "7", "7"),
        ("either", "7", 7),
        ("either", "True", True),
        ("either", "7.5", "7.5"),
        ("all", "7.5", 7.5),
        ("unsaid", "7", 7),
        ("loop", "7", 7),
        ("nowhere", "7", 7),
        ("list", "(1, 2)", "(1, 2)"),
        ("list", "'it'", "'it'"),
        ("list", "['a']", ["a"]),
        ("long", "null", None),
        ("wide", "7", 7),
    ],
)
@pytest.mark.parametrize("form", ["glm", "qwen_coder"])
def test_a_value_has_a_type_that_the_schema_allows_however_it_says_so(
    form: str, key: str, text: str, value: Any
) -> None:
    """`str | None` of pydantic made a number of a version, and an object of a file's text."""
    kind = parser_of(form, "")
    assert kind is not None
    parser = kind(MANY)
    call = {"glm": glm, "qwen_coder": coder}[form]("many", {key: text})
    parts = [*parser.feed(call), *parser.finish()]
    arguments = "".join(part.text for part in parts if isinstance(part, CallArguments))
    assert json.loads(arguments) == {key: value}


@pytest.mark.parametrize(
    ("inner", "arguments"),
    [
        ("<parameter=city>\nRome\n<parameter=days>\n2\n</parameter>\n</function>", {"city": "Rome", "days": 2}),
        ("<parameter=days>\n2\n<parameter=city>\nRome\n</parameter>\n</function>", {"days": 2, "city": "Rome"}),
        ("<parameter=city>\nRome\n</function>", {"city": "Rome"}),
        ("<parameter=days>\n2\n</function>", {"days": 2}),
        ("<parameter=city>\na <parameter= b\n</parameter>\n</function>", {"city": "a <parameter= b"}),
        ("<parameter=city>\n</function>", {"city": ""}),
        ("<parameter=city>\n<parameter=days>\n2\n</parameter>\n</function>", {"city": "", "days": 2}),
        ("<parameter=city>\n\n</parameter>\n</function>", {"city": ""}),
    ],
)
def test_a_parameter_whose_end_is_missing_ends_where_the_next_thing_begins(inner: str, arguments: Any) -> None:
    text = f"<tool_call>\n<function=weather>\n{inner}\n</tool_call>\nSo."
    content, ((name, told),) = parsed("qwen_coder", text)
    assert (content, name, json.loads(told)) == ("\nSo.", "weather", arguments)
    assert parsed("qwen_coder", text, list(range(len(text)))) == (content, [(name, told)])


@pytest.mark.parametrize("extra", ["}", ""])
def test_a_brace_too_many_or_too_few_leaves_no_mark_in_the_text(extra: str) -> None:
    text = f'<tool_call>\n{{"name": "now", "arguments": {{}}{extra}{extra}\n</tool_call>\nSo.'
    assert parsed("hermes", text) == ("\nSo.", [("now", "{}")])
    assert parsed("hermes", text, list(range(len(text)))) == ("\nSo.", [("now", "{}")])


def test_a_text_goes_out_as_it_comes() -> None:
    parser = known("glm")
    parser.feed("<tool_call>weather\n<arg_key>city</arg_key><arg_value>Be")
    assert parser.feed('r"lin</arg_') == [CallArguments('r\\"lin')]
    assert parser.feed("value></tool_call>") == [CallArguments('"}')]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>\n{\"name\": ...' }}", "hermes"),
        ("<tool_call>{{ name }}<arg_key>", "glm"),
        ("<tool_call>\n<function={{ name }}>", "qwen_coder"),
        ("{{ '<|tool_call|>' ~ calls }}", "granite"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek"),
        ("{{ messages }}", None),
    ],
)
def test_the_form_of_a_template(template: str, name: str | None) -> None:
    found = parser_of("auto", template)
    assert (found.name if found else None) == name
