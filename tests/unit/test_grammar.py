"""What may follow, by the library and by brute force; random schemas, whose texts are what the schema says; bounds."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import jsonschema
import pytest

from elasticmoe.common.grammar import (
    FREE_SPELLING,
    GrammarError,
    GrammarMatcher,
    GrammarTokens,
)
from elasticmoe.common.grammar_text import (
    Vocabulary,
    decode_vocabulary,
    digest_of,
    encode_vocabulary,
    pack_grammar,
    unpack_grammar,
)
from elasticmoe.common.protocol.errors import InvalidRequest, ProtocolError
from elasticmoe.common.protocol.limits import GRAMMAR_BYTES_MAX
from elasticmoe.services.router.grammar.compiler import GrammarCompiler
from elasticmoe.services.router.grammar.structure import Structure, Thought
from tests.unit.schemas import FORMATS, random_model, random_schema

WORDS = [b"a", b"b", b"ab", b"aab", b"ba", b"abc", b"c", b"\xc3", b"\xa4", b"\xc3\xa4", b"", b"a", b"<end>", b"\n"]
END = 12  # is special
TOKENS = GrammarTokens(WORDS, [END])


def ids(state: Any, size: int) -> set[int]:
    return {n for n in range(size) if state.allowed[n >> 3] >> (n & 7) & 1}


@pytest.mark.parametrize("pattern", ["(ab|ba)*c?", "a{2,5}b", "[abä]{1,4}", "(a|b)*abc", "", "ä+\n?"])
def test_masks_are_those_of_brute_force(pattern: str) -> None:
    """A token may come if some text of the pattern begins with what there is and the token."""
    compiled = re.compile(pattern)
    alphabet = "abcä\n"
    texts = ["".join(chars) for length in range(7) for chars in itertools.product(alphabet, repeat=length)]
    beginnings = {raw[:n] for raw in map(str.encode, filter(compiled.fullmatch, texts)) for n in range(len(raw) + 1)}
    grammar = FREE_SPELLING + f"start: /{pattern}/"
    rng = random.Random(5)
    for _ in range(12):
        matcher, written = GrammarMatcher(TOKENS, grammar), b""
        while len(written) < 3:
            state = matcher.state()
            want = {n for n, word in enumerate(WORDS) if word and n != END and written + word in beginnings}
            assert ids(state, len(WORDS)) == want, written
            assert state.is_accepting == _is_text(compiled, written)
            assert state.is_over == (not want)
            if not want:
                break
            token = rng.choice(sorted(want))
            matcher.consume([token])
            written += WORDS[token]


def _is_text(pattern: re.Pattern[str], raw: bytes) -> bool:
    try:
        return pattern.fullmatch(raw.decode()) is not None
    except UnicodeDecodeError:
        return False


def test_special_tokens_come_by_name_only() -> None:
    by_name = GrammarMatcher(TOKENS, FREE_SPELLING + f'start: "a" <[{END}]>')
    by_text = GrammarMatcher(TOKENS, FREE_SPELLING + "start: /a(?s:.*)/")
    for matcher in (by_name, by_text):
        matcher.consume([0])
    assert ids(by_name.state(), len(WORDS)) == {END}
    assert END not in ids(by_text.state(), len(WORDS))


def test_copies_advance_on_their_own() -> None:
    grammar = FREE_SPELLING + "start: /(ab|ba){3}/"
    made = GrammarMatcher(TOKENS, grammar)
    copies = [made.copy() for _ in range(3)]
    alone = [GrammarMatcher(TOKENS, grammar) for _ in range(3)]
    for tokens in ((0, 1, 2), (1, 0, 4)):
        states = [copy.advance(token) for copy, token in zip(copies, tokens, strict=True)]
        for matcher, token in zip(alone, tokens, strict=True):
            matcher.consume([token])
        assert states == [matcher.state() for matcher in alone]
    assert all(copy.advance(6).error is not None for copy in copies)  # no token that may come


UNREADABLE = ["start: /(/", "start: nobody", "start: start", "", "{}", 'start: %json {"not": {}}']


def first_error(text: str, tokens: Iterable[int] = ()) -> None:
    """Raises what a grammar ends in."""
    matcher = GrammarMatcher(TOKENS, text)
    for token in itertools.chain([None], tokens):
        matcher.consume([] if token is None else [token])
        if (error := matcher.state().error) is not None:
            raise error


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(GrammarError) as caught:
        first_error(text)
    assert "\n" not in caught.value.message
    assert 0 < len(caught.value.message) < 500


def test_a_grammar_that_grows_too_large_ends_in_an_error_of_its_own() -> None:
    rng = random.Random(1)
    with pytest.raises(GrammarError):
        first_error(FREE_SPELLING + "start: /(a|b)*a(a|b){18}c/", (rng.randrange(2) for _ in range(200_000)))


# ---- random schemas

BYTES = [bytes([byte]) for byte in range(256)]
LARGER = [*BYTES, b'{"', b'": ', b'", "', b"true", b"null", b"  ", b"the", b"]}", b'"}', b"12", b"\xc3\xa9", b"<end>"]
COMPILER = GrammarCompiler({len(LARGER) - 1: b"<end>"}, len(LARGER))


def written(tokens: GrammarTokens, grammar: str, rng: random.Random) -> str:
    """A text of the grammar, token by token at random."""
    matcher, raw = GrammarMatcher(tokens, grammar), b""
    for _ in range(4_000):
        state = matcher.state()
        assert state.error is None, state.error
        allowed = sorted(ids(state, tokens.size))
        if state.is_over or (state.is_accepting and rng.random() < 0.3):
            return raw.decode()
        plain = [token for token in allowed if LARGER[token] not in b" \n\r\t"] or allowed  # few spaces
        token = rng.choice(plain if rng.random() < 0.9 else allowed)
        matcher.consume([token])
        raw += LARGER[token]
    raise AssertionError(f"no end: {raw[:200]!r}")


FORMAT_CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
assert set(FORMATS) <= FORMAT_CHECKER.checkers.keys(), "without what checks them, texts of these formats prove nothing"


def check_texts(seeds: range, draw: Callable[[random.Random], tuple[Any, Callable[[str], object]]]) -> int:
    """Texts of schemas satisfy them; how many schemas were refused. `draw`: a schema, and who else takes what satisfies
    it."""
    tokens = GrammarTokens(LARGER, [len(LARGER) - 1])
    num_refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        schema, take = draw(rng)
        try:
            packed = COMPILER.compile(Structure("json", json.dumps(schema), "schema"), None)
        except InvalidRequest as error:
            if error.code not in ("unsupported_schema", "invalid_grammar"):
                raise
            num_refused += 1
            continue
        text = written(tokens, unpack_grammar(packed), rng)
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=FORMAT_CHECKER)
        take(text)
    return num_refused


def any_schema(rng: random.Random) -> tuple[Any, Callable[[str], object]]:
    return random_schema(rng), json.loads


def a_model_s(rng: random.Random) -> tuple[Any, Callable[[str], object]]:
    model = random_model(rng)
    return model.model_json_schema(), model.model_validate_json


def test_texts_of_random_schemas_satisfy_them() -> None:
    assert 0 < check_texts(range(150), any_schema) < 40


def test_texts_of_random_models_of_pydantic_are_what_it_takes() -> None:
    assert check_texts(range(100), a_model_s) == 0


@pytest.mark.slow
def test_texts_of_more_random_schemas_satisfy_them() -> None:
    assert 0 < check_texts(range(1_000, 1_500), any_schema) < 120


@pytest.mark.slow
def test_texts_of_more_random_models_of_pydantic_are_what_it_takes() -> None:
    assert check_texts(range(1_000, 1_500), a_model_s) == 0


# ---- thinking


@pytest.mark.parametrize("is_special", [False, True])
def test_an_answer_begins_behind_the_thinking(is_special: bool) -> None:
    words = [*BYTES, b"<think>", b"</think>"]
    special = {256: b"<think>", 257: b"</think>"} if is_special else {}
    compiler, tokens = GrammarCompiler(special, len(words)), GrammarTokens(words, special)

    def ends(thought: Thought | None, *parts: str | int) -> bool | None:
        """Whether the answer may end there; None where it cannot be so."""
        packed = compiler.compile(Structure("json", '{"enum": [1, 2]}', "p"), thought)
        matcher = GrammarMatcher(tokens, unpack_grammar(packed))
        try:
            for part in parts:
                matcher.consume([part] if isinstance(part, int) else list(part.encode()))
        except GrammarError:
            return None
        return matcher.state().is_accepting

    begun, fresh = Thought("<think>", "</think>", True), Thought("<think>", "</think>", False)
    assert ends(begun, "so {1} ", 257, "\n\n2") is True
    assert ends(begun, "2") is False
    assert ends(begun, "so ", 257) is False
    assert ends(begun, "so ", 257, "\n3") is None
    assert ends(fresh, 256, "so", 257, "2") is True
    assert ends(fresh, "2") is True
    assert ends(fresh, "\n2") is None  # spaces belong to the thinking
    if is_special:  # the reader would end the thinking there
        assert ends(begun, "so </think") is False
        assert ends(begun, "so </think>") is None
    assert ends(fresh, "so", 257, "2") is None
    assert ends(None, "2") is True
    assert ends(None, "\n2") is None


# ---- on the way to ranks


def test_vocabularies_travel_whole_or_not_at_all() -> None:
    vocabulary = Vocabulary(WORDS, [END], [END])
    data = encode_vocabulary(vocabulary)
    digest = digest_of(data)
    assert decode_vocabulary(data, digest, len(WORDS)) == vocabulary
    for raw, size in ((data[:-1], len(WORDS)), (data + b"x", len(WORDS)), (data, len(WORDS) + 1)):
        with pytest.raises(ProtocolError, match="vocabulary"):
            decode_vocabulary(raw, digest, size)
    beyond = encode_vocabulary(Vocabulary(WORDS, [], [len(WORDS)]))
    with pytest.raises(ProtocolError, match="outside"):
        decode_vocabulary(beyond, digest_of(beyond), len(WORDS))
    with pytest.raises(ProtocolError, match="cannot be read"):
        decode_vocabulary(b"\xc1", digest_of(b"\xc1"), 3)


def test_grammars_travel_within_their_bounds() -> None:
    text = 'start: "ä"\n' * 1_000
    assert unpack_grammar(pack_grammar(text)) == text
    most = "x" * GRAMMAR_BYTES_MAX
    assert unpack_grammar(pack_grammar(most)) == most
    for packed in (pack_grammar(most + "x"), pack_grammar(text)[:-3], b"nonsense"):
        with pytest.raises(ProtocolError):
            unpack_grammar(packed)
