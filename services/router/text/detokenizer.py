"""From tokens to text, token by token: no character is ever split, and no part of a stop string gets out.

Each token stands for bytes; a character may be spread over several tokens. So tokens become bytes by the rules of the
tokenizer's own decoder, and bytes become text by an incremental UTF-8 decoder. (`tokenizers.decoders.DecodeStream` does
not do: it holds back without bound while bytes are invalid, fails on byte-fallback models with "invalid prefix", and
cannot be flushed at the end.) For whole sequences the result equals the tokenizer's own `decode`, except that a leading
space is kept, because the text continues a prompt.
"""

from __future__ import annotations

import bisect
import codecs
import json
import re
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from elasticmoe.common.protocol.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@cache
def byte_of_char() -> dict[str, int]:
    """The table of GPT-2's byte-level vocabularies: printable Latin-1 stands for itself, the rest from U+0100 on."""
    table: dict[str, int] = {}
    free = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            table[chr(byte)] = byte
        else:
            table[chr(free)] = byte
            free += 1
    return table


def _byte_level(token: str) -> bytes:
    table = byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode()


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    decoder: Any = tokenizer.decoder
    described: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    return list(described["decoders"]) if described["type"] == "Sequence" else [described]


def _token_rule(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """How one token becomes bytes. Raises ConfigError for a decoder that does not work token by token."""
    replacements: list[tuple[str, str]] = []
    has_byte_tokens = False
    for step in _decoder_steps(tokenizer):
        kind, pattern = step["type"], step.get("pattern")
        if kind == "ByteLevel":
            return _byte_level
        if kind == "Replace" and isinstance(pattern, dict) and "String" in pattern:
            replacements.append((str(pattern["String"]), str(step["content"])))
        elif kind == "Metaspace":
            replacements.append((str(step["replacement"]), " "))
        elif kind == "ByteFallback":
            has_byte_tokens = True
        elif kind not in ("Fuse", "Strip"):  # Strip takes the space before a text's first word, not before a going-on
            raise ConfigError(
                f"tokenizer.json: decoder {kind!s:.40} is not supported; supported: ByteLevel, ByteFallback"
            )

    def rule(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if has_byte_tokens else None
        if byte:
            return bytes([int(byte.group(1), 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return rule


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that decoding skips. What the library does with each counts, not the token's flag: a token that was
    added twice with different flags is skipped by the first or by the last of them."""

    def is_skipped(token_id: int) -> bool:
        return not tokenizer.decode([token_id]) and bool(tokenizer.decode([token_id], skip_special_tokens=False))

    return frozenset(token_id for token_id in tokenizer.get_added_tokens_decoder() if is_skipped(token_id))


class TokenTable:
    """The bytes of each token, filled in as tokens are met. Immutable to its users; one per tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError for a tokenizer whose decoder is not supported."""
        self._tokenizer = tokenizer
        self._rule = _token_rule(tokenizer)
        self._bytes: dict[int, bytes] = {}
        self.special = _special_ids(tokenizer)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for; nothing for ids that the model has but the tokenizer does not."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._tokenizer.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if token is None else self._rule(token)
        return found

    def text_of(self, token_id: int) -> str:
        """A single token as text; partial characters become U+FFFD."""
        return self.bytes_of(token_id).decode(errors="replace")

    def label_of(self, token_id: int) -> str:
        """A single token's name where names must differ: its text, or `bytes:\\xe2\\x82` for a partial character."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _Matcher:
    """Knuth-Morris-Pratt over a stream of characters: `length` of the stop string's longest prefix that ends here."""

    __slots__ = ("_failure", "length", "word")

    def __init__(self, word: str) -> None:
        self.word = word
        self.length = 0
        self._failure = [0] * len(word)
        length = 0
        for index in range(1, len(word)):
            while length and word[index] != word[length]:
                length = self._failure[length - 1]
            length += word[index] == word[length]
            self._failure[index] = length

    def advance(self, char: str) -> bool:
        """Take one character; True when the stop string is complete."""
        word, length = self.word, self.length
        while length and char != word[length]:
            length = self._failure[length - 1]
        length += char == word[length]
        self.length = length
        return length == len(word)


class TextStream:
    """One generation's text. `has_stopped` once a stop string was found: the rest is not looked at.

    `num_chars`: characters decoded so far, held ones included. Tokens up to `min_tokens` cannot stop. `kept`: special
    tokens that are not skipped.
    """

    __slots__ = (
        "_ends",
        "_first_chars",
        "_held",
        "_matchers",
        "_min_tokens",
        "_partial",
        "_skip",
        "_table",
        "has_stopped",
        "num_chars",
        "stopped_by",
    )

    def __init__(
        self,
        table: TokenTable,
        *,
        stops: Sequence[str] = (),
        skip_special: bool = True,
        min_tokens: int = 0,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        self._table = table
        self._skip: frozenset[int] = table.special - kept if skip_special else frozenset()
        self._matchers = [_Matcher(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._min_tokens = min_tokens
        self._ends = array("I")  # of each token: characters up to its end
        self._partial = b""  # the beginning of a character
        self._held = ""  # perhaps the beginning of a stop string
        self.has_stopped = False
        self.stopped_by: str | None = None  # the longest stop string that ends where it stopped
        self.num_chars = 0

    def feed(self, token_id: int) -> str:
        """The text that `token_id` lets out: possibly none, possibly more than its own."""
        if token_id in self._skip:
            self._ends.append(self.num_chars)
            return ""
        raw = self._partial + self._table.bytes_of(token_id)
        text, used = codecs.utf_8_decode(raw, "replace", False)
        self._partial = raw[used:]
        self.num_chars += len(text)
        self._ends.append(self.num_chars)
        if not self._matchers or len(self._ends) <= self._min_tokens:
            return text
        return self._hold_back(text)

    def finish(self) -> str:
        """What is still held, at the end of the generation: U+FFFD for a character that stayed incomplete."""
        if self.has_stopped:
            return ""
        text = codecs.utf_8_decode(self._partial, "replace", True)[0]
        self._partial = b""
        self.num_chars += len(text)
        text, self._held = self._held + text, ""
        return text

    def tokens_within(self, num_chars: int) -> int:
        """How many tokens the first `num_chars` characters are made of, the last of them whole."""
        return bisect.bisect_right(self._ends, num_chars)

    def _hold_back(self, text: str) -> str:
        if not self._held and self._first_chars.isdisjoint(text):
            return text
        whole = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            ended = [matcher.word for matcher in self._matchers if matcher.advance(char)]
            if ended:
                self.has_stopped = True
                self.stopped_by = max(ended, key=len)
                self._held = ""
                return whole[: position - len(self.stopped_by)]
        keep = max(matcher.length for matcher in self._matchers)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]
