"""How many characters a token can stand for: a text that is longer than the context allows need not be tokenized.

A bound holds only for tokenizers that lose no character: every piece of a text becomes a token, and no normalizer,
pre-tokenizer or unknown token swallows any number of them. The tokenizers of language models are of that kind. For
others there is no bound, and only the limits of a worker hold.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.text.detokenizer import byte_of_char

# Canonical composition makes at most this many code points one: no code point decomposes into more (Unicode's own
# bound, see the expansion factors of UAX 15).
_COMPOSED_MAX: Final = 4
_OF_UTF8: Final = frozenset(range(256)) - {0xC0, 0xC1} - frozenset(range(0xF5, 256))  # the bytes of valid UTF-8
_CONTINUATIONS: Final = frozenset(range(0x80, 0xC0))
_CONTROLS: Final = frozenset({*range(0x20), 0x7F})
_PIECE_CHARS: Final = 65_536
# Steps that keep every character. Those of the second kind lose white space, but nothing else.
_KEEPS: Final = {
    "NFD",
    "NFKD",
    "Lowercase",
    "Prepend",
    "ByteLevel",
    "Metaspace",
    "Digits",
    "UnicodeScripts",
    "FixedLength",
}
_LOSES_SPACES: Final = {"Strip", "WhitespaceSplit", "Whitespace", "BertPreTokenizer"}


class CharBound(NamedTuple):
    """A prompt of n tokens has at most n * `per_token` characters, beside any number of those in `free`, which the
    tokenizer drops, and, where it `ignores_spaces`, of white space."""

    per_token: int
    free: str
    ignores_spaces: bool

    def check(self, text: str, context: int) -> None:
        """Raises InvalidRequest for a text that cannot fit into `context` tokens. Takes about 10 ms per million
        characters where white space does not count."""
        most = context * self.per_token
        if len(text) <= most or len(text) - sum(map(text.count, self.free)) <= most:
            return
        if self.ignores_spaces and _num_dense(text) - sum(map(text.count, self.free)) <= most:
            return
        raise InvalidRequest(
            f"This model's maximum context length is {context} tokens. However, there are {len(text)} "
            f"characters in your prompt, and no more than {most} of them fit. Please reduce the length of the prompt.",
            code="context_length_exceeded",
            param="prompt",
        )


def _num_dense(text: str) -> int:
    """Characters that are no white space. In pieces, because words are many small objects."""
    pieces = (text[at : at + _PIECE_CHARS] for at in range(0, len(text), _PIECE_CHARS))
    return sum(len(word) for piece in pieces for word in piece.split())


def measure(tokenizer: Tokenizer) -> CharBound | None:
    """The bound of a tokenizer, from its vocabulary and its steps; None where there is none."""
    steps = [*_steps(tokenizer.normalizer), *_steps(tokenizer.pre_tokenizer)]
    free = _dropped(tokenizer, is_byte_level=any(step["type"] == "ByteLevel" for step in steps))
    if free is None:
        return None
    per_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
    ignores_spaces = any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    for step in steps:
        factor = _factor(step)
        if factor is None or set(free) & set(step.get("content", "")):
            return None
        per_token *= max(1, factor)
        ignores_spaces |= factor == 0
    return CharBound(per_token, free, ignores_spaces)


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as its plain steps."""
    if part is None:
        return []
    pending, found = [json.loads(part.__getstate__())], []
    while pending:
        step = pending.pop(0)
        inner = step.get("normalizers", step.get("pretokenizers"))
        if inner is None:
            found.append(step)
        else:
            pending[:0] = inner
    return found


def _factor(step: dict[str, Any]) -> int | None:
    """How many characters the step may make one; 0: white space may go; None: anything may go."""
    kind = step["type"]
    if kind in _KEEPS:
        return 1
    if kind in _LOSES_SPACES:
        return 0
    if kind in ("NFC", "NFKC"):
        return _COMPOSED_MAX
    if kind in ("Split", "Punctuation"):
        return None if step["behavior"] == "Removed" else 1
    if kind == "Replace" and "String" in step["pattern"] and step["content"]:
        return -(-len(step["pattern"]["String"]) // len(step["content"]))
    return None


def _dropped(tokenizer: Tokenizer, *, is_byte_level: bool) -> str | None:
    """The characters that become no part of any token: control characters at most, which no other character turns
    into. None where others do, or where a token takes any number of characters."""
    model: Any = tokenizer.model
    if type(model).__name__ != "BPE":
        return None  # unknown words or runs of unknown characters become one token
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if is_byte_level:
        missing = {byte for char, byte in byte_of_char().items() if char not in vocab}
        # A longer character keeps its continuation bytes, whatever becomes of the first.
        if not missing & _CONTINUATIONS and {byte for byte in missing if byte < 0x80} <= _CONTROLS:
            return "".join(chr(byte) for byte in sorted(missing & _CONTROLS))
    elif model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in _OF_UTF8):
        return ""
    return "" if model.unk_token in vocab and not model.fuse_unk else None
