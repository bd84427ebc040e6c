"""What a router tells of its load, from a real dispatcher whose ranks are the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.limits import WINDOW_SECONDS_MAX
from elasticmoe.common.protocol.signals import RouterWindow
from elasticmoe.common.sketch import index
from elasticmoe.common.transport import AsyncClient
from elasticmoe.services.router.dispatch.streams import Ending
from elasticmoe.services.router.dispatch.windows import IDLE_SPAN_S, SPAN_S, RouterWindows
from tests.unit.test_router_dispatcher import Bench
from tests.unit.windows import Pushed


class LoadedBench(Bench):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.dispatcher.windows.close()
        self.pushed = Pushed()
        self.dispatcher.windows = RouterWindows("router:1", lambda: self.pushed)
        self.layout(0, epoch=5)
        self.status(0)
        self.pass_time(0.0)

    def window(self, seconds: float = SPAN_S) -> RouterWindow:
        """The one window that so much time brings."""
        before = len(self.pushed.windows)
        self.stand_still(seconds)
        (found,) = self.pushed.windows[before:]
        assert isinstance(found, RouterWindow)
        return found


@pytest_asyncio.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LoadedBench]:
    monkeypatch.setattr(AsyncClient, "send", lambda *_: 1)
    bench = LoadedBench(tmp_path)
    yield bench
    bench.dispatcher.close()
    bench.history.close()


async def test_demand_counts_when_it_comes_and_latency_when_it_is_felt(bench: LoadedBench) -> None:
    first = bench.open("a")
    bench.pass_time(0.3)
    second = bench.open("b")
    bench.tokens(0, first, 0, b"x")
    bench.pass_time(0.2)
    bench.tokens(0, first, 1, b"y")
    window = bench.window(0.5)
    assert (window.router, window.number, window.epoch) == ("router:1", 1, 5)
    assert (window.admitted, window.prompt_tokens, window.max_tokens) == (2, 4, 200)
    assert (window.open, window.queued, window.oldest_queued_s) == (2, 1, pytest.approx(0.7))
    assert window.ttft == ((index(0.3), 1),)
    assert window.gaps == ((index(0.2), 1),)
    assert (window.finished, window.output_tokens, window.joint) == (0, 0, ())
    bench.tokens(0, second, 0, b"z", "stop")
    bench.tokens(0, first, 2, b"z", "length")
    window = bench.window()
    assert (window.number, window.admitted, window.open, window.queued, window.oldest_queued_s) == (2, 0, 0, 0, 0.0)
    assert (window.finished, window.output_tokens) == (2, 4)
    cells = {(index(0.3), index(0.35)): 1, (index(0.7), index(0.0)): 1}
    assert {(ttft, gap): count for ttft, gap, count in window.joint} == cells


async def test_ends_of_every_kind_are_told_apart(bench: LoadedBench) -> None:
    bench.dispatcher.cancel(bench.open("left"))
    bench.open("failed").end(Ending("error", "x", ElasticMoEError("x")))
    failed = bench.dispatcher.streams["failed"]
    bench.dispatcher.forget(failed, tell_rank=True)
    window = bench.window()
    assert (window.cancelled, window.failed, window.finished) == (1, 1, 0)


async def test_what_found_no_replica_is_demand_all_the_same(bench: LoadedBench) -> None:
    bench.dispatcher.links[RankId(0, 0)].status = None
    with pytest.raises(Unavailable):
        bench.open("nowhere")
    window = bench.window()
    assert (window.admitted, window.refused) == (0, 1)


async def test_a_router_without_work_says_that_it_lives_and_less_often(bench: LoadedBench) -> None:
    bench.pass_time(SPAN_S)
    assert bench.pushed.windows == []
    window = bench.window(IDLE_SPAN_S - SPAN_S)
    assert (window.open, window.admitted, window.span_s) == (0, 0, pytest.approx(IDLE_SPAN_S))


async def test_another_layout_ends_the_window(bench: LoadedBench) -> None:
    bench.open("a")
    bench.layout(0, epoch=6)
    assert bench.window(0.01).epoch == 5
    assert bench.window().epoch == 6


async def test_a_router_that_was_stopped_for_days_tells_no_more_than_may_be_told(bench: LoadedBench) -> None:
    assert bench.window(10 * WINDOW_SECONDS_MAX).span_s == WINDOW_SECONDS_MAX
