"""Ranks that hand sequences over, without processes: real engines over KV memory and ledgers, real sockets, a clock of
their own, an HMM that copies blocks, and a router that checks every token against the oracle."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import hmm as hmm_messages
from elasticmoe.common.protocol import rank as rank_messages
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.hmm import CopyBlocks
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import (
    Drain,
    HandOver,
    MigrateTo,
    MoveTarget,
    Reserve,
    Sampling,
    Submit,
    ToRank,
    Unreserve,
)
from elasticmoe.common.protocol.replies import Ack, Refused, refusal
from elasticmoe.common.protocol.router import Delta, Failed, Logprob, MayMove, Moved
from elasticmoe.common.seat_sizes import LEDGER_BLOB_BYTES
from elasticmoe.common.transport import Server, Sockets
from elasticmoe.native import host
from elasticmoe.native.ledger import Ledger, format_ledger, ledger_bytes
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.migration import Migration
from tests.oracle import next_tokens
from tests.unit.ranks import NUM_BLOCKS, Ranks

MAX_SEQUENCES, MAX_MODEL_LEN = 4, 160
DEADLINE_MS = 20_000.0
ROUTER = b"router:1"
SECONDS_MAX = 60.0  # of real time, for one scenario


def make_ledger(num_blocks: int = 64, *, sequences_max: int = MAX_SEQUENCES) -> tuple[Ledger, mmap.mmap]:
    sizes = (sequences_max, MAX_MODEL_LEN, num_blocks, LEDGER_BLOB_BYTES)
    nbytes = ledger_bytes(*sizes)
    memory = mmap.mmap(-1, nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    format_ledger(address, nbytes, *sizes)
    return Ledger(address, nbytes), memory


def make_engine(ranks: Ranks, num_blocks: int = NUM_BLOCKS) -> Engine:
    """An engine over a rank's model whose KV is full of NaN."""
    kv = ranks.weights[0].kv
    ctypes.memset(kv.base_addr, 0xFF, NUM_BLOCKS * kv.geometry.block_stride)
    kv.num_blocks = num_blocks
    ledger, memory = make_ledger()
    engine = Engine(
        ranks.models[0],
        ranks.exchanges[0],
        kv,
        ledger,
        max_tokens=16,
        max_sequences=MAX_SEQUENCES,
        max_model_len=MAX_MODEL_LEN,
    )
    engine.memory_kept_by_the_test = memory  # type: ignore[attr-defined]
    return engine


def run_step(engine: Engine, plan: StepPlan, total_tokens: int = 0) -> Outcome:
    """One step as a rank takes it, without other ranks or failures."""
    engine.trials.begin(plan)
    outcome = engine.commit(plan, engine.compute(plan, total_tokens or plan.num_tokens, DEADLINE_MS))
    engine.trials.end(plan)
    return outcome


class Node:
    """One rank: what rank.py does around engine and migration."""

    def __init__(self, world: World, number: int, ranks: Ranks) -> None:
        self.world = world
        self.rank = RankId(number, 0)
        self.engine = make_engine(ranks)
        self.seat = StartRank(self.rank, number, f"device{number}", f"rank-{self.rank}:{number:016x}", 1, 16, 4, 160)
        self.server: Server[ToRank] = Server(
            world.socket(f"rank-{self.rank}"), self.seat.incarnation, rank_messages.CODEC
        )
        self.watched: set[int] = set()
        self.migration = Migration(
            self.seat, self.engine, Sockets(world.socket), watch=self.watched.add, unwatch=self.watched.remove
        )
        self.is_alive = True
        self.is_deaf = False
        self.is_stepping = True
        self.lost: set[type[Message]] = set()  # answers of these kinds do not arrive
        self.seen: list[Message] = []

    def turn(self) -> None:
        if not self.is_alive:
            return
        if not self.is_deaf:
            self.take_messages()
        for router, message in self.migration.turn(self.world.now, self.world.members):
            assert router == ROUTER
            self.world.hear(self, message)
        for _, failed in self.engine.expire(self.world.now):
            self.world.hear(self, failed)
        self.world.take(self, self.engine.end_overlong())
        if self.is_stepping:
            plan = self.engine.plan()
            if plan.num_tokens:
                self.world.take(self, run_step(self.engine, plan))
        assert self.engine.check_integrity() == []

    def take_messages(self) -> None:
        while (received := self.server.receive()) is not None:
            peer, message = received
            self.seen.append(message.body)
            answer = self.answer(peer.decode(), message.body)
            if type(answer) not in self.lost:
                self.server.send(peer, answer, seq=message.seq)

    def answer(self, sender: str, body: ToRank) -> Message:
        try:
            if isinstance(body, Reserve):
                return self.migration.reserve(sender, body)
            if isinstance(body, HandOver):
                return self.migration.take(sender, body, self.world.now)
            assert isinstance(body, Unreserve)
            self.migration.unreserve(sender, body)
            return Ack()
        except ElasticMoEError as error:
            return refusal(error)

    def move_to(self, *targets: tuple[Node, int], is_leaving: bool = False) -> None:
        places = tuple(MoveTarget(node.rank, node.seat.slot, count) for node, count in targets)
        if is_leaving:
            self.migration.obey(Drain(CommandId("op", 0, 0, "drain"), places))
        else:
            self.migration.obey(MigrateTo(CommandId("op", 0, 0, "migrate"), places))

    def seen_of(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.seen)

    @property
    def ids(self) -> set[str]:
        return {sequence.request.request_id for sequence in self.engine.scheduler.sequences()}

    def die(self) -> None:
        self.is_alive = False
        self.server.close()
        self.migration.close()


class Request:
    """What the router knows of one."""

    def __init__(self, submit: Submit, node: Node) -> None:
        self.submit = submit
        self.node = node
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.failed: Failed | None = None
        self.is_cancelled = False
        self.prompt_logprobs: tuple[Logprob, ...] | None = None

    @property
    def is_over(self) -> bool:
        return self.finish is not None or self.failed is not None or self.is_cancelled


class World:
    """Ranks 0 .. n - 1, the HMM and a router, all turned by one thread. `now` is everybody's clock."""

    def __init__(self, directory: Path, folder: Path, ranks: Sequence[Ranks]) -> None:
        self.directory = directory
        self.folder = folder
        self.now = 1000.0
        self.members = -1  # bit mask of the slots that step: all
        self.tick = 0.002
        self.requests: dict[str, Request] = {}
        self.hmm = Server(self.socket("hmm"), "hmm:1", hmm_messages.CODEC)
        self.hmm_turn: Callable[[], None] = self.answer_copies
        self.num_copied = 0
        self.nodes = [Node(self, number, item) for number, item in enumerate(ranks)]

    def socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    def close(self) -> None:
        for node in self.nodes:
            if node.is_alive:
                node.die()
        self.hmm.close()

    # ---- the HMM --------------------------------------------------------------------------------------------------

    def answer_copies(self) -> None:
        while (received := self.hmm.receive()) is not None:
            peer, message = received
            assert isinstance(message.body, CopyBlocks)
            assert message.body.source_incarnation == message.sender
            self.hmm.send(peer, self.copy(message.body), seq=message.seq)

    def copy(self, message: CopyBlocks) -> Message:
        source, target = self.nodes[message.source_slot], self.nodes[message.target_slot]
        if (message.source_incarnation, message.target_incarnation) != (
            source.seat.incarnation,
            target.seat.incarnation,
        ) or not (source.is_alive and target.is_alive):
            return Refused("stale_incarnation", "a rank is gone", True)
        size, stride = source.engine.kv.geometry.block_bytes, source.engine.kv.geometry.block_stride
        for one, other in message.pairs:
            host.copy(target.engine.kv.base_addr + other * stride, source.engine.kv.base_addr + one * stride, size)
        self.num_copied += len(message.pairs)
        return Ack()

    def drop_copies(self) -> None:
        while self.hmm.receive() is not None:
            pass

    # ---- the router -----------------------------------------------------------------------------------------------

    def submit(
        self, node: Node, name: str, prompt: Sequence[int], max_tokens: int, *, prompt_logprobs: bool = False
    ) -> Request:
        message = Submit(
            name, tuple(prompt), max_tokens, Sampling(seed=1, temperature=0.0), prompt_logprobs=prompt_logprobs
        )
        node.engine.add(message, ROUTER, self.now)
        request = self.requests[name] = Request(message, node)
        return request

    def cancel(self, name: str) -> None:
        request = self.requests[name]
        request.is_cancelled = True
        request.node.migration.cancel(ROUTER, name)
        request.node.engine.cancel(ROUTER, name)

    def take(self, node: Node, outcome: Outcome) -> None:
        for router, deltas in outcome.deltas.items():
            assert router == ROUTER
            for delta in deltas:
                self.hear_delta(delta)
        for _, failed in outcome.failures:
            self.hear(node, failed)

    def hear_delta(self, delta: Delta) -> None:
        request = self.requests[delta.request_id]
        assert delta.index <= len(request.tokens), "tokens are missing"
        known = request.tokens[delta.index : delta.index + len(delta.ids)]
        assert tuple(known) == delta.ids[: len(known)], "ranks disagree"
        request.tokens += delta.ids[len(known) :]
        request.finish = delta.finish or request.finish
        request.prompt_logprobs = delta.prompt_logprobs or request.prompt_logprobs

    def hear(self, node: Node, message: Message) -> None:
        if isinstance(message, Moved):
            self.requests[message.request_id].node = next(n for n in self.nodes if n.rank == message.rank)
        elif not isinstance(message, MayMove):
            assert isinstance(message, Failed)
            self.requests[message.request_id].failed = message

    # ---- time -----------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        self.now += self.tick
        self.hmm_turn()
        for node in self.nodes:
            node.turn()
            # Messages travel in real time: a sequence is not to end while what moves it is on its way.
            is_moving = bool(node.migration._outgoing.transfers)
            if node.is_alive and (is_moving or not node.engine.scheduler.running):
                node.server.poll(1)

    def until(self, is_reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while not is_reached():
            assert time.monotonic() < deadline, f"it does not happen:\n{self.describe()}"
            self.turn()

    def describe(self) -> str:
        """Who has what."""
        lines = [f"{name}: {len(request.tokens)}" for name, request in self.requests.items() if not request.is_over]
        for node in self.nodes:
            scheduler = node.engine.scheduler
            parts = (scheduler.running, scheduler.waiting, scheduler.detached)
            lines.append(f"{node.rank}: {[[s.request.request_id for s in part] for part in parts]}")
            lines += [f"  {t.stage} to {t.target.rank}" for t in node.migration._outgoing.transfers]
            lines.append(f"  {len(scheduler.holds)} holds, {scheduler.blocks.num_free} free")
        return "\n".join(lines)

    def finish(self) -> None:
        """Until all requests are over and nothing is under way; then everything must be as at the start."""
        self.until(lambda: all(request.is_over for request in self.requests.values()))
        self.settle()
        for name, request in self.requests.items():
            if request.failed is None:
                wanted = next_tokens(self.directory, request.submit.prompt, request.submit.max_tokens)
                assert request.tokens == wanted[: len(request.tokens)], name
                assert request.is_cancelled or len(request.tokens) == len(wanted), name

    def settle(self) -> None:
        def is_still() -> bool:
            nodes = [node for node in self.nodes if node.is_alive]
            return not any(
                node.engine.scheduler.sequences() or node.engine.scheduler.holds or node.migration.num_moving
                for node in nodes
            )

        self.until(is_still)
        for node in self.nodes:
            if node.is_alive:
                assert node.engine.scheduler.blocks.num_free == node.engine.scheduler.blocks.num_blocks
                assert node.engine.check_integrity() == []
