"""The vocabulary that ranks read grammars with: a router has it, and gives it to those that ask."""

from __future__ import annotations

from collections.abc import Iterator

from elasticmoe.common.grammar_text import digest_of
from elasticmoe.common.protocol.limits import VOCABULARY_PIECE_BYTES
from elasticmoe.common.protocol.rank import VocabularyPiece


class KnownVocabulary:
    """The served model's, once it was needed: its encoded bytes and the hash that names them."""

    def __init__(self) -> None:
        self.digest = ""
        self._data = b""

    def learn(self, data: bytes) -> None:
        """It is this one."""
        self._data, self.digest = data, digest_of(data)

    def pieces(self, digest: str) -> Iterator[VocabularyPiece]:
        """What a rank is told that asks for it; nothing for another one."""
        if digest == self.digest:
            for offset in range(0, len(self._data), VOCABULARY_PIECE_BYTES):
                data = self._data[offset : offset + VOCABULARY_PIECE_BYTES]
                yield VocabularyPiece(digest, offset, len(self._data), data)
