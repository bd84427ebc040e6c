"""The router: the product's dispatcher, links and streams with the network of the simulation, and its clients."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common.layout import RankId
from common.protocol.codec import Message, Received
from common.protocol.errors import Unavailable
from common.protocol.rank import Sampling, Submit
from services.router.dispatcher import Dispatcher
from services.router.links import RankLink
from services.router.streams import Stream
from tests.history import Report, _apply
from tests.sim.heap import Actor
from tests.sim.rank import next_token

if TYPE_CHECKING:
    from tests.sim.world import World

TICK_S = 0.2
SAMPLING = Sampling(seed=1, temperature=0.0)


class PlainText:
    """Text is not simulated."""

    has_stopped = False
    num_chars = 0

    def feed(self, token: int) -> str:
        """See services.router.detokenizer."""
        return ""

    def finish(self) -> str:
        """See services.router.detokenizer."""
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
        """See services.router.history."""
        self._apply("accepted", name, **facts)

    def chunk(self, name: str, index: int, ids: Any) -> None:
        """See services.router.history."""
        self._apply("chunk", name, index=index, ids=list(ids))
        self._router.check_tokens(name)

    def moved(self, name: str, rank: str) -> None:
        """See services.router.history."""
        self._apply("moved", name, rank=rank)

    def resubmitted(self, name: str, rank: str) -> None:
        """See services.router.history."""
        self._apply("resubmitted", name, rank=rank)

    def terminal(self, name: str, kind: str, reason: str, *, retryable: bool = False, tokens: int = 0) -> None:
        """See services.router.history."""
        self._apply("terminal", name, kind=kind, reason=reason, retryable=retryable, tokens=tokens)
        self._router.sim.note(f"router: {name} ended: {kind} {reason} after {tokens} tokens")
        self._router.check_end(name, kind, reason)

    def flush(self) -> None:
        """See services.router.history."""


class RouterClient:
    """In the place of a link's socket."""

    num_bad = 0

    def __init__(self, path: tuple[Router, str], identity: str, codec: object) -> None:
        self._router, self._target = path
        self._identity = identity

    def send(self, body: Message) -> int:
        """See common.transport."""
        sim, seq = self._router.sim, self._router.sim.next_seq()
        sim.send(self._identity, self._target, Received(0, self._identity, seq, body), "data")
        return seq

    def close(self) -> None:
        """See common.transport."""


class SimDispatcher(Dispatcher):
    """Without tasks: the heap brings the messages."""

    def _open_link(self, rank: RankId, now: float) -> RankLink:
        link = RankLink(rank, self._socket_of(f"rank-{rank}"), self._identity, now)
        self.links[rank] = link
        link.watch(now)
        return link

    def _close_link(self, rank: RankId) -> None:
        self.links.pop(rank).close()


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
        self.dispatcher = SimDispatcher(
            lambda name: cast(Any, (self, name)), _no_metrics(), cast(Any, self.history), self.identity
        )
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
        self.dispatcher.tick(self.sim.now)
        self.after(TICK_S, self._tick)

    def is_linked(self, identity: bytes, rank: RankId) -> bool:
        """Whether this router is connected to a rank."""
        return self.is_alive and identity.decode() == self.identity and rank in self.dispatcher.links

    def receive(self, sender: str, message: Received[Any]) -> None:
        """One message of a rank; `sender` is its address."""
        replica, tp = sender.removeprefix("rank-r").split("t")
        link = self.dispatcher.links.get(RankId(int(replica), int(tp)))
        if link is not None:
            self.dispatcher._on_message(link, message, self.sim.now)

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
