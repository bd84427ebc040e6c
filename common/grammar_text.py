"""How a grammar and the vocabulary that it speaks of travel from a router to ranks: the text compressed, and the bytes
of the model's tokens, which a router makes of the tokenizer's files, and a hash names. Pure."""

from __future__ import annotations

import hashlib
import zlib

import msgspec

from elasticmoe.common.protocol.errors import ProtocolError
from elasticmoe.common.protocol.limits import GRAMMAR_BYTES_MAX
from elasticmoe.common.wording import undecodable


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """`tokens`: what each id stands for, of all ids of the model; empty for those that no text has. `special`: ids that
    no text spells, whatever their bytes. `eos`: ids that end the model's answers."""

    tokens: list[bytes]
    special: list[int]
    eos: list[int]


_decoder = msgspec.msgpack.Decoder(Vocabulary)


def encode_vocabulary(vocabulary: Vocabulary) -> bytes:
    """Its bytes for ranks; the same for the same vocabulary."""
    return msgspec.msgpack.encode(vocabulary)


def digest_of(data: bytes) -> str:
    """The name of an encoded vocabulary: SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def decode_vocabulary(data: bytes, digest: str, size: int) -> Vocabulary:
    """Read what a router sent. Raises ProtocolError unless it is what `digest` names, of `size` tokens."""
    if (got := digest_of(data)) != digest:
        raise ProtocolError(f"a vocabulary of {len(data)} bytes has the hash {got}; it was sent as {digest}")
    try:
        vocabulary = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ProtocolError(f"a vocabulary cannot be read: {undecodable(error)}") from None
    if len(vocabulary.tokens) != size:
        raise ProtocolError(f"a vocabulary has {len(vocabulary.tokens)} tokens; the model has {size}")
    if not all(0 <= token_id < size for token_id in (*vocabulary.special, *vocabulary.eos)):
        raise ProtocolError(f"a vocabulary names a token outside [0, {size})")
    return vocabulary


def pack_grammar(text: str) -> bytes:
    """A grammar's text, compressed; the same for the same text."""
    return zlib.compress(text.encode(), 9)


def unpack_grammar(packed: bytes) -> str:
    """The text. Raises ProtocolError for what is none, and for more than GRAMMAR_BYTES_MAX."""
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(packed, GRAMMAR_BYTES_MAX + 1)
        if len(raw) > GRAMMAR_BYTES_MAX:
            raise ProtocolError(f"a grammar of {len(packed)} bytes unpacks to more than {GRAMMAR_BYTES_MAX} bytes")
        if not unpacking.eof:
            raise ProtocolError(f"a grammar of {len(packed)} bytes is cut off")
        return raw.decode()
    except (zlib.error, UnicodeDecodeError):
        raise ProtocolError(f"a grammar of {len(packed)} bytes cannot be read") from None
