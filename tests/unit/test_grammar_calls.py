"""Calls that a grammar makes the model write: whatever it writes, the form's parser reads what was asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import msgspec
import pytest

from elasticmoe.common.grammar import GrammarError, GrammarMatcher, GrammarTokens
from elasticmoe.common.grammar_text import unpack_grammar
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.answer_parsers.forms import MARKS, NAMES, parser_of
from elasticmoe.services.router.answer_parsers.parts import CallArguments, CallStart, Text
from elasticmoe.services.router.answer_parsers.tools import CallsInstead
from elasticmoe.services.router.grammar.compiler import GrammarCompiler
from elasticmoe.services.router.grammar.structure import Structure, Thought, WrittenCalls, WrittenTool

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 9},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "at": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"lat": {"type": "integer", "minimum": -9, "maximum": 9}},
            "required": ["lat"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    WrittenTool("weather", WEATHER),
    WrittenTool("now"),
    WrittenTool("a.b-c", {"type": "object", "properties": {}}),
]
NO_NUMBER = {"type": "integer", "minimum": 2, "maximum": 1}
SCHEMAS = {"weather": WEATHER, "now": {}, "a.b-c": {}}
PLAIN = [*(bytes([byte]) for byte in range(256)), b"</", b"</par", b'"}', b'": "']
WORDS = [*PLAIN, *(mark.encode() for mark in sorted(MARKS))]


def tokens_of(*, has_marks: bool) -> tuple[GrammarCompiler, GrammarTokens]:
    """A vocabulary in which the forms' marks are tokens, or have to be spelled."""
    words = WORDS if has_marks else PLAIN
    special = dict(enumerate(words[len(PLAIN) :], len(PLAIN)))
    return GrammarCompiler(special, len(words)), GrammarTokens(words, special)


def forced(form: str, *tools: WrittenTool, is_single: bool = False) -> Structure:
    text = msgspec.json.encode(WrittenCalls(form, list(tools), is_single)).decode()
    return Structure("calls", text, "tool_choice")


def written(tokens: GrammarTokens, grammar: str, rng: random.Random, after: Sequence[int] = ()) -> str:
    matcher, raw = GrammarMatcher(tokens, grammar), b""
    matcher.consume(list(after))
    for _ in range(3_000):
        state = matcher.state()
        assert state.error is None, state.error
        if state.is_over or (state.is_accepting and rng.random() < 0.7):
            return raw.decode()
        allowed = [n for n in range(tokens.size) if state.allowed[n >> 3] >> (n & 7) & 1]
        token = rng.choice([n for n in allowed if WORDS[n] not in b" \n\t\r"] or allowed)
        matcher.consume([token])
        raw += WORDS[token]
    raise AssertionError(f"no end: {raw[:300]!r}")


def read(form: str, text: str) -> list[tuple[str, Any]]:
    """The calls, and nothing else."""
    kind = parser_of(form, "")
    assert kind is not None
    parser = kind(SCHEMAS)
    calls: list[tuple[str, str]] = []
    for part in [*parser.feed(text), *parser.finish()]:
        if isinstance(part, CallStart):
            calls.append((part.name, ""))
        else:
            assert isinstance(part, CallArguments), (part, text)
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("form", NAMES)
def test_what_is_written_are_calls_as_asked(form: str, has_marks: bool) -> None:
    compiler, tokens = tokens_of(has_marks=has_marks)
    several = unpack_grammar(compiler.compile(forced(form, *TOOLS), None))
    named = unpack_grammar(compiler.compile(forced(form, TOOLS[0], is_single=True), None))
    numbers, names = set(), set()
    for seed in range(8):
        calls = read(form, written(tokens, several, random.Random(seed)))
        numbers.add(len(calls))
        for name, arguments in calls:
            names.add(name)
            jsonschema.validate(arguments, SCHEMAS[name] or {"maxProperties": 0 if name == "now" else 99})
        ((name, arguments),) = read(form, written(tokens, named, random.Random(seed)))
        assert name == "weather"
        jsonschema.validate(arguments, WEATHER)
    assert len(numbers) > 1
    assert len(names) > 1


def test_calls_come_behind_the_thinking() -> None:
    compiler, tokens = tokens_of(has_marks=False)
    thought = Thought("<think>", "</think>", True)
    matcher = GrammarMatcher(tokens, unpack_grammar(compiler.compile(forced("hermes", TOOLS[1]), thought)))
    matcher.consume(list(b"Now? <tool_call> is how.</think>\n\n<tool_call>\n"))
    assert not matcher.state().is_accepting
    matcher.consume(list(b'{"name": "now", "arguments": {}}\n</tool_call>'))
    assert matcher.state().is_accepting
    with pytest.raises(GrammarError):
        matcher.consume(list(b"Done."))


@pytest.mark.parametrize(
    ("form", "schema", "named"),
    [
        ("hermes", {"not": {}}, "not"),
        ("glm", {"properties": {"a": {"type": "string", "format": "date"}}}, "format"),
        ("glm", {"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern"),
        ("qwen_coder", {"minProperties": 1}, "minProperties"),
        ("qwen_coder", {"properties": {"a": {"uniqueItems": True}}}, "uniqueItems"),
    ],
)
def test_what_a_form_cannot_keep_to_is_refused(form: str, schema: Any, named: str) -> None:
    compiler, _ = tokens_of(has_marks=True)
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(forced(form, WrittenTool("f", schema)), None)
    assert caught.value.code == "unsupported_schema"
    assert named in caught.value.message


@pytest.mark.parametrize("form", NAMES)
def test_arguments_are_an_object(form: str) -> None:
    """Also where the parameters do not say so; no other type is asked for."""
    compiler, tokens = tokens_of(has_marks=True)
    rng = random.Random(3)
    schema = {"properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "additionalProperties": False}
    for _ in range(5):
        grammar = unpack_grammar(compiler.compile(forced(form, WrittenTool("f", schema), is_single=True), None))
        ((_, arguments),) = read(form, written(tokens, grammar, rng))
        assert isinstance(arguments, dict)
    with pytest.raises(InvalidRequest, match="arguments are an object") as caught:
        compiler.compile(forced(form, WrittenTool("f", {"type": "string"})), None)
    assert caught.value.code == "unsupported_schema"


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"properties": [1]},
        {"properties": {"a": {"type": "string", "pattern": 5}}},
        {"properties": {"a": {}}, "required": 5},
        {"properties": {"a": {"type": "string", "enum": 5}}},
        {"properties": {"a": {"type": "string", "minLength": "x"}}},
    ],
)
def test_what_is_no_schema_is_refused_as_such(form: str, wrong: dict[str, Any]) -> None:
    compiler, _ = tokens_of(has_marks=True)
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(forced(form, WrittenTool("f", {"type": "object", **wrong})), None)
    assert caught.value.code == "invalid_grammar", caught.value.message


@pytest.mark.parametrize(
    ("form", "end"),
    [
        ("glm", "</arg_value>"),
        ("qwen_coder", "</parameter>"),
        ("qwen_coder", "\n<parameter="),
        ("qwen_coder", "\n</function>"),
    ],
)
@pytest.mark.parametrize("has_marks", [False, True])
def test_a_text_of_an_enum_that_holds_the_end_mark_is_never_chosen(form: str, end: str, has_marks: bool) -> None:
    compiler, tokens = tokens_of(has_marks=has_marks)
    near = end[:-1].lstrip()

    def asked(*texts: str) -> Structure:
        schema = {"properties": {"a": {"type": "string", "enum": texts}}, "required": ["a"]}
        return forced(form, WrittenTool("f", schema), is_single=True)

    grammar = unpack_grammar(compiler.compile(asked(f"x{end}y", "x<", near, "z\n"), None))
    told = {read(form, written(tokens, grammar, random.Random(seed)))[0][1]["a"] for seed in range(24)}
    assert told == {"x<", near, "z\n"}
    with pytest.raises(InvalidRequest, match="can write none of the texts of 'enum'"):
        compiler.compile(asked(f"x{end}y", end), None)


@pytest.mark.parametrize("form", ["glm", "qwen_coder"])
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"properties": {"a": {}}, "required": ["b"]}, "'b'"),
        ({"properties": {"a>": {}}}, "'a>'"),
        ({"properties": {" a": {}}}, "' a'"),
        ({"properties": {"a": {"type": "string", "enum": ["x", "yy"], "maxLength": 1}}}, "'maxLength'"),
        ({"properties": {"a": {"type": ["string"], "format": "date"}}}, "'format'"),
        ({"properties": {"a": {"type": "string", "pattern": "^x\\$"}}}, "needs ^ and $"),
    ],
)
def test_what_calls_by_key_cannot_keep_to_is_refused_by_name(form: str, given: dict[str, Any], named: str) -> None:
    compiler, _ = tokens_of(has_marks=True)
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(forced(form, WrittenTool("f", {"type": "object", **given})), None)
    assert caught.value.code == "unsupported_schema"
    assert named in caught.value.message


def test_a_tool_called_function_can_be_called_in_deepseeks_form() -> None:
    compiler, tokens = tokens_of(has_marks=True)
    tool = WrittenTool("function", {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    grammar = unpack_grammar(compiler.compile(forced("deepseek", tool, is_single=True), None))
    for seed in range(12):
        ((name, arguments),) = read("deepseek", written(tokens, grammar, random.Random(seed)))
        assert name == "function"
        assert isinstance(arguments["a"], bool)


def told(form: str, pieces: list[str]) -> tuple[str, list[str]]:
    """The text and the names of the calls, of an answer that is one or the other."""
    kind = parser_of(form, "")
    assert kind is not None
    reader = CallsInstead(kind(SCHEMAS))
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.finish()
    text = "".join(part.text for part in parts if isinstance(part, Text))
    return text, [part.name for part in parts if isinstance(part, CallStart)]


@pytest.mark.parametrize("thought", [None, Thought("<think>", "</think>", True)])
@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("form", NAMES)
def test_an_answer_has_its_form_or_is_calls(form: str, has_marks: bool, thought: Thought | None) -> None:
    compiler, tokens = tokens_of(has_marks=has_marks)
    calls = forced(form, *TOOLS)
    spelled = {"enum": ["".join(MARKS), "<tool_call>", 7]}  # a text of the form may spell a call
    asked = Structure("json", json.dumps(spelled), "response_format", calls)
    grammar = unpack_grammar(compiler.compile(asked, thought))
    after = [*b"So.", *([WORDS.index(b"</think>")] if has_marks else b"</think>")] if thought else []
    kinds = set()
    for seed in range(12):
        text = written(tokens, grammar, random.Random(seed), after)
        said, names = told(form, [text])
        assert (said, names) == told(form, list(text)), "by the character"
        assert bool(said.strip()) != bool(names), text
        kinds.add(bool(names))
        if not names:
            jsonschema.validate(json.loads(said), spelled)
        else:
            for name, arguments in read(form, text):
                jsonschema.validate(arguments, SCHEMAS[name] or {"maxProperties": 0 if name == "now" else 99})
    assert kinds == {False, True}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("", ("", [])),
        (" \n", (" \n", [])),
        ("<tool", ("<tool", [])),
        ("<toolbox>", ("<toolbox>", [])),
        (' "<tool_call>"', (' "<tool_call>"', [])),
        ('7 <tool_call>{"name": "now", "arguments": {}}</tool_call>', None),
        ('\n<tool_call>{"name": "now", "arguments": {}}</tool_call>', ("", ["now"])),
        ("<tool_call>7", ("<tool_call>7", [])),
    ],
)
def test_only_what_an_answer_begins_with_is_a_call(answer: str, wanted: tuple[str, list[str]] | None) -> None:
    for pieces in ([answer], list(answer), [answer, ""]):
        assert told("hermes", pieces) == (wanted or (answer, []))


@pytest.mark.parametrize(
    ("form", "answer", "calls", "param"),
    [
        ("hermes", {"not": {}}, {}, "response_format"),
        ("hermes", {}, {"not": {}}, "tool_choice"),
        (
            "hermes",
            {},
            {"properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}, "required": ["a"]},
            "tool_choice",
        ),
        ("glm", {"type": "integer", "minimum": 2, "maximum": 1}, {}, "response_format"),
        ("glm", {}, {"properties": {"a": {"type": "word"}}}, "tool_choice"),
        ("glm", {}, {"properties": {"<": {}}}, "tool_choice"),
    ],
)
def test_of_two_the_one_that_is_refused_is_named(form: str, answer: Any, calls: Any, param: str) -> None:
    compiler, _ = tokens_of(has_marks=True)
    asked = Structure(
        "json", json.dumps(answer), "response_format", forced(form, WrittenTool("f", {"type": "object", **calls}))
    )
    with pytest.raises(InvalidRequest) as refused:
        compiler.compile(asked, None)
    assert refused.value.param == param
    assert refused.value.message.startswith(param)


@pytest.mark.parametrize("form", NAMES)
def test_a_mark_in_an_argument_does_not_end_it(form: str) -> None:
    """JSON may spell the marks of all forms in its texts; what is read is what the grammar let come."""
    for mark in [*sorted(MARKS), "</parameter>", 'a\\"</parameter>']:
        said = {"o": {"a": [f"x{mark}y", 'z"\\']}, "n": 1}
        schema = {
            "type": "object",
            "properties": {"o": {"type": "object", "enum": [said["o"]]}, "n": {"type": "integer", "enum": [1]}},
            "required": ["o", "n"],
            "additionalProperties": False,
        }
        compiler, tokens = tokens_of(has_marks=True)
        structure = forced(form, WrittenTool("f", schema), is_single=True)
        grammar = unpack_grammar(compiler.compile(structure, None))
        assert read(form, written(tokens, grammar, random.Random(1))) == [("f", said)]


def test_a_mark_in_an_argument_of_deepseeks_does_not_end_it() -> None:
    begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    arguments = {"a": f'x{end}"\\{end}', "b": 1}
    call = f"{begin}f{separator}{json.dumps(arguments, ensure_ascii=False)}{end}"
    assert read("deepseek", f"<｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜>") == [("f", arguments)] * 2


def test_two_that_are_too_large_together_are_both_named() -> None:
    compiler, _ = tokens_of(has_marks=True)
    form = {"enum": [f"{n:04d}{'x' * 20}" for n in range(3_000)]}
    tool = WrittenTool("f", {"type": "object", "properties": {"a": form}, "additionalProperties": False})
    alone, calls = Structure("json", json.dumps(form), "response_format"), forced("hermes", tool, is_single=True)
    for each in (alone, calls):
        compiler.compile(each, None)
    with pytest.raises(
        InvalidRequest, match=r"^response_format together with tool_choice makes a grammar of"
    ) as refused:
        compiler.compile(msgspec.structs.replace(alone, instead=calls), None)
    assert (refused.value.code, refused.value.param) == ("grammar_too_large", "response_format")
