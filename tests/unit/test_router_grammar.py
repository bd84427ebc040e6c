"""From what a request asks its answer to look like to a grammar: what is read, what is refused, and by which bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.common.grammar import GrammarError, GrammarMatcher, GrammarTokens
from elasticmoe.common.grammar_text import decode_vocabulary, unpack_grammar
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.limits import GRAMMAR_BYTES_MAX, VOCABULARY_PIECE_BYTES
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.schemas import CompletionRequest
from elasticmoe.services.router.dispatch.vocabulary import KnownVocabulary
from elasticmoe.services.router.grammar.asked import structure_of
from elasticmoe.services.router.grammar.compiler import GrammarCompiler
from elasticmoe.services.router.grammar.schema import DEPTH_MAX, UNSUPPORTED
from elasticmoe.services.router.grammar.structure import Structure
from elasticmoe.services.router.grammar.structures import Structures
from elasticmoe.services.router.text.texts import Texts
from elasticmoe.services.router.text.tokenizer import ServedModel
from tests.unit.in_process import InProcess

DECODER = msgspec.json.Decoder(CompletionRequest)
COMPILER = GrammarCompiler({1: b"<end>"}, 8)


def asked(**body: Any) -> Structure | None:
    return structure_of(parse(DECODER, msgspec.json.encode({"prompt": "x", **body})))


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type":"object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}}},
            "json",
            '{"enum":[1]}',
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json", '{"type":"object"}'),
        ({"structured_outputs": {"json": {}}}, "json", "{}"),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json", '{"type": "null"}'),
        ({"structured_outputs": {"json_object": True}}, "json", '{"type":"object"}'),
        ({"structured_outputs": {"regex": ""}}, "regex", ""),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"structured_outputs": {"grammar": "root ::= [a]"}, "response_format": {"type": "text"}}, "grammar", None),
    ],
)
def test_what_is_asked(body: Any, kind: str, text: str | None) -> None:
    structure = asked(**body)
    assert structure is not None
    assert structure.kind == kind
    assert text is None or structure.text == text


def test_nothing_is_asked() -> None:
    for body in ({}, {"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": None}):
        assert asked(**body) is None


def refused(structure: Structure) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(structure, None)
    assert caught.value.param == structure.param
    assert len(caught.value.message) < 600
    return caught.value


@pytest.mark.parametrize("keyword", sorted(UNSUPPORTED))
def test_keywords_that_would_not_be_heeded_are_refused_by_name(keyword: str) -> None:
    """Wherever a schema stands, and whatever draft it names; as names of properties they are fine."""
    value: Any = True if keyword == "uniqueItems" else {}
    for schema in (
        {keyword: value},
        {"$schema": "http://json-schema.org/draft-04/schema#", "items": {keyword: value}},
        {"anyOf": [{"type": "null"}, {"properties": {"a": {keyword: value}}}]},
        {"$defs": {"d": {keyword: value}}, "$ref": "#/$defs/d"},
    ):
        error = refused(Structure("json", json.dumps(schema), "p"))
        assert error.code == "unsupported_schema"
        assert repr(keyword) in error.message
    COMPILER.compile(Structure("json", json.dumps({"properties": {keyword: {"type": "null"}}}), "p"), None)


MAP: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "null"}}
NAMED: dict[str, Any] = {"properties": {"a": {"type": "null"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "is_refused"),
    [
        (MAP | {"minProperties": 1}, False),
        (MAP | {"minProperties": 2}, True),
        (MAP | NAMED | {"minProperties": 2}, False),
        (MAP | NAMED | {"minProperties": 3}, True),
        (MAP | NAMED | {"minProperties": 3, "required": ["a", "a"]}, True),
        ({"type": "object", "minProperties": 2}, True),
        ({"patternProperties": {"^a": {"type": "null"}}, "additionalProperties": False, "minProperties": 2}, True),
        (NAMED | {"additionalProperties": False, "minProperties": 1}, False),
    ],
)
def test_of_several_names_of_the_writers_own_one_could_come_twice(schema: dict[str, Any], is_refused: bool) -> None:
    for asked, where in ((schema, ""), ({"anyOf": [{"type": "null"}, schema]}, " at /anyOf/1")):
        if not is_refused:
            COMPILER.compile(Structure("json", json.dumps(asked), "p"), None)
            continue
        error = refused(Structure("json", json.dumps(asked), "p"))
        assert error.code == "unsupported_schema"
        assert error.message.startswith(f"p has minProperties {schema['minProperties']}{where}: ")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "0001-01-01", "9999-12-31"], ["2023-02-29", "1900-02-29", "0000-01-01"]),
        ("time", ["23:59:59Z", "00:00:00+01:30"], ["12:00:60Z"]),
        ("date-time", ["2024-02-29T23:59:59Z"], ["2023-02-29T00:00:00Z", "2024-02-29T23:59:60Z"]),
    ],
)
def test_dates_and_times_are_those_that_programs_read(kind: str, good: list[str], bad: list[str]) -> None:
    plain = [bytes([byte]) for byte in range(256)]
    for beside in ({}, {"pattern": "^[0-9]"}, {"allOf": [{"pattern": "^[0-9]"}]}):
        schema = {"type": "string", "format": kind, **beside}
        packed = COMPILER.compile(Structure("json", json.dumps(schema), "p"), None)
        for text in good + bad:
            matcher = GrammarMatcher(GrammarTokens(plain, []), unpack_grammar(packed))
            if text in good:
                matcher.consume(list(json.dumps(text).encode()))
                assert matcher.state().is_accepting, text
            else:
                with pytest.raises(GrammarError):
                    matcher.consume(list(json.dumps(text).encode()))


@pytest.mark.parametrize(
    ("kind", "text", "code", "named"),
    [
        ("json", "[]", "invalid_grammar", "object"),
        ("json", "{", "invalid_grammar", "JSON"),
        ("json", '{"type": "string", "format": "iri"}', "unsupported_schema", "iri"),
        ("json", '{"type": "integer", "minimum": 3, "maximum": 2}', "invalid_grammar", "minimum"),
        ("json", '{"$ref": "https://example.com/x"}', "invalid_grammar", "example.com"),
        ("json", '{"$ref": "#/nowhere"}', "invalid_grammar", "/nowhere"),
        ("json", '{"type": "string", "pattern": "(?=a)"}', "unsupported_schema", "look-around"),
        ("json", '{"items":' * (DEPTH_MAX + 1) + "{}" + "}" * (DEPTH_MAX + 1), "grammar_too_large", f"{DEPTH_MAX}"),
        ("json", '{"const": 9007199254740993}', "unsupported_schema", "9007199254740993"),
        ("json", '{"items": {"enum": [{"a": [-12345678901234567890]}]}}', "unsupported_schema", "-1234567890123456"),
        ("json", '{"type": "integer", "maximum": 18446744073709551616}', "unsupported_schema", "maximum"),
        ("regex", "(a", "invalid_grammar", "unclosed"),
        ("regex", "a\\", "invalid_grammar", "backslash"),
        ("regex", r"(a)\1", "unsupported_schema", "backreferences"),
        ("grammar", "start: other", "invalid_grammar", "other"),
        ("grammar", "start: " + "(" * 65 + '"a"' + ")" * 65, "grammar_too_large", "64"),
        ("grammar", "nothing", "invalid_grammar", "GBNF"),
        ("grammar", "start: <nobody>", "invalid_grammar", "nobody"),
    ],
)
def test_what_cannot_be_read_is_refused(kind: Any, text: str, code: str, named: str) -> None:
    error = refused(Structure(kind, text, "p"))
    assert error.code == code, error.message
    assert named in error.message


def test_sizes_are_bounded() -> None:
    with pytest.raises(
        InvalidRequest, match=f"{GRAMMAR_BYTES_MAX + 2} bytes; the limit is {GRAMMAR_BYTES_MAX}"
    ) as caught:
        asked(structured_outputs={"regex": "ä" * (GRAMMAR_BYTES_MAX // 2 + 1)})
    assert caught.value.code == "grammar_too_large"
    names = [f"n{n * 7919 % 100_003}" for n in range(9_000)]  # within the limit, but for the compressed form
    error = refused(Structure("choice", json.dumps(names), "p"))
    assert error.code == "grammar_too_large"
    with pytest.raises(InvalidRequest, match="at most 1024"):
        asked(structured_outputs={"choice": ["a"] * 1_025})


async def test_ranks_are_given_the_vocabulary_that_grammars_name(model: ServedModel) -> None:
    known = KnownVocabulary()
    structures = Structures(model, Texts(model.codec, InProcess(model.codec)), known)
    assert list(known.pieces("")) == []
    grammar = await structures.compile(Structure("regex", "a", "p"), None, "client")
    assert list(known.pieces("0" * 64)) == []
    pieces = list(known.pieces(grammar.vocabulary))
    data = b"".join(piece.data for piece in pieces)
    assert {piece.nbytes for piece in pieces} == {len(data)}
    assert [piece.offset for piece in pieces] == list(range(0, len(data), VOCABULARY_PIECE_BYTES))
    vocabulary = decode_vocabulary(data, grammar.vocabulary, model.vocab)
    assert vocabulary.tokens[65] == b"A"
    assert vocabulary.special == [256, 257, 258, 259]
    assert tuple(vocabulary.eos) == model.eos_ids


def test_nobody_loads_the_library_before_the_first_grammar() -> None:
    """Neither a rank nor a router's loop or fork server, whatever they import."""
    modules = "elasticmoe.services.worker.rank.assembly, elasticmoe.services.router.service"
    modules += ", elasticmoe.services.router.text.forkserver"
    code = f"import sys, {modules}; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
