"""The vocabularies that a rank has been given, and those that it waits for. They come from routers, in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

from elasticmoe.common.grammar_text import decode_vocabulary
from elasticmoe.common.protocol.rank import VocabularyPiece
from elasticmoe.common.protocol.router import WantVocabulary
from elasticmoe.common.telemetry import get_logger

if TYPE_CHECKING:
    from elasticmoe.common.grammar import GrammarTokens

log = get_logger("grammar")

ASK_S = 1.0  # after the last piece, or the last question


class ReadVocabulary:
    """One that can be used: the `tokens`, and the ids that end the model's answers."""

    def __init__(self, data: bytes, digest: str, size: int) -> None:
        """Blocks: see GrammarTokens. Raises ProtocolError."""
        from elasticmoe.common.grammar import GrammarTokens  # the library is loaded with the first grammar

        read = decode_vocabulary(data, digest, size)
        self.tokens: GrammarTokens = GrammarTokens(read.tokens, read.special)
        self.eos = frozenset(read.eos)


class _Arriving:
    """One that is asked for."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.nbytes = 0
        self.pieces: dict[int, bytes] = {}

    def add(self, piece: VocabularyPiece) -> bytes | None:
        """All of it, once that is there."""
        if piece.nbytes != self.nbytes:
            self.nbytes, self.pieces = piece.nbytes, {}
        self.pieces[piece.offset] = piece.data
        self.asked_at = None if self.asked_at is None else self.asked_at + ASK_S / 4
        if sum(map(len, self.pieces.values())) < self.nbytes:
            return None
        data = b"".join(data for _, data in sorted(self.pieces.items()))
        self.pieces = {}
        return data


class Vocabularies:
    """Owned by the rank's thread. `executor`: where they are read."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._known: dict[str, Future[ReadVocabulary]] = {}
        self._arriving: dict[str, _Arriving] = {}

    def get(self, digest: str) -> ReadVocabulary | None:
        """None while it is not there: it is asked for from now on. Raises what reading it raised; the next call asks
        for it once more."""
        found = self._known.get(digest)
        if found is None:
            self._arriving.setdefault(digest, _Arriving())
        if found is None or not found.done():
            return None
        try:
            return found.result()
        except Exception:
            del self._known[digest]
            raise

    def questions(self, sources: Iterable[tuple[str, bytes]], now: float) -> list[tuple[bytes, WantVocabulary]]:
        """What routers are to be asked now. `sources`: by a vocabulary's hash, a router that has it."""
        asked = []
        for digest, router in dict(sources).items():
            arriving = self._arriving.get(digest)
            if arriving is not None and (arriving.asked_at is None or now - arriving.asked_at > ASK_S):
                arriving.asked_at = now
                asked.append((router, WantVocabulary(digest)))
        return asked

    def take(self, piece: VocabularyPiece, size: int) -> None:
        """A part of one that was asked for; of others nothing is kept. `size`: tokens of the model."""
        arriving = self._arriving.get(piece.digest)
        data = arriving.add(piece) if arriving is not None else None
        if data is not None:
            del self._arriving[piece.digest]
            log.info("vocabulary came", digest=piece.digest[:12], nbytes=len(data))
            self._known[piece.digest] = self._executor.submit(ReadVocabulary, data, piece.digest, size)
