"""An autoscaler whose scaler is the test, and the windows that it hears."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import RankId
from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.codec import Received
from elasticmoe.common.protocol.scaler import MemoryFacts
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow, Signal
from elasticmoe.common.sketch import index
from elasticmoe.services.scaler.control.admission import CancelOperation, Order
from elasticmoe.services.scaler.control.autoscaler import (
    TICK_S,
    Autoscaler,
)
from elasticmoe.services.scaler.observation import Load
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.state import Decision, Evidence, PolicyState, Reason
from tests.clocks import PlayedClock
from tests.unit.specs import tiny_mixtral_spec
from tests.unit.transitions import UP, World, cluster_of, host_of

SLOW, FAST = index(20.0), index(0.01)
FACTS = MemoryFacts(64, KvGeometry(16, 256, 1024, 4, 256), 1 << 20, 4096, 2, 20)


class Inbox:
    def __init__(self) -> None:
        self.come: deque[tuple[bytes, Received[Signal]]] = deque()
        self.connected: set[bytes] = set()
        self.is_found = True

    def has_path(self) -> bool:
        return self.is_found

    def is_connected(self, peer: bytes) -> bool:
        return peer in self.connected

    def receive(self) -> tuple[bytes, Received[Signal]] | None:
        return self.come.popleft() if self.come else None

    def close(self) -> None:
        self.come.clear()
        self.is_found = True


class Bench:
    """An autoscaler whose scaler is the test: `answer` is what orders meet."""

    def __init__(self, **policy: Any) -> None:
        self.now = 1_000.0
        self.clock = PlayedClock(lambda: self.now)
        self.inbox = Inbox()
        self.orders: list[Order | CancelOperation] = []
        self.answer: Exception | None = None
        self.counted: list[str] = []
        self.told: list[tuple[str, str, dict[str, str]]] = []
        config = ScalerConfig(run_dir="/nowhere")
        self.num_served = 0
        self.is_changing = False
        parts = (config, tiny_mixtral_spec(), self.serve, PolicyConfig(**{"mode": "act", **policy}))
        self.heard: list[RankWindow] = []
        self.scaler = Autoscaler(*parts, self.take, self.tell, self.counted.append, self.heard.append, self.clock)  # type: ignore[arg-type]
        self.world = World(UP.before)
        host = host_of(self.world.seen())
        assert host.hmm is not None
        self.hmm, self.pool = msgspec.structs.replace(host.hmm, memory=FACTS), host.pool
        self.numbers: dict[str, int] = {}

    def serve(self) -> Any:
        self.num_served += 1
        return self.inbox

    def take(self, order: Order | CancelOperation) -> None:
        self.orders.append(order)
        if self.answer is not None:
            raise self.answer

    def tell(self, kind: str, reason: str, /, **facts: str) -> None:
        self.told.append((kind, reason, facts))

    def push(self, window: Signal) -> None:
        self.inbox.come.append((b"", Received(0, "x", 0, window)))

    def router(self, name: str = "router:1", **facts: Any) -> None:
        number = self.numbers[name] = self.numbers.get(name, 0) + 1
        now = self.clock.monotonic()
        known = {"epoch": self.world.layout.epoch, "ended_s": now, "span_s": 1.0, "admitted": 2, "prompt_tokens": 60}
        self.push(RouterWindow(router=name, number=number, **{**known, **facts}))  # type: ignore[arg-type]

    def rank(self, slot: int, tp: int = 0, **facts: Any) -> None:
        incarnation = self.world.ranks[slot]
        number = self.numbers[incarnation] = self.numbers.get(incarnation, 0) + 1
        now = self.clock.monotonic()
        known = {"epoch": self.world.layout.epoch, "ended_s": now, "span_s": 1.0, "kv_total": 1_000, "kv_used": 100}
        rank = RankId(slot - tp, tp)
        self.push(RankWindow(rank=rank, incarnation=incarnation, number=number, **{**known, **facts}))  # type: ignore[arg-type]

    def resize(self, replicas: int) -> None:
        """Another layout comes into force, of the first so many replicas."""
        layout = self.world.layout
        seats = tuple(seat for seat in layout.seats if seat.rank.replica < replicas)
        self.world.layout = msgspec.structs.replace(layout, epoch=layout.epoch + 1, seats=seats)
        self.hmm = msgspec.structs.replace(self.hmm, layout=self.world.layout)

    def load(self) -> Load | None:
        return self.scaler.observe(cluster_of(self.hmm, self.pool), frozenset(), is_changing=self.is_changing)

    def tick(self, *routers: str, ranks: tuple[int, ...] = (0, 1)) -> Load:
        """A second, in which these tell of their load."""
        self.now += TICK_S
        for name in routers:
            self.router(name)
        for slot in ranks:
            self.rank(slot)
        load = self.load()
        assert load is not None
        return load

    def decision(self, reason: Reason, target: int | None = None, *, acts: bool = False) -> Decision:
        op_id = "policy-1" if target else None
        return Decision(target=target, reason=reason, evidence=Evidence(), state=PolicyState(), op_id=op_id, acts=acts)
