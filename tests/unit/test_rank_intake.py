"""What a rank makes of messages that its engine fails of: one answer to the sender, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ElasticMoEError, Overloaded
from elasticmoe.common.protocol.rank import GetRankIntegrity, Sampling, Submit
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.router import Failed
from elasticmoe.services.worker.rank.intake import check_ids
from elasticmoe.services.worker.rank.rank import Rank

PEER = b"router:1"


class Said:
    """A server's socket."""

    def __init__(self) -> None:
        self.said: list[tuple[bytes, Message]] = []

    def send(self, peer: bytes, body: Message, *, seq: int = 0) -> bool:
        del seq
        self.said.append((peer, body))
        return True


def rank_of(error: Exception) -> tuple[Any, Said]:
    """A rank without processes and memory, whose engine raises an error."""

    def fail(*_: object) -> None:
        raise error

    rank: Any = Rank.__new__(Rank)
    said = Said()
    rank._server = said
    rank._memory = SimpleNamespace(spec=SimpleNamespace(vocab=300))
    rank._engine = SimpleNamespace(add=fail, check_integrity=fail)
    return rank, said


@pytest.mark.parametrize(
    ("error", "code", "is_retryable"),
    [
        (KeyError("r"), "request_failed", False),
        (RecursionError("maximum recursion depth exceeded"), "request_failed", False),
        (Overloaded("9 wait; the limit is 9", code="queue_full"), "queue_full", True),
    ],
)
def test_a_request_that_cannot_be_taken_is_answered(error: Exception, code: str, is_retryable: bool) -> None:
    rank, said = rank_of(error)
    rank._submit(Submit("r", (1, 2), 3, Sampling(seed=1)), PEER, 0.0)
    ((peer, answer),) = said.said
    assert isinstance(answer, Failed)
    assert (peer, answer.request_id, answer.code, answer.retryable) == (PEER, "r", code, is_retryable)
    assert "recursion" not in answer.message


def test_a_question_that_raises_is_refused() -> None:
    rank, _ = rank_of(KeyError("row"))
    answer = rank._answer(Received(0, "scaler:1", 7, GetRankIntegrity()), 0.0)
    assert isinstance(answer, Refused)
    assert (answer.code, answer.retryable) == ("request_failed", False)


def test_want_of_memory_is_the_ranks_own() -> None:
    rank, _ = rank_of(MemoryError())
    with pytest.raises(MemoryError):
        rank._submit(Submit("r", (1, 2), 3, Sampling(seed=1)), PEER, 0.0)


@pytest.mark.parametrize(
    ("fields", "output", "name"),
    [
        ({"prompt": (1, 300)}, (), "prompt"),
        ({}, (5, 300), "output"),
        ({"stop_token_ids": (300,)}, (), "stop_token_ids"),
        ({"sampling": Sampling(seed=1, logit_bias=((2, 1.0), (300, 1.0)))}, (), "logit_bias"),
    ],
)
def test_ids_beyond_the_vocabulary_come_no_further(fields: dict[str, Any], output: tuple[int, ...], name: str) -> None:
    request = Submit(**{"request_id": "r", "prompt": (1,), "max_tokens": 3, "sampling": Sampling(seed=1)} | fields)
    with pytest.raises(ElasticMoEError, match=f"{name} has token id 300; the vocabulary has 300") as caught:
        check_ids(request, output, 300)
    assert caught.value.code == "token_out_of_range"
    check_ids(request, output, 301)


def test_a_rank_that_waits_for_others_hears_of_an_hmm_that_has_lost_the_memory() -> None:
    """Those it waits for have heard it before, and have ended: nobody else could tell it."""
    rank: Any = Rank.__new__(Rank)
    plan = SimpleNamespace(num_said=1, is_alone=False, puts_off=False)
    num_meetings = 0

    def meet(*_: object, **__: object) -> None:
        nonlocal num_meetings
        num_meetings += 1

    def look(*_: object) -> list[Message]:
        raise ElasticMoEError("the HMM has lost the memory that this rank has mapped", code="memory_replaced")

    rank._plan, rank._look_at, rank._is_handing = plan, 0.0, False
    rank._lockstep = SimpleNamespace(meet=meet)
    rank._server = SimpleNamespace(poll=lambda _: set())
    rank._seat, rank._memory = SimpleNamespace(slot=0), SimpleNamespace(doorbells={0: 7})
    rank._hmm = SimpleNamespace(look=lambda *_: [])
    assert rank.turn(1.0) == 0
    assert (num_meetings, rank._plan) == (1, plan), "nobody has come"
    rank._hmm = SimpleNamespace(look=look)
    with pytest.raises(ElasticMoEError) as caught:
        rank.turn(2.0)
    assert caught.value.code == "memory_replaced"
