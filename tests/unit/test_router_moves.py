"""The dispatcher when streams move between ranks, and when ranks leave the layout and come back."""

from __future__ import annotations

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.router import MayMove, Moved
from elasticmoe.services.router.dispatch.balancer import LOST_S
from elasticmoe.services.router.dispatch.dispatcher import GONE_S, LEAVE_S
from elasticmoe.services.router.dispatch.links import ADOPT_S, EMPTY_S
from tests.history import check_history
from tests.unit.test_router_dispatcher import Bench, bench, reason

__all__ = ["bench"]  # the fixture


# ---- moves -----------------------------------------------------------------------------------------------------------


async def test_a_stream_whose_rank_says_that_it_moved(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    bench.tokens(0, stream, 0, b"ab")
    bench.moved(0, stream, 1)
    assert (stream.rank, stream.sender) == (RankId(1, 0), "rank-r1t0:first")
    for _ in range(11):  # the old rank dies, which concerns the stream no more
        bench.pass_time(1.0)
        bench.status(1)
    assert (reason(stream), stream.num_submits) == ("running", 1)
    bench.tokens(1, stream, 2, b"c")
    bench.dispatcher.cancel(stream)
    assert bench.said(1)[-1] == "Cancel"
    assert "Cancel" not in bench.said(0)
    assert bench.metrics.registry.get_sample_value("elasticmoe:moved_requests_total", {"model_name": "m"}) == 1


@pytest.mark.parametrize("ended", ["it speaks", "it is silent", "another one speaks"])
async def test_a_stream_that_moves_to_a_rank_whose_predecessor_was_known(bench: Bench, ended: str) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, sender="rank-r1t0:left")  # it leaves, and a rank of the same name joins later
    stream = bench.open()
    bench.tokens(0, stream, 0, b"ab")
    bench.pass_time(EMPTY_S + 1.0)
    bench.status(0, running=1)
    bench.moved(0, stream, 1, incarnation="rank-r1t0:joined")  # before the router has heard of it
    bench.pass_time(0.1)
    assert stream.num_submits == 1
    if ended == "another one speaks":
        bench.status(1, sender="rank-r1t0:third")
        bench.pass_time(EMPTY_S + 0.1)
        assert stream.num_submits == 2
        return
    if ended == "it is silent":
        bench.pass_time(LOST_S - EMPTY_S - 1.2)
        bench.status(0, running=1)
        assert stream.num_submits == 1
        bench.pass_time(0.2)
        assert stream.num_submits == 2
        return
    bench.status(1, sender="rank-r1t0:joined")
    bench.pass_time(EMPTY_S + 1.0)
    bench.tokens(1, stream, 2, b"c", "stop", sender="rank-r1t0:joined")
    assert (reason(stream), stream.take().text, stream.num_submits) == ("stop", "abc", 1)


async def test_who_is_silent_after_the_layout_went_on_without_it_is_lost_soon(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    bench.tokens(0, stream, 0, b"ab")
    bench.pass_time(GONE_S + 3.0)
    assert stream.num_submits == 1  # a member may take longer: its seat is filled again
    bench.layout(1, epoch=2)
    bench.status(1)
    bench.pass_time(GONE_S - 0.1)
    bench.status(1)
    assert stream.num_submits == 1
    bench.pass_time(0.2)
    assert (stream.num_submits, stream.rank, stream.submit.output) == (2, RankId(1, 0), tuple(b"ab"))


async def test_tokens_before_and_after_the_news_of_a_move(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    bench.tokens(1, stream, 2, b"c")
    assert stream.rank == RankId(1, 0)
    bench.tokens(0, stream, 0, b"ab")  # late: it does not bring the stream back
    assert stream.rank == RankId(1, 0)
    assert bench.dispatcher.links[RankId(1, 0)].candidate(bench.now)
    bench.moved(0, stream, 1)
    bench.moved(1, stream, 1)
    bench.tokens(1, stream, 3, b"d", "stop")
    assert (reason(stream), stream.take().text) == ("stop", "abcd")
    bench.history.flush()
    assert check_history(bench.path, is_running=True).num_moves == 1


async def test_a_moved_stream_is_lost_with_its_new_rank(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    touched, fresh = bench.open("a"), bench.open("b")
    bench.tokens(0, touched, 0, b"x")
    for stream in (touched, fresh):
        bench.moved(0, stream, 1)
    for _ in range(11):
        bench.pass_time(1.0)
        bench.status(0)
    for stream in (touched, fresh):
        assert (reason(stream), stream.rank, stream.num_submits) == ("running", RankId(0, 0), 2)
    bench.tokens(0, fresh, 0, b"y", "stop")
    bench.tokens(0, touched, 1, b"y", "stop")
    assert touched.take().text == "xy"


async def test_a_stream_that_moved_to_a_process_that_has_died(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    bench.status(1, running=9, sender="rank-r1t0:second")
    bench.hear(0, Moved("r", RankId(1, 0), "rank-r1t0:first"))  # the news are older than the second's
    bench.pass_time(ADOPT_S + 0.1)
    assert stream.num_submits == 2


async def test_a_refusal_of_another_message_does_not_hit_a_moved_stream(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    seq = stream.seq
    bench.moved(0, stream, 1)
    bench.hear(1, Refused("version_mismatch", "no"), seq=seq)
    assert reason(stream) == "running"


async def test_a_rank_that_may_get_a_stream_is_connected_ahead(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    bench.open()
    bench.hear(0, MayMove("unknown", RankId(3, 0)))
    bench.hear(0, MayMove("r", RankId(4, 1)))  # leads no replica
    assert bench.replicas() == [0]
    bench.hear(0, MayMove("r", RankId(7, 0)))
    assert (bench.replicas(), bench.said(7)) == ([0, 7], ["Watch"])
    assert [candidate.rank for candidate in bench.dispatcher.candidates(bench.now)] == [RankId(0, 0)]
    bench.layout(0, 7, epoch=2)  # it joins
    bench.status(7)
    assert len(bench.dispatcher.candidates(bench.now)) == 2


async def test_a_rank_that_did_not_get_a_stream_is_forgotten(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    bench.open()
    bench.hear(0, MayMove("r", RankId(7, 0)))
    for _ in range(12):
        bench.pass_time(1.0)
        bench.status(0)
    assert bench.replicas() == [0]


async def test_a_move_to_a_rank_outside_the_layout(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    stream, waiting = bench.open("a"), bench.open("b")
    bench.tokens(0, stream, 0, b"ab")
    bench.moved(0, stream, 7)
    bench.moved(0, waiting, 7)
    assert bench.replicas() == [0, 7]
    assert bench.said(7) == ["Watch"]
    assert bench.dispatcher.candidates(bench.now)[0].rank == RankId(0, 0)
    # It speaks for the first time, and has not counted them yet.
    bench.status(7)
    bench.pass_time(ADOPT_S + 1.0)
    for _ in range(12):
        bench.pass_time(1.0)
        bench.status(0)
        bench.status(7, running=2)
    assert [reason(stream), reason(waiting), waiting.num_submits] == ["running", "running", 1]
    assert len(bench.dispatcher.candidates(bench.now)) == 1
    bench.tokens(7, stream, 2, b"c", "stop")
    bench.tokens(7, waiting, 0, b"d", "stop")
    bench.pass_time(0.1)
    assert bench.said(7)[-1] == "Unwatch"
    bench.pass_time(LEAVE_S + 0.1)
    assert bench.replicas() == [0]


async def test_the_rank_that_a_moved_stream_waits_for_never_speaks(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    stream = bench.open()
    bench.tokens(0, stream, 0, b"ab")
    bench.moved(0, stream, 7)
    for _ in range(10):
        bench.pass_time(1.0)
    assert reason(stream) == "running"
    bench.pass_time(0.5)
    assert reason(stream) == "rank_lost"


async def test_a_stream_that_ended_before_its_move_was_known(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream, other = bench.open("a"), bench.open("b")
    for ended in (stream, other):
        bench.dispatcher.cancel(ended)
    bench.moved(0, stream, 1)
    bench.moved(0, other, 7)
    assert bench.said(1)[-1] == "Cancel"
    assert bench.said(7) == ["Watch", "Cancel"]
    bench.pass_time(0.1)
    assert bench.said(7)[-1] == "Unwatch"


async def test_a_move_to_nobody_is_nonsense(bench: Bench) -> None:
    bench.layout(0)
    bench.status(0)
    stream = bench.open()
    for to, tp in ((1, 1), (-1, 0)):
        bench.moved(0, stream, to, tp=tp)
    assert (stream.rank, bench.replicas()) == (RankId(0, 0), [0])
    bench.tokens(0, stream, 0, b"x", "stop")


# ---- leaving ---------------------------------------------------------------------------------------------------------


async def test_a_leaving_replica_gets_nothing_while_another_is_there(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0, is_leaving=True)
    bench.status(1, running=50)
    assert bench.open("a").rank == RankId(1, 0)
    bench.status(1, is_leaving=True)
    assert bench.dispatcher.readiness(bench.now)[0]
    assert bench.open("b").rank == RankId(0, 0)


async def test_a_rank_that_left_is_told_once_that_nothing_follows(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    bench.layout(1, epoch=2)
    bench.pass_time(0.1)
    assert "Unwatch" not in bench.said(0)  # it still has a stream
    bench.tokens(0, stream, 0, b"x", "stop")
    for _ in range(20):
        bench.pass_time(0.1)
    assert bench.said(0).count("Unwatch") == 1
    assert bench.said(0)[-1] == "Unwatch"
    bench.status(0)  # what it says does not make it wanted
    bench.status(0, sender="rank-r0t0:second")  # its successor has to be told too
    bench.pass_time(0.1)
    bench.pass_time(1.5)
    assert bench.said(0)[-1] == "Unwatch"
    assert bench.said(0).count("Unwatch") == 2
    bench.pass_time(LEAVE_S + 0.1)
    assert bench.replicas() == [1]


async def test_a_rank_that_comes_back_is_watched_again(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    bench.layout(1, epoch=2)
    bench.pass_time(0.1)
    bench.pass_time(3.0)
    assert bench.said(0)[-1] == "Unwatch"
    bench.status(1, running=9)
    bench.layout(0, 1, epoch=3)
    assert bench.said(0)[-1] == "Watch"
    assert bench.open("a").rank == RankId(1, 0)  # what is known of the other is old
    bench.status(0)
    assert bench.open("b").rank == RankId(0, 0)
    assert bench.said(0)[-2:] == ["Watch", "Submit"]


async def test_nothing_follows_unwatch_without_another_watch(bench: Bench) -> None:
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream, gone = bench.open("a"), bench.open("b")
    for one in (stream, gone):
        bench.moved(0, one, 1)
    bench.dispatcher.cancel(gone)
    bench.layout(1, epoch=2)
    bench.pass_time(0.1)
    assert bench.said(0)[-1] == "Unwatch"
    bench.moved(1, gone, 0)  # back to where nobody expects it
    assert bench.said(0)[-2:] == ["Watch", "Cancel"]
    bench.pass_time(0.1)
    assert bench.said(0)[-1] == "Unwatch"
    bench.pass_time(4.0)
    bench.moved(1, stream, 0)
    assert bench.said(0)[-1] == "Watch"
    bench.pass_time(GONE_S - 0.1)
    assert (stream.num_submits, bench.replicas()) == (1, [0, 1])
    bench.pass_time(0.2)
    assert (stream.num_submits, stream.rank) == (2, RankId(1, 0))
    bench.pass_time(LOST_S)
    assert reason(stream) != "running"
