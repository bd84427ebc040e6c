"""The dispatcher with real sockets and a clock of the test's own: losses, replacements, moves, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from elasticmoe.cli.models.byte_tokenizer import build_byte_tokenizer
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.router import (
    Delta,
    Failed,
    Logprob,
    Moved,
    RankStatus,
    Suspected,
    Suspicion,
    Tokens,
    ToRouter,
)
from elasticmoe.common.transport import AsyncClient, Sockets
from elasticmoe.services.router.dispatch.balancer import LOST_S
from elasticmoe.services.router.dispatch.dispatcher import (
    GAP_S,
    LEAVE_S,
    LOSSES_MAX,
    SUBMITS_MAX,
    Dispatcher,
)
from elasticmoe.services.router.dispatch.links import ADOPT_S, EMPTY_S
from elasticmoe.services.router.dispatch.streams import Stream
from elasticmoe.services.router.history import History
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.router.text.detokenizer import TextStream, TokenTable
from tests.history import check_history
from tests.procs.router_fakes import layout_of

TABLE = TokenTable(build_byte_tokenizer())


class Bench:
    """A dispatcher whose ranks are the test: what they say is handed in directly."""

    def __init__(self, directory: Path) -> None:
        self.now = 1_000.0
        self.path = directory / "history.jsonl"
        self.history = History(self.path, "router:1")
        self.metrics = Metrics("m")
        sockets = Sockets(lambda name: directory / f"{name}.sock")
        self.dispatcher = Dispatcher(sockets, self.metrics, self.history, "router:1")

    def layout(self, *replicas: int, epoch: int = 1) -> None:
        self.dispatcher.apply_layout(layout_of(*replicas, epoch=epoch), self.now)

    def hear(self, replica: int, body: ToRouter, *, sender: str = "", seq: int = 0) -> None:
        sender = sender or f"rank-r{replica}t0:first"
        link = self.dispatcher.links[RankId(replica, 0)]
        self.dispatcher._inbox.take(link, Received(0, sender, seq, body), self.now)

    def status(
        self, replica: int, *, running: int = 0, sender: str = "", length: int = 100, is_leaving: bool = False
    ) -> None:
        body = RankStatus(
            rank=RankId(replica, 0),
            incarnation=sender,
            progress=int(self.now * 10),
            running=running,
            waiting=0,
            tokens_queued=0,
            blocks_free=50,
            blocks_total=100,
            max_model_len=length,
            is_leaving=is_leaving,
        )
        self.hear(replica, body, sender=sender)

    def moved(self, replica: int, stream: Stream, to: int, *, tp: int = 0, incarnation: str = "") -> None:
        self.hear(replica, Moved(stream.submit.request_id, RankId(to, tp), incarnation))

    def tokens(
        self, replica: int, stream: Stream, index: int, text: bytes, finish: str | None = None, *, sender: str = ""
    ) -> None:
        self.hear(replica, Tokens((Delta(stream.submit.request_id, index, tuple(text), finish),)), sender=sender)

    def open(self, name: str = "r", deadline_s: float = 600.0) -> Stream:
        submit = Submit(name, (1, 2), 100, Sampling(seed=1), deadline_s=deadline_s)
        stream = Stream(name, submit, TextStream(TABLE), asyncio.Event(), now=self.now)
        self.dispatcher.open(stream, self.now)
        return stream

    def pass_time(self, seconds: float) -> None:
        """With turns each half second, as the pace has it at least."""
        end = self.now + seconds
        while self.now < end - 0.5:
            self.stand_still(0.5)
        self.stand_still(end - self.now)

    def stand_still(self, seconds: float) -> None:
        """There is one turn, after that time."""
        self.now += seconds
        self.dispatcher.turn(self.now)

    def sent(self, replica: int) -> list[Message]:
        """What has been said to a rank."""
        return self.dispatcher.links[RankId(replica, 0)]._client.said  # type: ignore[attr-defined, no-any-return]

    def said(self, replica: int) -> list[str]:
        """What has been said to a rank: the kinds of messages."""
        return [type(body).__name__ for body in self.sent(replica)]

    def replicas(self) -> list[int]:
        """Those that it has links to."""
        return sorted(rank.replica for rank in self.dispatcher.links)


@pytest_asyncio.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    def send(self: AsyncClient[ToRouter], body: Message) -> int:
        said = self.__dict__.setdefault("said", [])
        said.append(body)
        return len(said)

    monkeypatch.setattr(AsyncClient, "send", send)
    bench = Bench(tmp_path)
    yield bench
    bench.dispatcher.close()
    bench.history.close()
    check_history(bench.path)


def reason(stream: Stream) -> str:
    return stream.ending.reason if stream.ending else "running"


async def test_nothing_is_accepted_before_a_rank_has_reported(bench: Bench) -> None:
    with pytest.raises(Unavailable):
        bench.open()
    bench.layout(0)
    with pytest.raises(Unavailable):
        bench.dispatcher.max_model_len()
    with pytest.raises(Unavailable):
        bench.open()
    bench.status(0)
    bench.open()
    assert bench.dispatcher.max_model_len() == 100


async def test_a_silent_rank_is_asked_and_then_given_up(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    touched, fresh = bench.open("a"), bench.open("b")
    bench.tokens(0, touched, 0, b"x")
    asked = len(bench.sent(0))
    for _ in range(10):
        bench.pass_time(0.1)
    assert asked + 3 <= len(bench.sent(0)) <= asked + 4
    bench.pass_time(LOST_S - 1.4)
    assert (reason(touched), reason(fresh)) == ("running", "running")
    bench.pass_time(1.0)
    assert (reason(touched), reason(fresh)) == ("rank_lost", "rank_lost")
    assert touched.ending
    assert touched.ending.error
    assert touched.ending.error.retryable


async def test_an_untouched_stream_goes_to_another_replica(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=5)
    stream = bench.open()
    assert stream.rank == RankId(0, 0)
    for _ in range(11):
        bench.pass_time(1.0)
        bench.status(1)
    assert (stream.rank, stream.submit.request_id, stream.num_submits) == (RankId(1, 0), "r~1", 2)
    assert stream.submit.deadline_s == pytest.approx(589.0, abs=1.5)
    bench.hear(0, Tokens((Delta("r", 0, (65,)),)))  # the first try comes back: told to stop, not listened to
    assert stream.num_tokens == 0
    bench.tokens(1, stream, 0, b"ok", "stop")
    assert (reason(stream), stream.take().text) == ("stop", "ok")


async def test_a_replacement_without_requests(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    touched, fresh = bench.open("a"), bench.open("b")
    bench.tokens(0, touched, 0, b"x")
    bench.status(0, sender="rank-r0t0:second")
    bench.pass_time(EMPTY_S + 0.01)
    for stream in (touched, fresh):
        assert (reason(stream), stream.num_submits, stream.sender) == ("running", 2, "rank-r0t0:second")
    assert (touched.submit.request_id, touched.submit.output) == ("a~1", (ord("x"),))
    assert (fresh.submit.request_id, fresh.submit.output) == ("b~1", ())
    bench.tokens(0, touched, 1, b"yz", "stop", sender="rank-r0t0:second")
    assert (reason(touched), touched.take().text) == ("stop", "xyz")


async def test_a_replacement_that_goes_on(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    one, other = bench.open("a"), bench.open("b")
    for stream in (one, other):
        bench.tokens(0, stream, 0, b"abc")
    bench.tokens(0, one, 0, b"abcd", sender="rank-r0t0:second")  # it names those that it goes on with first of all
    bench.tokens(0, other, 0, b"ab", sender="rank-r0t0:second")
    bench.status(0, running=2, sender="rank-r0t0:second")
    for _ in range(5):
        bench.pass_time(1.0)
        bench.status(0, running=2, sender="rank-r0t0:second")
    bench.tokens(0, one, 4, b"e", "stop", sender="rank-r0t0:second")
    assert (reason(one), one.take().text) == ("stop", "abcde")
    assert (reason(other), other.num_submits, other.sender) == ("running", 1, "rank-r0t0:second")


async def test_a_replacement_that_does_not_go_on_with_all(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    one, other, fresh = bench.open("a"), bench.open("b"), bench.open("c")
    for stream in (one, other):
        bench.tokens(0, stream, 0, b"abc")
    bench.tokens(0, one, 0, b"abc", sender="rank-r0t0:second")
    bench.status(0, running=1, sender="rank-r0t0:second")
    bench.pass_time(EMPTY_S + 0.1)
    assert [stream.num_submits for stream in (one, other, fresh)] == [1, 2, 1]
    assert other.submit.output == tuple(b"abc")
    bench.pass_time(ADOPT_S)  # the fresh one might wait there, submitted when nobody was there
    assert [stream.num_submits for stream in (one, other, fresh)] == [1, 2, 2]


async def test_a_stream_that_is_lost_again_and_again_ends(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    stream = bench.open()
    for turn in range(LOSSES_MAX + 1):
        assert (reason(stream), stream.num_submits) == ("running", turn + 1)
        bench.status(0, sender=f"rank-r0t0:{turn + 1}")
        bench.pass_time(EMPTY_S + 0.1)
    assert (reason(stream), stream.num_tokens) == ("rank_lost", 0)


async def test_a_stream_that_gets_on_is_not_counted_out(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    stream = bench.open()
    for turn in range(2 * LOSSES_MAX):
        assert (reason(stream), stream.num_submits) == ("running", turn + 1)
        bench.tokens(0, stream, turn, b"x", sender=f"rank-r0t0:{turn}" if turn else "")
        bench.status(0, sender=f"rank-r0t0:{turn + 1}")
        bench.pass_time(EMPTY_S + 0.1)
    assert (reason(stream), stream.num_tokens) == ("running", 2 * LOSSES_MAX)


async def test_a_request_that_a_rank_has_found_guilty_ends(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1)
    stream = bench.open()
    bench.hear(0, Failed("r", "request_failed", "2 times in a row", False))
    assert (reason(stream), stream.num_submits) == ("request_failed", 1)


async def test_what_ranks_know_against_a_request_goes_with_it(bench: Bench) -> None:
    """A rank that goes on with a stream lacks its log probabilities: it is submitted anew, but not as if it was new."""
    bench.layout(0)
    bench.status(0)
    submit = Submit("r", (1, 2), 100, Sampling(seed=1, logprobs=0))
    stream = Stream("r", submit, TextStream(TABLE), asyncio.Event(), now=bench.now)
    bench.dispatcher.open(stream, bench.now)

    def submits() -> list[Submit]:
        return [body for body in bench.sent(0) if isinstance(body, Submit)]

    bench.hear(0, Suspected("r", Suspicion(3, 1, 3)), sender="rank-r0t0:1")
    bench.hear(0, Suspected("another", Suspicion(9, 9, 9)), sender="rank-r0t0:1")
    bench.hear(0, Tokens((Delta("r", 0, (65,)),)), sender="rank-r0t0:1")
    again = submits()[-1]
    assert (again.request_id, again.suspicion, again.output) == ("r~1", Suspicion(3, 1, 3), ())
    news = Logprob(-1.0, ())
    for index in (0, 1):
        bench.hear(0, Tokens((Delta("r~1", index, (65,), None, None, (news,)),)), sender="rank-r0t0:1")
    bench.hear(0, Tokens((Delta("r~1", 0, (65, 65, 65)),)), sender="rank-r0t0:2")
    again = submits()[-1]  # it has got beyond that
    assert (again.request_id, again.suspicion, again.output) == ("r~2", None, (65, 65))


async def test_lost_log_probabilities_are_computed_again(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    submit = Submit("r", (1, 2), 100, Sampling(seed=1, logprobs=0), prompt_logprobs=True)
    stream = Stream("r", submit, TextStream(TABLE), asyncio.Event(), now=bench.now)
    bench.dispatcher.open(stream, bench.now)
    one, two = Logprob(-1.0, ()), Logprob(-2.0, ())
    bench.hear(0, Tokens((Delta("r", 0, (65,), None, None, (one,), (two,)),)))
    bench.hear(0, Tokens((Delta("r", 0, (65,)),)), sender="rank-r0t0:second")  # what is known need not have any
    assert stream.num_submits == 1
    bench.hear(0, Tokens((Delta("r", 0, (65, 66)),)), sender="rank-r0t0:third")
    assert (stream.num_submits, stream.submit.output) == (2, (65,))
    bench.hear(0, Tokens((Delta("r~1", 1, (66,), "length", None, (two,)),)), sender="rank-r0t0:third")
    assert [info.logprob for info in stream.take().tokens] == [one, two]
    assert (reason(stream), stream.prompt_logprobs) == ("length", (two,))


async def test_lost_log_probabilities_of_a_prompt(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    submit = Submit("r", (1, 2), 100, Sampling(seed=1), prompt_logprobs=True)
    stream = Stream("r", submit, TextStream(TABLE), asyncio.Event(), now=bench.now)
    bench.dispatcher.open(stream, bench.now)
    bench.hear(0, Tokens((Delta("r", 0, ()),)), sender="rank-r0t0:second")  # it lives
    assert stream.num_submits == 1
    bench.hear(0, Tokens((Delta("r", 0, (65,)),)), sender="rank-r0t0:third")
    assert (stream.num_submits, stream.submit.output) == (2, ())


async def test_a_stream_that_moves(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    bench.tokens(0, stream, 0, b"ab")
    bench.tokens(1, stream, 3, b"d")  # overtakes the old home's last one
    assert stream.rank == RankId(1, 0)
    bench.tokens(0, stream, 2, b"c")
    bench.tokens(1, stream, 4, b"e")
    assert stream.take().text == "abcde"
    bench.layout(1, epoch=2)
    bench.status(1)
    bench.pass_time(LEAVE_S + 0.1)
    assert list(bench.dispatcher.links) == [RankId(1, 0)]
    bench.dispatcher.cancel(stream)
    assert type(bench.sent(1)[-1]).__name__ == "Cancel"


async def test_missing_tokens_are_not_waited_for_for_ever(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    stream = bench.open()
    bench.tokens(0, stream, 5, b"late", "stop")
    bench.pass_time(GAP_S + 0.1)
    assert (reason(stream), stream.num_submits) == ("running", 2)
    bench.tokens(0, stream, 0, b"early", "stop")
    assert (reason(stream), stream.take().text) == ("stop", "early")


async def test_failures_and_refusals(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    failed, refused = bench.open("a"), bench.open("b")
    bench.hear(0, Failed("a", "invalid_request", "no", False))
    bench.hear(0, Refused("version_mismatch", "no"), seq=refused.seq)
    assert (reason(failed), reason(refused)) == ("invalid_request", "version_mismatch")
    bench.hear(0, Failed("a", "again", "no", False))
    touched = bench.open("c")
    bench.tokens(0, touched, 0, b"x")
    bench.hear(0, Failed("c", "shutting_down", "x", True))
    assert reason(touched) == "shutting_down"


async def test_retries_are_bounded(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1)
    stream = bench.open()
    for _ in range(SUBMITS_MAX):
        assert reason(stream) == "running"
        assert stream.rank is not None
        bench.hear(stream.rank.replica, Failed(stream.submit.request_id, "queue_full", "full", True))
    assert reason(stream) == "queue_full"


async def test_the_deadline(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    stream = bench.open(deadline_s=3.0)
    bench.tokens(0, stream, 0, b"x")
    bench.pass_time(2.9)
    assert reason(stream) == "running"
    bench.pass_time(0.2)
    assert reason(stream) == "deadline_exceeded"


async def test_a_burst_is_spread_before_any_status(bench: Bench) -> None:
    bench.layout(0, 1, 2)
    for replica in range(3):
        bench.status(replica)
    streams = [bench.open(str(index)) for index in range(9)]
    ranks = [stream.rank.replica for stream in streams if stream.rank]
    assert sorted(ranks) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


async def test_layouts(bench: Bench) -> None:
    bench.layout(0, 1, epoch=5)
    bench.layout(0, epoch=4)  # older
    assert len(bench.dispatcher.links) == 2
    bench.layout(1, epoch=6)
    bench.status(0)
    bench.status(1)
    assert bench.open().rank == RankId(1, 0)
    bench.layout(0, 1, epoch=7)
    bench.pass_time(LEAVE_S + 1)
    assert len(bench.dispatcher.links) == 2
    ready, why = bench.dispatcher.readiness(bench.now)
    assert ready, why


async def test_a_handler_that_fails_does_not_end_the_link(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.layout(0)
    link = bench.dispatcher.links[RankId(0, 0)]
    heard: list[Received[ToRouter]] = []

    async def receive() -> Received[ToRouter]:
        if len(heard) == 3:
            raise asyncio.CancelledError
        return Received(0, "x", 0, Tokens(()))

    def take(_: object, received: Received[ToRouter], __: float) -> None:
        heard.append(received)
        raise RuntimeError("bug")

    monkeypatch.setattr(link._client, "receive", receive)
    monkeypatch.setattr(bench.dispatcher._inbox, "take", take)
    with pytest.raises(asyncio.CancelledError):
        await bench.dispatcher._inbox.listen(link, link._client)
    assert len(heard) == 3


async def test_one_stream_that_fails_leaves_the_others_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.layout(0)
    bench.status(0)
    broken, other = bench.open("a"), bench.open("b")
    monkeypatch.setattr(broken, "accept", lambda *_: 1 // 0)
    bench.hear(0, Tokens((Delta("a", 0, (65,)), Delta("b", 0, (65,), "stop"))))
    assert (reason(broken), reason(other)) == ("internal_error", "stop")


async def test_unknown_streams_are_cancelled_at_the_rank(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    before = len(bench.sent(0))
    bench.hear(0, Tokens((Delta("ghost", 0, (65,)), Delta("ended", 0, (65,), "stop"))))
    assert [type(body).__name__ for body in bench.sent(0)[before:]] == ["Cancel"]


async def test_the_verdict_on_an_earlier_try_ends_a_request(bench: Bench) -> None:
    """Its rank's next process went on with a row that the router had given up: what it found out is true of the request
    wherever it is tried. Nothing else that is said of that try counts any more."""
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1)
    submit = Submit("r", (1, 2), 100, Sampling(seed=1, logprobs=0))
    stream, other = Stream("r", submit, TextStream(TABLE), asyncio.Event(), now=bench.now), bench.open("r2")
    bench.dispatcher.open(stream, bench.now)
    assert stream.rank is not None
    bench.hear(stream.rank.replica, Tokens((Delta("r", 0, (65,)),)), sender="rank-r0t0:1")
    bench.hear(0, Failed("r", "queue_full", "full", True))
    assert (stream.submit.request_id, stream.has_ended) == ("r~1", False)
    bench.hear(0, Failed("r", "request_failed", "2 times in a row", False))
    assert (reason(stream), other.has_ended) == ("request_failed", False)
    bench.hear(0, Failed("r2~1", "request_failed", "2 times in a row", False))  # of no try of any
    assert not other.has_ended
