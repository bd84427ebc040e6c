"""One generation: each token once and in order, and one end."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from elasticmoe.cli.models.byte_tokenizer import build_byte_tokenizer
from elasticmoe.common.protocol.errors import ProtocolError, Unavailable
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Delta, Logprob
from elasticmoe.services.router.dispatch.streams import Ending, Output, Stream
from elasticmoe.services.router.text.detokenizer import TextStream, TokenTable

TABLE = TokenTable(build_byte_tokenizer())


def make(*, stops: tuple[str, ...] = (), logprobs: int = -1, max_tokens: int = 100) -> Stream:
    submit = Submit("r", (1,), max_tokens, Sampling(seed=1, logprobs=logprobs))
    return Stream("r", submit, TextStream(TABLE, stops=stops), asyncio.Event(), now=0.0)


def delta(index: int, text: bytes, finish: str | None = None) -> Delta:
    return Delta("r", index, tuple(text), finish)


def text_of(stream: Stream) -> str:
    return stream.take().text


def test_in_order() -> None:
    stream = make()
    assert stream.accept(delta(0, b"ab"), 1.0) == tuple(b"ab")
    assert stream.wake.is_set()
    assert stream.accept(delta(2, b"c", "stop"), 1.0) == tuple(b"c")
    assert stream.ending == Ending("finish", "stop")
    assert text_of(stream) == "abc"
    assert stream.accept(delta(3, b"d"), 1.0) == ()


def test_how_far_tokens_reach() -> None:
    stream = make()
    assert stream.reach == 0
    stream.accept(delta(0, b"ab"), 1.0)
    stream.accept(delta(3, b"de"), 1.0)
    assert (stream.num_tokens, stream.reach) == (2, 5)
    stream.accept(delta(2, b"c"), 1.0)
    assert (stream.num_tokens, stream.reach) == (5, 5)


def test_what_is_known_is_dropped() -> None:
    stream = make()
    stream.accept(delta(0, b"abc"), 1.0)
    assert stream.accept(delta(0, b"abc"), 1.0) == ()
    assert stream.accept(delta(1, b"bcde"), 1.0) == tuple(b"de")
    assert stream.accept(delta(0, b"", "length"), 1.0) == ()
    assert stream.ending == Ending("finish", "length")
    assert (text_of(stream), stream.num_tokens) == ("abcde", 5)


def test_what_comes_early_waits() -> None:
    stream = make()
    assert stream.accept(delta(2, b"cd"), 5.0) == ()
    assert stream.accept(delta(4, b"e", "stop"), 6.0) == ()
    assert stream.gap_since == 5.0
    assert not stream.has_ended
    assert stream.accept(delta(0, b"ab"), 7.0) == tuple(b"abcde")
    assert stream.gap_since is None
    assert (text_of(stream), stream.ending) == ("abcde", Ending("finish", "stop"))


@pytest.mark.parametrize("seed", range(200))
def test_any_order_and_any_repetition(seed: int) -> None:
    rng = random.Random(seed)
    text = bytes(rng.choice(b"abcdef") for _ in range(rng.randrange(1, 30)))
    cuts = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(4))})
    parts = [
        delta(start, text[start:end], "stop" if end == len(text) else None) for start, end in itertools.pairwise(cuts)
    ]
    parts += rng.choices(parts, k=3)
    rng.shuffle(parts)
    stream = make()
    accepted: list[int] = []
    for part in parts:
        accepted += stream.accept(part, 1.0)
    assert bytes(accepted) == text
    assert text_of(stream) == text.decode()
    assert stream.ending == Ending("finish", "stop")


def test_a_stop_string_wins_over_what_follows_it() -> None:
    stream = make(stops=("cd",))
    assert stream.accept(delta(0, b"abcdef", "length"), 1.0) == tuple(b"abcd")
    assert stream.ending == Ending("finish", "stop")
    assert (text_of(stream), stream.num_tokens) == ("ab", 4)


def test_the_first_end_counts() -> None:
    stream = make()
    error = Ending("error", "rank_lost", Unavailable("x"))
    assert stream.end(error)
    assert not stream.end(Ending("cancelled", "cancelled"))
    assert stream.accept(delta(0, b"a", "stop"), 1.0) == ()
    assert stream.ending is error


def test_logprobs_stay_with_their_tokens() -> None:
    stream = make(logprobs=0)
    first, second = Logprob(-1.0, ()), Logprob(-2.0, ())
    stream.accept(Delta("r", 0, (0xC3,), None, None, (first,), (first,)), 1.0)
    stream.accept(Delta("r", 0, (0xC3, 0xA9, 65), None, None, (first, second, first)), 1.0)
    tokens = stream.take().tokens
    assert [(t.token_id, t.logprob, t.text_offset) for t in tokens] == [
        (0xC3, first, 0),
        (0xA9, second, 0),
        (65, first, 1),
    ]
    assert stream.prompt_logprobs == (first,)


def test_nonsense_is_refused_before_it_counts() -> None:
    for bad in (
        Delta("r", -1, (1,)),
        Delta("r", 0, (-1,)),
        Delta("r", 0, (1 << 30,)),
        Delta("r", 0, (1,), "because"),
        Delta("r", 0, (1, 2), None, None, (Logprob(0.0, ()),)),
    ):
        stream = make()
        with pytest.raises(ProtocolError):
            stream.accept(bad, 1.0)
        assert stream.num_tokens == 0
    stream = make()
    most = stream.submit.max_tokens
    for index in range(most + 1):
        for _ in range(2):  # a repetition counts once
            stream.accept(delta(index + 5, b"x"), 1.0)
    with pytest.raises(ProtocolError, match="before their predecessors"):
        stream.accept(delta(1_000_000, b"x"), 1.0)


def test_all_that_another_rank_computes_waits_for_the_last_tokens_of_the_one_before() -> None:
    stream = make(max_tokens=300)
    for index in range(1, 300):
        assert stream.accept(delta(index, b"x", "length" if index == 299 else None), 1.0) == ()
    assert stream.gap_since == 1.0
    assert len(stream.accept(delta(0, b"x"), 1.9)) == 300
    assert stream.ending is not None
    assert (stream.ending.reason, stream.gap_since) == ("length", None)


def test_a_stream_of_a_prompt_alone_ends_with_its_log_probabilities() -> None:
    submit = Submit("r", (1, 2), 1, Sampling(seed=1, logprobs=0), prompt_logprobs=True)
    stream = Stream("r", submit, TextStream(TABLE), asyncio.Event(), now=0.0, is_prompt_only=True)
    known = (Logprob(-0.5, ()),)
    assert stream.lacks(Delta("r", 0, (97,), "length", None, known))
    assert stream.accept(Delta("r", 0, (97,), "length", None, known), 1.0) == ()
    assert not stream.has_ended  # a rank that had it in the meantime does not know them
    assert stream.accept(Delta("r", 0, (97,), "stop", None, known, known), 1.0) == ()
    assert stream.ending == Ending("finish", "length")
    assert (stream.take(), stream.num_tokens, stream.prompt_logprobs) == (Output("", []), 0, known)
