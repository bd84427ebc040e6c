"""Which files a request passes and its token on the way back, from the router's gate to the event that the client
reads: as docs/architecture.md says, and none twice.

All of it runs here: the router's application, a rank with its engine and model. Stand-ins: the connection between
them, the rank's memory and its HMM.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import RouterConfig
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.handles import Routing
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.services.router.api.app import build_app
from elasticmoe.services.router.api.chat import chat_completions
from elasticmoe.services.router.api.chat_renderer import ChatRenderer
from elasticmoe.services.router.api.front import make_front
from elasticmoe.services.router.api.gate import Gate
from elasticmoe.services.router.api.generate import start
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.dispatch.dispatcher import Dispatcher
from elasticmoe.services.router.dispatch.inbox import Inbox
from elasticmoe.services.router.dispatch.links import RankLink
from elasticmoe.services.router.dispatch.streams import Stream
from elasticmoe.services.router.history import History
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.router.text.codec import TextCodec
from elasticmoe.services.router.text.detokenizer import TextStream
from elasticmoe.services.router.text.texts import Texts
from elasticmoe.services.router.text.tokenizer import ServedModel
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.sampler import sample
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.exchange.shm_barrier import ShmBarrier
from elasticmoe.services.worker.model.oracle import OracleModel
from elasticmoe.services.worker.rank.parts import SeatParts
from elasticmoe.services.worker.rank.rank import Rank
from elasticmoe.services.worker.rank.reports import Reports
from tests.procs.router_fakes import layout_of
from tests.unit.in_process import InProcess
from tests.unit.migration_world import make_engine
from tests.unit.ranks import Ranks
from tests.unit.ways import Trace, hands_of, said

SEAT = StartRank(RankId(0, 0), 0, "host:0", "rank-r0t0:01", 1, 16, 4, 100)
ROUTER = "router:1"

# Functions that are given the request, or what was made of it: a sequence, a chunk of a step, a token.
IN = hands_of(
    let_in=Gate.__call__,
    take=chat_completions,
    parse=parse,
    encode=Texts.encode_chat,
    tokenize=TextCodec.perform,
    start=start,
    open=Dispatcher.open,
    submit=RankLink.send,
    accept=Engine.add,
    queue=Scheduler.add,
)
STEP = hands_of(schedule=Scheduler.plan, compute=Engine.compute, forward=OracleModel.forward)
OUT = hands_of(
    sample=sample,
    commit=Engine.commit,
    report=Reports.tell,
    hear=Inbox.take,
    count=Stream.accept,
    decode=TextStream.feed,
    read=Stream.take,
    render=ChatRenderer.events,
)
HANDS = IN | STEP | OUT


class Wire:
    """The router's connection to the rank, and the rank's to the router: ends of transports."""

    num_bad = 0

    def __init__(self) -> None:
        self.to_rank: deque[Message] = deque()
        self.to_router: asyncio.Queue[Message] = asyncio.Queue()

    def send(self, *told: Any, **_: int) -> Any:
        """A router's, of a message; a rank's, to a peer."""
        if len(told) == 2:
            self.to_router.put_nowait(told[1])
            return True
        self.to_rank.append(told[0])
        return 1

    async def receive_later(self) -> Received[Any]:
        return Received(0, SEAT.incarnation, 1, await self.to_router.get())

    def receive_now(self) -> tuple[bytes, Received[Any]] | None:
        return (ROUTER.encode(), Received(0, ROUTER, 1, self.to_rank.popleft())) if self.to_rank else None

    def transport(self) -> Any:
        """The router's and the rank's."""
        silent = SimpleNamespace(push=lambda _: True, close=lambda: None)
        client = SimpleNamespace(send=self.send, receive=self.receive_later, num_bad=0, close=lambda: None)
        return SimpleNamespace(connect_async=lambda *_: client, connect_push=lambda *_: silent)

    def server(self) -> Any:
        """The rank's."""
        return SimpleNamespace(
            send=self.send,
            receive=self.receive_now,
            poll=lambda _: set(),
            watch=lambda _: None,
            unwatch=lambda _: None,
            close=lambda: None,
        )


@pytest.fixture
def rank(ranks: Ranks) -> Iterator[tuple[Rank, Wire]]:
    """One that has started, alone in its generation."""
    wire, bell = Wire(), os.eventfd(0, os.EFD_NONBLOCK)
    engine = make_engine(ranks)
    owners = tuple(tuple(ranks.layout.owners(layer)) for layer in range(ranks.spec.num_layers))
    bus = ranks.exchanges[0]._bus
    memory: Any = SimpleNamespace(
        spec=ranks.spec,
        ledger=engine.ledger,
        routings={0: Routing(0, owners)},
        doorbells={0: bell},
        is_changing=False,
        close=lambda: None,
    )
    hmm: Any = SimpleNamespace(applied=lambda _: None, look=lambda *_: (), close=lambda: None, is_connected=True)
    parts = SeatParts(
        seat=SEAT,
        clock=SYSTEM_CLOCK,
        transport=wire.transport(),
        server=wire.server(),
        hmm=hmm,
        fence=SimpleNamespace(),  # type: ignore[arg-type]
        memory=memory,
        revision=1,
        barrier=ShmBarrier(bus, memory.doorbells, 0),
        exchange=ranks.exchanges[0],
        attach_ms=0.0,
        build_ms=0.0,
        computes_by="",
        use_cores=lambda _: None,
    )
    with Rank(parts, engine, lambda _: None) as rank:
        rank.start(SYSTEM_CLOCK.monotonic())
        yield rank, wire
    os.close(bell)


async def drive(rank: Rank, wire: Wire) -> None:
    """A turn for each message."""
    while True:
        if wire.to_rank:
            rank.turn(SYSTEM_CLOCK.monotonic())
        await asyncio.sleep(0)


async def ask(rank: Rank, wire: Wire, directory: Path, folder: Path, trace: Trace) -> httpx.Response:
    """A chat of one token, streamed."""
    now = SYSTEM_CLOCK.monotonic
    config = RouterConfig(run_dir=str(folder), model=str(directory), served_name="m")
    metrics, model = Metrics("m"), ServedModel(directory, "m")
    dispatcher = Dispatcher(wire.transport(), metrics, History(None, ROUTER), ROUTER)
    front = make_front(config, model, InProcess(model.codec), dispatcher, metrics, None)
    dispatcher.apply_layout(layout_of(0), now())
    driver = asyncio.create_task(drive(rank, wire))
    while not dispatcher.readiness(now())[0]:
        await asyncio.sleep(0)
    transport = httpx.ASGITransport(app=build_app(front))  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stream": True}
            with trace.follow():
                return await client.post("/v1/chat/completions", json=body)
    finally:
        driver.cancel()
        dispatcher.close()


def test_a_request_passes_the_files_that_the_page_names_and_none_twice(
    rank: tuple[Rank, Wire], directory: Path, tmp_path: Path
) -> None:
    trace = Trace(HANDS)
    answer = asyncio.run(ask(*rank, directory, tmp_path, trace))
    assert answer.status_code == 200, answer.text
    assert '"finish_reason":"length"' in answer.text
    assert not trace.returns
    assert set(trace.hands) == set(HANDS.values())
    assert trace.files == [*said("a request"), *said("a token")]
