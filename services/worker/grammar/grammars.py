"""The grammars of one rank's sequences.

A matcher is made in one thread and advanced in another while the rank computes the next step: what may follow is asked
for only when that step's tokens are chosen. A sequence whose matcher is not ready is left out of steps; one whose
matcher is late in a step has its part of it computed once more. A step waits for LATE_S at most, for all of them. Whose
matcher took more than SLOW_S once is advanced in a third thread from then on, and no step waits for it. So others'
grammars delay a sequence by that one time.

Threads touch a sequence's guide only: its matcher, and what may follow on it, while a future of theirs is not done.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
SLOW_S: Final = 0.01  # of CPU, that what may follow on a token takes where others wait behind it
KEPT_MAX: Final = 32  # grammars that are not read again for the next request with the same one
KEPT_BYTES_MAX: Final = 64 << 10  # of their texts; one of 12 KiB with many ranges of numbers took 31 MiB


_Work = tuple[Guide, int | None]


class Prepared(NamedTuple):
    """Sequences that may run from now on, and those that end."""

    ready: list[Sequence]
    failed: list[tuple[Sequence, ElasticMoEError]]


class _Kept(NamedTuple):
    """A matcher that no sequence advances, and the size of its grammar's text."""

    matcher: GrammarMatcher
    nbytes: int


class Grammars:
    """Owned by the engine; only the rank's loop thread calls it. Until the first grammar there is no thread, and the
    library is not loaded."""

    def __init__(self) -> None:
        self._opener = ThreadPoolExecutor(1, "grammars")
        self._stepper = ThreadPoolExecutor(1, "masks")
        self._slow_stepper = ThreadPoolExecutor(1, "slow-masks")
        self._vocabularies = Vocabularies(self._opener)
        self._kept: OrderedDict[tuple[str, bytes], _Kept] = OrderedDict()  # the opener's

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
                self._step(self._slow_stepper, [(guide, None)])  # the first one takes the longest
            return False
        return guide.pending is None or guide.pending.done()

    def _open(self, vocabulary: ReadVocabulary, digest: str, packed: bytes, output: list[int]) -> GrammarMatcher:
        """In the opener. Raises GrammarError, ProtocolError."""
        from elasticmoe.common.grammar import GrammarMatcher

        key = digest, packed
        kept = self._kept.pop(key, None)
        if kept is None:
            text = unpack_grammar(packed)
            kept = _Kept(GrammarMatcher(vocabulary.tokens, text), len(text.encode()))
        self._kept[key] = kept  # the last one that came
        while len(self._kept) > KEPT_MAX or sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES_MAX:
            self._kept.popitem(last=False)
        matcher = kept.matcher.copy()
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
        quick: list[_Work] = []
        slow: list[_Work] = []
        for sequence in sequences:
            guide = sequence.guide
            if guide is not None and guide.matcher is not None:
                guide.num_tokens += 1
                (slow if guide.slowest_s > SLOW_S else quick).append((guide, sequence.tokens[-1]))
        quick.sort(key=lambda work: work[0].slowest_s)
        self._step(self._stepper, quick)
        for work in slow:
            self._step(self._slow_stepper, [work])

    @staticmethod
    def _step(stepper: Executor, batch: list[_Work]) -> None:
        """Have these advanced, one after the other; each is done as soon as it is."""
        jobs: list[tuple[Guide, int | None, Future[None]]] = []
        for guide, token in batch:
            pending: Future[None] = Future()
            guide.pending = pending
            jobs.append((guide, token, pending))
        if jobs:
            stepper.submit(_advance_all, jobs)

    def forget(self, sequence: Sequence) -> None:
        """It has ended here: what has not begun for it need not."""
        if sequence.guide is not None:
            sequence.guide.close()

    def choices_before(self, sequences: Iterable[Sequence]) -> list[Choice]:
        """What their grammars make of sequences' parts of a step before tokens are chosen: nothing, or that there is
        none to choose. Blocks for LATE_S at most."""
        deadline = time.monotonic() + LATE_S
        return [self._choice_before(sequence, deadline) for sequence in sequences]

    def _choice_before(self, sequence: Sequence, deadline: float) -> Choice:
        try:
            state = self._state_of(sequence, deadline) if sequence.guide is not None else None
        except TimedOut:
            return Choice(is_late=True)
        except Exception as error:
            return Choice(error=_failure(error, sequence, "following the request's grammar"))
        return Choice(is_over=state is not None and state.is_over)

    def _state_of(self, sequence: Sequence, deadline: float) -> GrammarState:
        """What may follow on its tokens. Raises TimedOut, and what went wrong."""
        guide = sequence.guide
        assert guide is not None
        assert guide.num_tokens == sequence.num_output, "a matcher is not where its output is"
        if guide.pending is not None:
            guide.pending.result(0.0 if guide.slowest_s > SLOW_S else max(0.0, deadline - time.monotonic()))
            guide.pending = None
        state = guide.state
        assert state is not None
        if state.error is not None:
            raise state.error
        guide.check_time()
        return state


def _failure(error: Exception, sequence: Sequence, doing: str) -> ElasticMoEError:
    """The end of a sequence of which that raised. Where its grammar found no memory, no step would have found more."""
    if is_shortage(error):
        return Unavailable(f"the rank has no memory for {doing}", code=OUT_OF_MEMORY)
    return failure_of(error, doing, **sequence.request.names)


def _advance_all(batch: list[tuple[Guide, int | None, Future[None]]]) -> None:
    """In a stepper: a token more for each, or none."""
    for guide, token, pending in batch:
        if pending.set_running_or_notify_cancel():
            try:
                _advance(guide, token)
            except BaseException as error:
                pending.set_exception(error)
            else:
                pending.set_result(None)


def _advance(guide: Guide, token: int | None) -> None:
    matcher = guide.matcher
    assert matcher is not None
    begun = time.thread_time()
    state = matcher.state() if token is None else matcher.advance(token)
    guide.take(state, time.thread_time() - begun, is_first=token is None)
