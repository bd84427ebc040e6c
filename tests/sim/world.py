"""All services together, what is checked at every step (safety), and what has to hold once it is quiet (liveness)."""

from __future__ import annotations

import logging
import traceback
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from elasticmoe.common.layout import Layout, initial_layout
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.services.hmm.memory.catalog import Transition, check_integrity, keys_of
from elasticmoe.services.scaler.planning.plan import Target
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.exchange.base import StepAborted
from elasticmoe.services.worker.rank.follower import Follower
from elasticmoe.services.worker.rank.lockstep import ALONE
from tests.sim.barrier import Meeting
from tests.sim.heap import Sim, Violation
from tests.sim.hmm import SPECS, Hmm
from tests.sim.loss import Losses
from tests.sim.memory import BLOCK_SIZE, MAX_MODEL_LEN, MAX_SEQUENCES, MAX_TOKENS, PAGE
from tests.sim.poison import Poisons
from tests.sim.policy import Policies
from tests.sim.pool import Pool
from tests.sim.rank import Killed, Poisoned, RankProcess
from tests.sim.router import Router
from tests.sim.scaler import CONFIG, Scaler
from tests.sim.store import Store

REPLICAS_MAX = 4


class World:
    """Everything of one seed, with replicas of `tp` ranks. `orders`: what operators ask for; a scaler takes them."""

    def __init__(self, seed: int, *, tp: int = 1, verbose: bool = False) -> None:
        self.sim = Sim(seed, verbose=verbose)
        rng = self.sim.rng
        self.tp = tp
        self.devices = tuple(f"host:{i}" for i in range(REPLICAS_MAX * tp))
        self.num_followed = 0  # parts of steps that ranks computed for their leaders
        self.disk: dict[str, int] = {}
        self.orders: deque[tuple[str, Target | str | None]] = deque()
        self.deadline_s = 600.0
        self.num_named = self.num_scalers = self.num_full = 0
        self.num_urgent = 0  # parts of steps from which prompts were left out, because somebody waits for their end
        self.num_ejected = 0
        self.is_healed = False
        self.has_crash_loop = False  # a seat's ranks died more often than is allowed: nothing is served for a while
        self.crash_rate = 0.0  # of a member, at each step
        self._fences: dict[str, int] = {}
        self._needs: dict[int, dict[int, frozenset[Any]]] = {}
        self.store = Store(self.sim)
        devices = self.devices[: tp * rng.choice((1, 2, 2, 3))]
        layout = initial_layout(SPECS[tp].num_experts_by_layer, devices, tp=tp)
        kv_bytes = rng.choice((4, 6, 8)) * PAGE
        load = LoadModel(
            "load-1", "/m", "float32", layout, BLOCK_SIZE, kv_bytes, MAX_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN
        )
        self.ranks: dict[str, RankProcess] = {}  # that live, whoever knows of them
        self.hmm = Hmm(self, self.devices, rng.choice((330, 360, 420)) << 10, load)
        self.hmm.expect = self.expect
        self.losses = Losses(self)
        self.poisons = Poisons(self, seed)
        self.policies = Policies(
            self, seed, msgspec.structs.replace(CONFIG, devices=f"host:{len(self.devices)}", tp=tp)
        )
        self.hmm.gone = self.losses.gone
        self._was: tuple[Layout, Transition | None] = (layout, None)
        self._state: Any = None
        self.hmm.on_change = self._check_hmm
        self.pool = Pool(self, 3 * tp)
        self.scalers: list[Scaler] = []
        self.start_scaler()
        self.router = Router(self)

    def start_scaler(self) -> None:
        """One more scaler; it waits for the lease."""
        self.num_scalers += 1
        self.scalers.append(Scaler(self, self.num_scalers))

    # ---- steps

    def ring(self, by: RankProcess) -> None:
        """A rank rings all others."""
        for process in list(self.ranks.values()):
            if process is not by and process.is_ready:
                process.ring()

    def fate_of(self, process: RankProcess) -> BaseException | None:
        """What ends the step for a rank that takes part in it; None where it is completed. Drawn for all at once."""
        met = process.barrier.last
        if not met.fates:
            met.fates.update(self._draw_fates(met))
        kind = met.fates[process.seat.slot]
        if kind == "dies":
            return Killed()
        if kind == "raises":
            return Poisoned()
        return StepAborted(self.hmm.bus.now[0]) if kind == "aborted" else None

    @staticmethod
    def is_completed(met: Meeting, slot: int) -> bool:
        """Whether the rank there completes the step."""
        return met.fates[slot] == "completed"

    def _draw_fates(self, met: Meeting) -> dict[int, str]:
        rng, here = self.sim.rng, list(met.members.values())
        self._check_homes(here)
        self._check_replicas(here)
        alone = next((said.slot for said in met.said if said.num_tokens & ALONE), None)
        nothing = StepPlan([], [], [], is_alone=True)
        has_turn = [one.leads and alone in (None, one.seat.slot) for one in here]
        plans = [one.engine.last_plan if turn else nothing for one, turn in zip(here, has_turn, strict=True)]
        struck = self.poisons.strikes(plans)
        if struck is not None:
            return {one.seat.slot: struck[1] if n == struck[0] else "aborted" for n, one in enumerate(here)}
        if not (self.crash_rate and rng.random() < self.crash_rate):
            return dict.fromkeys(met.members, "completed")
        victim = rng.choice(here)
        return {one.seat.slot: "dies" if one is victim else rng.choice(("completed", "aborted")) for one in here}

    # ---- safety

    def expect(self, is_true: bool, text: str) -> None:
        """Fail with what is broken."""
        if not is_true:
            raise Violation(text)

    def seat(self, rank: RankProcess) -> None:
        """A rank's process begins."""
        others = [other.name for other in self.ranks.values() if other.seat.slot == rank.seat.slot]
        self.expect(not others, f"two processes have slot {rank.seat.slot}: {rank.name} beside {others}")
        self.ranks[rank.name] = rank

    def note_fence(self, resource: str, epoch: int) -> None:
        """A resource obeys a command of this fencing epoch."""
        highest = self._fences.get(resource, 0)
        self.expect(epoch >= highest, f"{resource} obeys epoch {epoch} after {highest}")
        self._fences[resource] = epoch

    def _check_homes(self, ranks: list[RankProcess]) -> None:
        """All compute by one layout, and each expert is mapped by the rank that its routing sends tokens to."""
        epoch = self.hmm.bus.now[3]
        is_one = {(one.exchange.generation, one.exchange.owners) for one in ranks}
        self.expect(len(is_one) == 1, "two layouts are in force")
        if epoch not in self._needs:
            needs: defaultdict[int, set[Any]] = defaultdict(set)
            for layer, experts in enumerate(ranks[0].exchange.owners):
                for expert, slot in enumerate(experts):
                    needs[slot].add(("expert", layer, expert))
            self._needs[epoch] = {slot: frozenset(keys) for slot, keys in needs.items()}
        for rank in ranks:
            held = {(key.kind, key.layer, key.expert) for key in rank.held if not isinstance(key, int)}
            missing = self._needs[epoch].get(rank.seat.slot, frozenset()) - held
            self.expect(not missing, f"{rank.name} computes by epoch {epoch} without {missing}")

    def _check_replicas(self, ranks: list[RankProcess]) -> None:
        """What a leader has committed is in the KV of all ranks of its replica."""
        for leader in ranks if self.tp > 1 else ():
            if not leader.leads:
                continue
            mine = self.hmm.memories[leader.seat.device].real.values
            replica = [one for one in ranks if one.seat.rank.replica == leader.seat.rank.replica]
            self.expect(len(replica) == self.tp, f"{len(replica)} ranks of {leader.name}'s replica have met")
            for sequence in leader.engine.scheduler.sequences():
                for start in range(0, sequence.kv_len, BLOCK_SIZE):
                    first = sequence.blocks[start // BLOCK_SIZE] * BLOCK_SIZE
                    span = slice(first, first + min(BLOCK_SIZE, sequence.kv_len - start))
                    for one in replica:
                        theirs = self.hmm.memories[one.seat.device].real.values
                        text = f"{one.name} has other KV than {leader.name} of {sequence.request.request_id}"
                        self.expect(mine[span] == theirs[span], f"{text} from position {start}")

    def _check_hmm(self) -> None:
        """The HMM's state after every change of it."""
        hmm = self.hmm
        loaded, transition = hmm.loaded, hmm.transition
        if loaded is None:
            return
        sizes = tuple((len(m.records), len(m.kv), m.num_out) for m in hmm.memories.values())
        state = (loaded.layout.epoch, transition and (transition.request.id, transition.phase), sizes)
        if state == self._state:
            return
        self._state = state
        before, last = self._was
        self._was = loaded.layout, transition
        for memory in hmm.memories.values():
            used = memory.num_out
            self.expect(used <= memory.device.budget, f"{memory.device.name}: {used} bytes exceed the budget")
        findings = check_integrity(hmm.catalog())
        self.expect(not findings, f"catalog: {findings}")
        if transition is not None and (last is None or last.request.id != transition.request.id):
            self.expect(last is None or last.is_over, f"{transition.request.id} begins in the middle of another one")
            self.sim.note(f"hmm: {transition.request.id} {transition.phase}")
        elif transition is not None and last is not None and last.phase != transition.phase:
            self.sim.note(f"hmm: {transition.request.id} {transition.phase}")
        if loaded.layout != before:
            self._check_commit(before, loaded.layout)

    def _check_commit(self, before: Layout, after: Layout) -> None:
        self.expect(after.epoch == before.epoch + 1, f"epoch {after.epoch} follows {before.epoch}")
        for seat in after.seats:
            attached = self.hmm.by_slot.get(seat.slot)
            self.expect(attached is not None, f"epoch {after.epoch} is committed, and nobody is in slot {seat.slot}")
            rank = attached.channel.process
            missing = keys_of((after,), seat.device) - rank.held
            text = f"epoch {after.epoch} is committed, and {rank.name} lacks"
            self.expect(not missing, f"{text} {missing}")
            self.expect(after.epoch in rank.mapping.routings, f"{text} its routing")

    # ---- liveness

    def unrest(self) -> str:
        """What is not as it must be in the end; empty when all is quiet and in agreement."""
        hmm, bus = self.hmm, self.hmm.bus
        acting = [scaler for scaler in self.scalers if scaler.is_acting]
        if not acting:
            return "no scaler acts"
        assert hmm.loaded is not None
        layout, transition = hmm.loaded.layout, hmm.transition
        if self.orders or any(scaler.asked for scaler in acting):
            return "orders wait"
        if text := self.losses.unrest():
            return text
        for scaler in acting:
            if (operation := scaler.operation) is not None:
                return f"{operation.op_id} is in progress: {operation.phase}, {operation.why}"
        if self.store.data.get("operation") is not None:
            return "the journal has an operation"
        # One that is fenced dies with what it took; the next operation takes the same.
        if self.store.reserved_by in {scaler.name for scaler in acting}:
            return "room is reserved for an operation that has ended"
        if transition is not None and not transition.is_over:
            return f"transition {transition.request.id} is {transition.phase}"
        if text := self._unowned():
            return text
        if self.store.get_layout() != layout or self.router.dispatcher.layout != layout:
            return "the store's, the router's and the HMM's layouts differ"
        _, members, is_running, epoch = bus.membership()
        if not is_running or epoch != layout.epoch or members != sum(1 << slot for slot in layout.slots):
            return f"the members {members:b} run by epoch {epoch}: {is_running}"
        if sorted(self.pool.ranks) != list(layout.slots) or len(self.ranks) != len(layout.slots):
            return f"ranks in slots {sorted(self.pool.ranks)}; {sorted(self.ranks)} live"
        if self.router.dispatcher.streams:
            return f"requests {sorted(self.router.dispatcher.streams)} run"
        return self._unrest_of_ranks(layout) or self.policies.unrest()

    def _unowned(self) -> str:
        """Says which device has handles that the catalog does not name; empty when none has."""
        for name, memory in self.hmm.memories.items():
            entry = memory.entry()
            owned = entry.weights_bytes + entry.kv_bytes + entry.mailbox_bytes + entry.ledger_bytes
            if memory.num_out != owned:
                return f"{name}: {memory.num_out} bytes are out, and the catalog names {owned}"
            findings = memory.check_integrity()
            self.expect(not findings, f"{name}: {findings}")
        return ""

    def _unrest_of_ranks(self, layout: Layout) -> str:
        for slot, rank in self.pool.ranks.items():
            if not rank.is_ready or rank.mapping is None or rank.mapping.is_changing:
                return f"{rank.name} is not there yet"
            if rank.rank._lockstep.epoch != layout.epoch:
                return f"{rank.name} computes by another layout"
            memory = self.hmm.memories[rank.seat.device]
            kv = {*map(memory.device.id_of, memory.kv)}
            ids = {*map(memory.device.id_of, memory.records.values())} | kv
            if ids != rank.handles or {*memory.records, *kv} != rank.held:
                return f"{rank.name} has something else mapped than the HMM says"
            self.expect(rank.seat.slot == slot, "a rank is in another slot")
            if isinstance(rank.rank, Follower):
                self.expect(not rank.rank._check_integrity(), f"{rank.name}: {rank.rank._check_integrity()}")
                if rank.rank._kv.num_blocks != 4 * len(memory.kv):
                    return f"{rank.name}: {rank.rank._kv.num_blocks} blocks, {len(memory.kv)} handles"
                continue
            scheduler = rank.engine.scheduler
            migration = rank.rank._migration
            self.expect(not rank.engine.check_integrity(), f"{rank.name}: {rank.engine.check_integrity()}")
            if scheduler.sequences() or scheduler.holds or migration.num_moving:
                return f"{rank.name} has sequences, holds or transfers"
            if migration.is_leaving:
                return f"{rank.name} leaves"
            blocks = scheduler.blocks
            if blocks.num_free != blocks.num_blocks or blocks.num_blocks != 4 * len(memory.kv):
                return f"{rank.name}: {blocks.num_free} of {blocks.num_blocks} blocks free"
        return ""


class _Defects(logging.Handler):
    """What the product logs with a stack, because it lives on after it, is a finding here."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not isinstance(record.exc_info[1], Poisoned | None):
            frames = traceback.extract_tb(record.exc_info[2])[-3:]
            places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
            raise Violation(f"{record.getMessage()}: {record.exc_info[1]!r} at {places}")


@contextmanager
def simulated() -> Iterator[None]:
    """Logs of the product are the simulation's meanwhile. Nothing else of it is replaced."""
    root, handler = logging.getLogger(), _Defects()
    root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.removeHandler(handler)
