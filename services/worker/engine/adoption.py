"""A rank goes on with what its predecessor left in the ledger: same rows, same blocks, from the committed position.

The step in flight is repeated, no more: its KV is written again with the same bytes, and sampling is counted by
position. What had been generated is reported again from the first token, because the predecessor's last reports may
have been lost with it; routers drop what they know. What was only in the predecessor's memory is not here: requests
that waited, log probabilities, places kept for other ranks' sequences. The routers submit such requests anew; the other
ranks learn from the new incarnation's refusals and take their sequences back. A sequence that was being handed over
has its row until the other rank's answer has come, so both may go on with it, with the same tokens, until it ends.

A row may also be what ended the predecessor. Its mark tells whether a step with it did not end, and how often
(trial.py): who is found guilty by that ends here, and of who is not, the routers are told what is known, so that it is
not forgotten where one of them submits the request anew.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from elasticmoe.common.protocol.router import Delta, Failed, Suspected
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.failure import is_shortage
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.rows import BadRow, read_sequence
from elasticmoe.services.worker.engine.sequence import RequestKey, Sequence
from elasticmoe.services.worker.engine.trials import guilty_error

log = get_logger("engine")


def adopt_rows(engine: Engine, vocab: int) -> Outcome:
    """Go on with every live row of the ledger, before the engine's first step. Returns what the routers are to be told:
    all tokens of each sequence, also of those that had none yet, so that they know what lives.

    Rows that cannot be true are closed. One that is found to be what ends ranks fails.
    """
    outcome = Outcome({}, [], suspected := [])
    claims = _Claims(engine)
    for sequence in _read(engine, vocab):
        request_id, trial = sequence.request.request_id, sequence.trial
        if trial.is_guilty:
            log.error("request ended ranks, and is ended", failures=trial.failures, **sequence.request.names)
            engine.ledger.close_row(sequence.row)
            error = guilty_error()
            failed = Failed(request_id, error.code, error.message, error.retryable)
            outcome.failures.append((sequence.peer, failed))
            continue
        why = claims.refusal(sequence)
        if why:
            _drop(engine, sequence.row, why)
            continue
        if trial.suspicion is not None:
            suspected.append((sequence.peer, Suspected(request_id, trial.suspicion)))
        finish = sequence.finish_reason(engine.scheduler.capacity_tokens)
        outcome.deltas.setdefault(sequence.peer, []).append(_report(sequence, finish))
        if finish is not None:
            engine.ledger.close_row(sequence.row)
        elif sequence.wants_prompt_logprobs:
            claims.add_name(sequence)
            engine.adopt_without_kv(sequence)  # what its computed rows predicted is lost: they are computed again
        else:
            claims.add(sequence)
    engine.adopt_in_place(claims.sequences)
    return outcome


def _read(engine: Engine, vocab: int) -> list[Sequence]:
    """The rows' sequences, oldest first as far as their deadlines tell."""
    found = []
    size, num_blocks = engine.kv.geometry.block_size, engine.scheduler.blocks.num_blocks
    for row in engine.ledger.rows():
        try:
            if row >= engine.scheduler.max_sequences:
                raise BadRow(f"this rank has {engine.scheduler.max_sequences} rows")
            found.append(read_sequence(engine.ledger, row, num_blocks=num_blocks, block_size=size, vocab=vocab))
        except BadRow as error:
            _drop(engine, row, error.message)
        except Exception as error:  # else no rank could ever take this seat again
            if is_shortage(error):
                raise
            log.exception("ledger row cannot be read", row=row)
            _drop(engine, row, type(error).__name__)
    return sorted(found, key=lambda sequence: sequence.deadline)


def _drop(engine: Engine, row: int, why: str) -> None:
    log.error("ledger row dropped; its router starts the request anew", row=row, because=why)
    engine.ledger.close_row(row)


def _report(sequence: Sequence, finish: str | None) -> Delta:
    output = sequence.tokens[sequence.num_prompt :]
    sequence.num_sent = len(output)
    if finish == "stop":
        return Delta(sequence.request.request_id, 0, tuple(output[:-1]), finish, output[-1])
    return Delta(sequence.request.request_id, 0, tuple(output), finish)


class _Claims:
    """Who has which blocks. Several may have a block only where all their tokens up to its end are the same."""

    def __init__(self, engine: Engine) -> None:
        self._size = engine.kv.geometry.block_size
        self._first: dict[int, tuple[Sequence, int]] = {}  # block -> its first owner, and where it has it
        self._names: set[RequestKey] = set()
        self.sequences: list[Sequence] = []

    def refusal(self, sequence: Sequence) -> str:
        """Why the sequence cannot be beside those that were added; empty when it can."""
        if (sequence.peer, sequence.request.request_id) in self._names:
            return "another row has the same request"
        shared: dict[int, tuple[Sequence, int]] = {}  # by owner: how many tokens must be the same
        for index, block in enumerate(sequence.blocks):
            if block not in self._first:
                continue
            other, place = self._first[block]
            if place != index:
                return f"block {block} is another sequence's"
            shared[id(other)] = other, (index + 1) * self._size
        for other, count in shared.values():
            if len(sequence.tokens) < count or not _begin_alike(other.tokens, sequence.tokens, count):
                return "it shares blocks with a sequence of other tokens"
        return ""

    def add_name(self, sequence: Sequence) -> None:
        """It goes on without blocks."""
        self._names.add((sequence.peer, sequence.request.request_id))

    def add(self, sequence: Sequence) -> None:
        """It goes on with its blocks."""
        self.add_name(sequence)
        for index, block in enumerate(sequence.blocks):
            self._first.setdefault(block, (sequence, index))
        self.sequences.append(sequence)


def _begin_alike(one: Seq[int], other: Seq[int], count: int) -> bool:
    return len(one) >= count and one[:count] == other[:count]
