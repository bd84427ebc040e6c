"""The router: the product's dispatcher, links and streams with the network of the simulation, and its clients."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Generator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from elasticmoe.common.endpoints import PushEnd
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.services.router.dispatch.dispatcher import Dispatcher
from elasticmoe.services.router.dispatch.streams import Stream
from tests.history import Report, _apply
from tests.sim.engine import next_token
from tests.sim.heap import Actor, Push

if TYPE_CHECKING:
    from tests.sim.world import World

TICK_S = 0.2
SAMPLING = Sampling(seed=1, temperature=0.0)


class PlainText:
    """Text is not simulated."""

    has_stopped = False
    num_chars = 0

    def feed(self, token: int) -> str:
        """See elasticmoe.services.router.text.detokenizer."""
        return ""

    def finish(self) -> str:
        """See elasticmoe.services.router.text.detokenizer."""
        return ""


class Recorder:
    """The history, checked as it is made: promise P1."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.report = Report()
        self.open_now: dict[str, Any] = {}

    def _apply(self, event: str, name: str = "", **facts: Any) -> None:
        findings = _apply({"event": event, "id": name, **facts}, self.report, self.open_now)
        self._router.world.expect(not findings, f"history: {findings}")

    def accepted(self, name: str, **facts: Any) -> None:
        """See elasticmoe.services.router.history."""
        self._apply("accepted", name, **facts)

    def chunk(self, name: str, index: int, ids: Any) -> None:
        """See elasticmoe.services.router.history."""
        self._apply("chunk", name, index=index, ids=list(ids))
        self._router.check_tokens(name)

    def moved(self, name: str, rank: str) -> None:
        """See elasticmoe.services.router.history."""
        self._apply("moved", name, rank=rank)

    def resubmitted(self, name: str, rank: str) -> None:
        """See elasticmoe.services.router.history."""
        self._apply("resubmitted", name, rank=rank)

    def terminal(self, name: str, kind: str, reason: str, *, retryable: bool = False, tokens: int = 0) -> None:
        """See elasticmoe.services.router.history."""
        self._apply("terminal", name, kind=kind, reason=reason, retryable=retryable, tokens=tokens)
        self._router.sim.note(f"router: {name} ended: {kind} {reason} after {tokens} tokens")
        self._router.check_end(name, kind, reason)

    def flush(self) -> None:
        """See elasticmoe.services.router.history."""


class RouterClient:
    """A link's connection. `receive` is awaited by one Task, which goes on when something comes."""

    num_bad = 0

    def __init__(self, router: Router, target: str, identity: str) -> None:
        self._router, self._target = router, target
        self._identity = identity
        self._came: deque[Received[Any]] = deque()
        self.listener: Task | None = None

    def deliver(self, message: Received[Any]) -> None:
        """Something has come."""
        self._came.append(message)
        if self.listener is not None:
            self.listener.go_on()

    async def receive(self) -> Received[Any]:
        """See elasticmoe.common.endpoints."""
        while not self._came:
            await _Wait(self)
        return self._came.popleft()

    def send(self, body: Message) -> int:
        """See elasticmoe.common.endpoints."""
        sim, seq = self._router.sim, self._router.sim.next_seq()
        sim.send(self._identity, self._target, Received(0, self._identity, seq, body), "data")
        return seq

    def close(self) -> None:
        """See elasticmoe.common.endpoints."""
        if self._router.clients.get(self._target) is self:
            del self._router.clients[self._target]


class _Wait:
    """What a task waits for: a connection's next message."""

    def __init__(self, client: RouterClient) -> None:
        self._client = client

    def __await__(self) -> Generator[RouterClient, None, None]:
        yield self._client


class Task:
    """A coroutine without an asyncio loop: what it awaits is a RouterClient, or nothing."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        self._coroutine = coroutine
        self._is_running = self._is_cancelled = False
        self.go_on()

    def go_on(self) -> None:
        """Run until it waits for a message."""
        client: RouterClient | None = None
        self._is_running = True
        while client is None and not self._is_cancelled:
            client = self._coroutine.send(None)
        self._is_running = False
        if client is None:
            self._coroutine.close()
        else:
            client.listener = self

    def cancel(self) -> None:
        """See Dispatcher. It may be its own doing."""
        self._is_cancelled = True
        if not self._is_running:
            self._coroutine.close()


def _no_metrics() -> Any:
    nothing = SimpleNamespace(inc=lambda *_: None)
    return SimpleNamespace(
        resubmitted=nothing,
        moved=nothing,
        recomputed=nothing,
        bad_messages=nothing,
        watch=lambda *_: None,
        accepted=lambda *_: None,
        tokens=lambda *_: None,
        ended=lambda *_: None,
    )


class Router(Actor):
    """The process, and the clients' requests: `wanted[name]` is (prompt, tokens that must come)."""

    def __init__(self, world: World) -> None:
        super().__init__(world.sim, "router")
        self.world = world
        self.wanted: dict[str, tuple[tuple[int, ...], list[int]]] = {}
        self.ends: dict[str, tuple[str, str]] = {}
        self.num_lives = 0
        self.history = Recorder(self)
        self._begin()

    def _begin(self) -> None:
        self.is_alive = True
        self.num_lives += 1
        self.identity = f"router:{self.num_lives}"
        self.history._apply("start")
        self.clients: dict[str, RouterClient] = {}
        parts: Any = (self, _no_metrics(), self.history, self.identity)
        self.dispatcher = Dispatcher(*parts, clock=self.sim.clock, spawn=Task)
        self.sim.actors[self.identity] = self
        self._tick()

    def _tick(self) -> None:
        try:
            store = self.world.store
            layout = store.get_layout()
            if layout is not None and (self.dispatcher.layout is None or layout.epoch > self.dispatcher.layout.epoch):
                self.sim.note(f"router: layout {layout.epoch}")
                self.dispatcher.apply_layout(layout, self.sim.now)
        except Unavailable:
            pass
        self.dispatcher.turn(self.sim.now)
        self.after(TICK_S, self._tick)

    def connect_async(self, name: str, identity: str, codec: object) -> RouterClient:
        """See elasticmoe.common.endpoints."""
        self.clients[name] = RouterClient(self, name, identity)
        return self.clients[name]

    def connect_push(self, name: str, identity: str) -> PushEnd:
        """See elasticmoe.common.endpoints."""
        return Push(self.sim, self.identity)

    def is_linked(self, identity: bytes, rank: RankId) -> bool:
        """Whether this router is connected to a rank."""
        return self.is_alive and identity.decode() == self.identity and rank in self.dispatcher.links

    def receive(self, sender: str, message: Received[Any]) -> None:
        """One message of a rank; `sender` is its address."""
        if sender in self.clients:
            self.clients[sender].deliver(message)

    # ---- clients

    def open(self, name: str, prompt: tuple[int, ...], max_tokens: int, deadline_s: float) -> bool:
        """A request; whether it was accepted."""
        if not self.is_alive or self.is_paused:
            return False
        self.world.poisons.draw(name, len(prompt), max_tokens)
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(next_token(tokens))
        self.wanted[name] = prompt, tokens[len(prompt) :]
        submit = Submit(name, prompt, max_tokens, SAMPLING, deadline_s=deadline_s)
        stream = Stream(name, submit, cast(Any, PlainText()), asyncio.Event(), now=self.sim.now)
        try:
            self.dispatcher.open(stream, self.sim.now)
        except Unavailable:
            return False
        self.sim.note(f"router: {name} accepted: {len(prompt)} + {max_tokens} tokens, to {stream.rank}")
        return True

    def cancel(self, name: str) -> None:
        """Its client leaves."""
        for stream in list(self.dispatcher.streams.values()):
            if stream.name == name and self.is_alive:
                self.dispatcher.cancel(stream)

    def check_tokens(self, name: str) -> None:
        """What has come is what must come."""
        got, wanted = self.history.report.requests[name].tokens, self.wanted[name][1]
        self.world.expect(got == wanted[: len(got)], f"{name}: tokens {got} are not {wanted}")

    def check_end(self, name: str, kind: str, reason: str) -> None:
        """A finish comes with all tokens, an error only where there is a reason."""
        self.world.expect(name not in self.ends, f"{name} ended twice")
        self.ends[name] = kind, reason
        self.world.poisons.check_end(name, kind, reason)
        num, wanted = len(self.history.report.requests[name].tokens), len(self.wanted[name][1])
        if kind == "finish":
            self.world.expect(num == wanted, f"{name}: {num} of {wanted} tokens, and the finish {reason}")

    def crash(self, down_s: float) -> None:
        """Killed: its clients see their connections break."""
        self.sim.note(f"router: killed for {down_s:.2f} s")
        self.sim.actors.pop(self.identity, None)
        self.end()
        self.sim.push(self.sim.now + down_s, None, 0, self._begin, ())
