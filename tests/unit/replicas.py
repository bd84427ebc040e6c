"""Replicas of several ranks without processes: the product's loops of leaders and followers over a real bus and real
sockets, a thread each, and a router. What is played: memory, which is there from the beginning and whose KV is asked to
be resized, and the HMM, which ends the generation where a connection ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.protocol import rank as rank_messages
from elasticmoe.common.protocol import router as router_messages
from elasticmoe.common.protocol import scaler as scaler_messages
from elasticmoe.common.protocol.codec import Codec
from elasticmoe.common.protocol.handles import Routing
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import Cancel, Sampling, Submit
from elasticmoe.common.protocol.router import Failed, Tokens
from elasticmoe.common.transport import Sockets
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.exchange.shm_barrier import ShmBarrier
from elasticmoe.services.worker.exchange.shm_board import ShmBoard
from elasticmoe.services.worker.rank.follower import Follower
from elasticmoe.services.worker.rank.loop import SeatLoop
from elasticmoe.services.worker.rank.parts import SeatParts
from elasticmoe.services.worker.rank.rank import Rank
from tests.procs.waiting import wait_until
from tests.unit.migration_world import MAX_MODEL_LEN, MAX_SEQUENCES, make_ledger
from tests.unit.ranks import Ranks

WAIT_MS_MAX = 20
SECONDS_MAX = 60.0


class PlayedMemory:
    """See Mapped: all KV is mapped; how much of it is to be used is the goal."""

    def __init__(self, ranks: Ranks, doorbells: dict[int, int]) -> None:
        self.spec = ranks.spec
        self.ledger, self._kept = make_ledger()
        self.routings = {0: Routing(0, tuple(tuple(ranks.layout.owners(at)) for at in range(ranks.spec.num_layers)))}
        self.doorbells = doorbells
        self.goal = 0

    @property
    def is_changing(self) -> bool:
        return self.goal > 0

    def advance(self, resize_kv: Any) -> int:
        if not resize_kv(self.goal):
            return 0
        self.goal = 0
        return 1

    def close(self) -> None:
        pass


class PlayedHmm:
    """A rank's connection to it."""

    is_connected = True

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def look(self, readable: set[int], now: float) -> tuple[()]:
        del readable, now
        return ()

    def hear(self, now: float) -> None:
        del now

    def applied(self, revision: int) -> None:
        del revision

    def close(self) -> None:
        """It sees its end, and the rank comes again at once."""
        self._replicas.end_generation()


class Replicas:
    """`size` replicas of `tp` ranks each. `loops`: by slot. A context manager: inside it all loops run."""

    def __init__(self, directory: Path, folder: Path, size: int, tp: int = 2, **options: Any) -> None:
        self.ranks = Ranks(directory, size, tp=tp, **options)
        self._tp = tp
        self._sockets = Sockets(lambda name: folder / f"{name}.sock")
        self._doorbells = {slot: os.eventfd(0, os.EFD_NONBLOCK) for slot in range(size * tp)}
        self.memories: list[PlayedMemory] = []
        self.num_ended = -1  # generations
        self._lock = threading.Lock()
        self.loops = [self._open(slot) for slot in range(size * tp)]
        self.ends: list[BaseException] = []
        self._is_over = False
        self._threads: list[threading.Thread] = []
        self._router: dict[int, Any] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.failed: dict[str, Failed] = {}

    def _open(self, slot: int) -> SeatLoop:
        ranks, seat_of = self.ranks, self.ranks.layout.seats[slot]
        bus, replica = ranks.exchanges[slot]._bus, ranks.layout.replica_of(seat_of)  # type: ignore[attr-defined]
        memory, kv = PlayedMemory(ranks, self._doorbells), ranks.weights[slot].kv
        self.memories.append(memory)
        name = f"rank-{seat_of.rank}"
        seat = StartRank(seat_of.rank, slot, seat_of.device, f"{name}:{slot + 1:016x}", 1, 16, MAX_SEQUENCES, 160)
        server = self._sockets.serve(name, seat.incarnation, rank_messages.CODEC)
        hmm: Any = PlayedHmm(self)
        fence: Any = SimpleNamespace(check=lambda *_: None, heed=lambda _: None)
        barrier, exchange = ShmBarrier(bus, memory.doorbells, slot), ranks.exchanges[slot]
        board = ShmBoard(bus, replica)
        played: Any = memory
        parts = SeatParts(
            seat=seat,
            clock=SYSTEM_CLOCK,
            transport=self._sockets,
            server=server,
            hmm=hmm,
            fence=fence,
            memory=played,
            revision=1,
            barrier=barrier,
            exchange=exchange,
            attach_ms=0.0,
            build_ms=0.0,
            computes_by="",
            use_cores=lambda _: None,
        )
        if seat_of.rank.tp:
            return Follower(parts, board, ranks.models[slot], kv, lambda _: None)
        engine = Engine(
            ranks.models[slot],
            exchange,
            kv,
            memory.ledger,
            max_tokens=16,
            max_sequences=MAX_SEQUENCES,
            max_model_len=MAX_MODEL_LEN,
            board=board,
        )
        return Rank(parts, engine, lambda _: None)

    def engine(self, replica: int) -> Engine:
        """A leader's. Its own thread's while the loops run."""
        loop = self.loops[replica * self._tp]
        assert isinstance(loop, Rank)
        return loop._engine

    def end_generation(self) -> None:
        """Park, and let all go on at once."""
        with self._lock:
            if self._is_over:
                return
            self.num_ended += 1
            ranks, members = self.ranks, (1 << len(self.loops)) - 1
            ranks._observer.set_membership(ranks._generation + 1, members, False)
            ranks._observer.set_membership(ranks._generation + 2, members, True)
            ranks._generation += 2

    def __enter__(self) -> Self:
        for loop in self.loops:
            loop.start(SYSTEM_CLOCK.monotonic())
        self.end_generation()
        self._threads = [threading.Thread(target=self._drive, args=(loop,)) for loop in self.loops]
        for thread in self._threads:
            thread.start()
        for replica in range(len(self.loops) // self._tp):
            name = f"rank-{self.ranks.layout.seats[replica * self._tp].rank}"
            self._router[replica] = self._sockets.connect(name, "router:1", router_messages.CODEC)
        return self

    def _drive(self, loop: SeatLoop) -> None:
        try:
            while not (self._is_over or loop.is_stopping):
                wait_ms = loop.turn(SYSTEM_CLOCK.monotonic())
                if wait_ms:
                    loop.wait(min(wait_ms, WAIT_MS_MAX))
        except BaseException as end:
            self.ends.append(end)
            self.end_generation()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
            now, *_ = self.ranks._observer.membership()
            self.ranks._observer.set_membership(now + 1, 0, False)  # whoever waits in a step is let go
        for thread in self._threads:
            thread.join()
        for client in self._router.values():
            client.close()
        for loop in self.loops:
            with loop:
                pass
        for fd in self._doorbells.values():
            os.close(fd)

    # ---- the router -----------------------------------------------------------------------------------------------

    def submit(self, replica: int, name: str, prompt: Sequence[int], max_tokens: int, **fields: Any) -> None:
        """A greedy request."""
        self.tokens[name] = []
        sampling = Sampling(seed=1, temperature=0.0)
        self._router[replica].send(Submit(name, tuple(prompt), max_tokens, sampling, **fields))

    def cancel(self, replica: int, name: str) -> None:
        """The client has left."""
        del self.tokens[name]
        self._router[replica].send(Cancel(name))

    def ask(self, slot: int, message: Any, codec: Codec[Any] = scaler_messages.CODEC) -> Any:
        """What a rank answers, as the scaler asks it, or another rank."""
        client = self._sockets.connect(f"rank-{self.ranks.layout.seats[slot].rank}", "scaler:1", codec)
        try:
            return client.call(message, deadline_ms=20_000)[0]
        finally:
            client.close()

    def hear(self) -> None:
        """What has come from the ranks."""
        for client in self._router.values():
            while (received := client.receive()) is not None:
                self._take(received.body)

    def _take(self, body: Any) -> None:
        if isinstance(body, Failed):
            self.failed[body.request_id] = body
        for delta in body.deltas if isinstance(body, Tokens) else ():
            tokens = self.tokens.get(delta.request_id)
            if tokens is None:
                continue  # it was cancelled
            assert delta.index == len(tokens), "told twice, or not told"
            tokens += delta.ids
            if delta.finish:
                self.finish[delta.request_id] = delta.finish

    def wait(self, is_there: Any, what: str) -> None:
        """Until it is there. Fails where a loop has ended meanwhile."""

        def look() -> bool:
            self.hear()
            assert not self.ends, f"a loop ended: {self.ends!r}"
            return bool(is_there())

        wait_until(look, what, SECONDS_MAX)

    def wait_finished(self) -> None:
        """Until all requests have ended."""
        self.wait(lambda: len(self.finish) + len(self.failed) == len(self.tokens), "all requests to end")
