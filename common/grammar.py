"""Which tokens may follow: grammars, as llguidance reads them. Nothing else knows that library.

A grammar is a text in its Lark. The tokens that spell a text are the model's to choose: of a vocabulary only the bytes
are known here, not how a tokenizer would cut a text, so every grammar has to begin with FREE_SPELLING.

Whatever a grammar asks for is bounded by _LIMITS: what exceeds them is a GrammarError, and so is a fault of the
library, which catches its own panics.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.limits import GRAMMAR_ITEMS_MAX, GRAMMAR_STATES_MAX, GRAMMAR_SYMBOLS_MAX

FREE_SPELLING: Final = '%llguidance {"no_forcing": true}\n'
_SPECIAL: Final = b"\xff"  # before the name of a token that no text spells
_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=GRAMMAR_ITEMS_MAX,
    max_lexer_states=GRAMMAR_STATES_MAX,
    max_grammar_size=GRAMMAR_SYMBOLS_MAX,
    verbose_errors=False,
)
_TEXT_CHARS_MAX: Final = 400  # of what the library says

# Where the library shows the grammar beside its words, and where it looked when it said them.
_LISTING: Final = re.compile(r"\s*\n\s*\d+ \| .*|<non-verbose/>", re.DOTALL)
_PLACE: Final = re.compile(r"^(at )?\d+\(\d+\): |failed to compile JSON schema: ")

Bits = bytearray
"""One bit for each token id, the lowest of a byte first."""


class GrammarError(ElasticMoEError):
    """A grammar that cannot be read or followed; the text is for its client. It ends that one request."""

    code = "grammar_failed"


class GrammarState(NamedTuple):
    """What may follow on `num_tokens` tokens. `allowed`: the vocabulary's tokens, without those that end an answer,
    which may come where `is_accepting`; `is_over`: nothing else may. `error`: it cannot be followed any further."""

    num_tokens: int
    allowed: Bits
    is_accepting: bool
    is_over: bool
    error: GrammarError | None = None


class GrammarTokens:
    """A vocabulary, ready to be asked. Immutable. Making it takes 0.1 to 0.3 s and 20 to 60 MB for 50,000 to 150,000
    tokens, and holds the interpreter's lock."""

    def __init__(self, tokens: Sequence[bytes], special: Iterable[int]) -> None:
        self.size = len(tokens)
        marked = set(special)
        named = [_SPECIAL + token if number in marked else token for number, token in enumerate(tokens)]
        # No token of the model ends a text: the library makes one of its own for that, behind them all.
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Wrapped(named)))

    @property
    def num_words(self) -> int:
        """Of 32 bits, in a row of bits with the library's own end."""
        return -(-(self.size + 1) // 32)


class _Wrapped:
    """What the library asks of a tokenizer. It has no end of sequence, and cuts no texts (FREE_SPELLING)."""

    eos_token_id = None
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def __call__(self, _: bytes) -> list[int]:
        return []


class GrammarMatcher:
    """Where one output stands in its grammar. For one thread at a time."""

    def __init__(self, tokens: GrammarTokens, text: str) -> None:
        """At the beginning. Blocks for 1 to 100 ms, without the interpreter's lock. Raises GrammarError."""
        self.tokens = tokens
        self.num_tokens = 0
        self._inner = LLMatcher(tokens.tokenizer, text, log_level=0, limits=_LIMITS)
        if self._inner.is_error():
            raise self._error()

    def copy(self) -> GrammarMatcher:
        """Another one that stands where this does."""
        copied = object.__new__(GrammarMatcher)
        copied.tokens, copied.num_tokens, copied._inner = self.tokens, self.num_tokens, self._inner.deep_copy()
        return copied

    def consume(self, token_ids: Sequence[int]) -> None:
        """The output goes on with these. Raises GrammarError where it may not, and is of no more use then."""
        if token_ids and not self._inner.consume_tokens(list(token_ids)):
            raise self._error()
        self.num_tokens += len(token_ids)

    def advance(self, token_id: int) -> GrammarState:
        """The output goes on with one token: what may follow then, without the interpreter's lock. Where it may not,
        the state says so."""
        self.num_tokens += 1
        self._inner.consume_token(token_id)
        return self.state()

    def state(self) -> GrammarState:
        """What may follow, without the interpreter's lock."""
        tokens, inner = self.tokens, self._inner
        words = (ctypes.c_uint32 * tokens.num_words)()
        inner.unsafe_compute_mask_ptr(ctypes.addressof(words), 4 * tokens.num_words)
        allowed = bytearray(memoryview(words).cast("B"))
        allowed[tokens.size >> 3] &= 0xFF ^ 1 << (tokens.size & 7)
        del allowed[-(-tokens.size // 8) :]
        if inner.is_error():
            return GrammarState(self.num_tokens, allowed, False, False, self._error())
        is_over = allowed.count(0) == len(allowed)
        return GrammarState(self.num_tokens, allowed, inner.is_accepting(), is_over)

    def _error(self) -> GrammarError:
        return GrammarError(said(self._inner.get_error()))


def said(text: str) -> str:
    """The library's words, in one line of bounded length."""
    if text.startswith("NoExtensionBias"):
        return "no text can be written that satisfies it"
    line = " ".join(_PLACE.sub("", _PLACE.sub("", _LISTING.sub("", text))).split())
    return line if len(line) <= _TEXT_CHARS_MAX else f"{line[:_TEXT_CHARS_MAX]}…"
