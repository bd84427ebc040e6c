"""The grammars of one rank's sequences.

A matcher is made in one thread and advanced in another, each step's all together, while the rank computes the next
step: what may follow is asked for only when that step's tokens are chosen. A sequence whose matcher is not ready is
left out of steps; one whose matcher is late in a step has its part of it computed once more. So nobody waits for
another's grammar, but for LATE_S.

Threads touch a sequence's guide only: its matcher, and what may follow on it, while a future of theirs is not done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimedOut
from typing import TYPE_CHECKING, Final, NamedTuple

from elasticmoe.common.grammar_text import unpack_grammar
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.rank import VocabularyPiece
from elasticmoe.common.protocol.router import WantVocabulary
from elasticmoe.services.worker.engine.failure import OUT_OF_MEMORY, failure_of, is_shortage
from elasticmoe.services.worker.engine.outcome import Choice
from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.grammar.guide import Guide
from elasticmoe.services.worker.grammar.vocabularies import ReadVocabulary, Vocabularies

if TYPE_CHECKING:
    from elasticmoe.common.grammar import GrammarMatcher, GrammarState

LATE_S: Final = 0.05  # that a step waits at most for what may follow
KEPT_MAX: Final = 32  # grammars that are not read again for the next request with the same one


class Prepared(NamedTuple):
    """Sequences that may run from now on, and those that end."""

    ready: list[Sequence]
    failed: list[tuple[Sequence, ElasticMoEError]]


class Grammars:
    """Owned by the engine; only the rank's loop thread calls it. Until the first grammar there is no thread, and the
    library is not loaded."""

    def __init__(self) -> None:
        self._opener = ThreadPoolExecutor(1, "grammars")
        self._stepper = ThreadPoolExecutor(1, "masks")
        self._vocabularies = Vocabularies(self._opener)
        self._kept: OrderedDict[tuple[str, bytes], GrammarMatcher] = OrderedDict()  # the opener's

    # ---- before a sequence runs

    def prepare(self, sequences: Iterable[Sequence]) -> Prepared:
        """Look how far those are that wait for their grammar."""
        prepared = Prepared([], [])
        for sequence in sequences:
            try:
                if self._is_ready(sequence):
                    prepared.ready.append(sequence)
            except Exception as error:
                prepared.failed.append((sequence, _failure(error, sequence, "reading the request's grammar")))
        return prepared

    def _is_ready(self, sequence: Sequence) -> bool:
        grammar, guide = sequence.request.sampling.grammar, sequence.guide
        assert grammar is not None
        if guide is None:
            vocabulary = self._vocabularies.get(grammar.vocabulary)
            if vocabulary is not None:
                output = sequence.tokens[sequence.num_prompt :]
                opening = self._opener.submit(self._open, vocabulary, grammar.vocabulary, grammar.packed, output)
                ends = vocabulary.eos.intersection(sequence.request.stop_token_ids)
                sequence.guide = Guide(opening, len(output), tuple(sorted(ends)))
            return False
        if guide.opening is not None:
            if guide.opening.done():
                guide.matcher, guide.opening = guide.opening.result(), None
                guide.pending = self._stepper.submit(_advance, [(guide, None)])
            return False
        return guide.pending is None or guide.pending.done()

    def _open(self, vocabulary: ReadVocabulary, digest: str, packed: bytes, output: list[int]) -> GrammarMatcher:
        """In the opener. Raises GrammarError, ProtocolError."""
        from elasticmoe.common.grammar import GrammarMatcher

        key = digest, packed
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = GrammarMatcher(vocabulary.tokens, unpack_grammar(packed))
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
        matcher = kept.copy()
        matcher.consume(output)
        return matcher

    def questions(self, sequences: Iterable[Sequence], now: float) -> list[tuple[bytes, WantVocabulary]]:
        """What the routers of those that wait are to be asked."""
        return self._vocabularies.questions(
            [(s.request.sampling.grammar.vocabulary, s.peer) for s in sequences if s.request.sampling.grammar], now
        )

    def take(self, piece: VocabularyPiece, size: int) -> None:
        """A part of a vocabulary, for a model of `size` tokens."""
        self._vocabularies.take(piece, size)

    # ---- while it runs

    def advance(self, sequences: Iterable[Sequence]) -> None:
        """These have one token more. What may follow on it is found out while the next step is computed."""
        batch: list[tuple[Guide, int | None]] = []
        for sequence in sequences:
            guide = sequence.guide
            if guide is not None and guide.matcher is not None:
                guide.num_tokens += 1
                batch.append((guide, sequence.tokens[-1]))
        if batch:
            pending = self._stepper.submit(_advance, batch)
            for guide, _ in batch:
                guide.pending = pending

    def choice_before(self, sequence: Sequence) -> Choice:
        """What its grammar makes of a sequence's part of a step before a token is chosen: nothing, or that there is
        none to choose. Blocks for LATE_S at most."""
        try:
            state = self._state_of(sequence) if sequence.guide is not None else None
        except TimedOut:
            return Choice(is_late=True)
        except Exception as error:
            return Choice(error=_failure(error, sequence, "following the request's grammar"))
        return Choice(is_over=state is not None and state.is_over)

    def _state_of(self, sequence: Sequence) -> GrammarState:
        """What may follow on its tokens. Raises TimedOut, and what went wrong."""
        guide = sequence.guide
        assert guide is not None
        assert guide.num_tokens == sequence.num_output, "a matcher is not where its output is"
        if guide.pending is not None:
            guide.pending.result(LATE_S)
            guide.pending = None
        state = guide.state
        assert state is not None
        if state.error is not None:
            raise state.error
        return state


def _failure(error: Exception, sequence: Sequence, doing: str) -> ElasticMoEError:
    """The end of a sequence of which that raised. Where its grammar found no memory, no step would have found more."""
    if is_shortage(error):
        return Unavailable(f"the rank has no memory for {doing}", code=OUT_OF_MEMORY)
    return failure_of(error, sequence.request.request_id, doing)


def _advance(batch: list[tuple[Guide, int | None]]) -> None:
    """In the stepper: a token more for each, or none."""
    from elasticmoe.common.grammar import advance, states_of

    steps = [(guide.matcher, token) for guide, token in batch if guide.matcher is not None and token is not None]
    if steps:
        advance(steps)
    matchers = [guide.matcher for guide, _ in batch if guide.matcher is not None]
    for (guide, _), state in zip(batch, states_of(matchers), strict=True):
        guide.take(state)
