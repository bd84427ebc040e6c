"""All services together, what is checked at every step (safety), and what has to hold once it is quiet (liveness)."""

from __future__ import annotations

import logging
import traceback
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.layout import Layout, initial_layout
from common.protocol.hmm import LoadModel
from services.hmm.catalog import Transition, check_integrity, keys_of
from services.scaler.plan import Target
from services.worker.engine.plan import Plan
from tests.sim.heap import Sim, Violation
from tests.sim.hmm import BLOCK_SIZE, MAX_MODEL_LEN, MAX_SEQUENCES, MAX_TOKENS, PAGE, SPEC, Hmm
from tests.sim.loss import Losses
from tests.sim.poison import Poisons
from tests.sim.rank import Pool, Rank
from tests.sim.router import Router
from tests.sim.scaler import Scaler
from tests.sim.store import Store

DEVICES = tuple(f"host:{i}" for i in range(4))
BEAT_S, IDLE_BEAT_S = 0.1, 0.4
STEP_S = 0.25  # a step is slow, so that requests live long enough to move


class World:
    """Everything of one seed. `orders`: what operators ask for, until a scaler takes it."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.sim = Sim(seed, verbose=verbose)
        rng = self.sim.rng
        self.disk: dict[str, int] = {}
        self.orders: deque[tuple[str, Target | str | None]] = deque()
        self.refused: dict[str, str] = {}
        self.deadline_s = 600.0
        self.num_started = self.num_scalers = self.num_flips = self.num_full = 0
        self.is_healed = False
        self.crash_rate = 0.0  # of a member, at each step
        self._stepped_at = 0.0
        self._fences: dict[str, int] = {}
        self._needs: dict[int, dict[int, frozenset[Any]]] = {}
        self.store = Store(self.sim)
        layout = initial_layout(SPEC.num_experts_by_layer, DEVICES[: rng.choice((1, 2, 2, 3))])
        kv_bytes = rng.choice((4, 6, 8)) * PAGE
        load = LoadModel(
            "load-1", "/m", "float32", layout, BLOCK_SIZE, kv_bytes, MAX_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN
        )
        self.hmm = Hmm(self.sim, DEVICES, rng.choice((330, 360, 420)) << 10, load, self.disk)
        self.hmm.expect = self.expect
        self.losses = Losses(self)
        self.poisons = Poisons(self, seed)
        self.hmm.gone = self.losses.gone
        self._was: tuple[Layout, Transition | None] = (layout, None)
        self._state: Any = None
        self.hmm.on_change = self._check_hmm
        self.ranks: dict[str, Rank] = {}  # that live, whoever knows of them
        self.pool = Pool(self, 3)
        self.scalers: list[Scaler] = []
        self.start_scaler()
        self.router = Router(self)
        self.sim.push(0.05, None, 0, self._beat, ())

    def start_scaler(self) -> None:
        """One more scaler; it waits for the lease."""
        self.num_scalers += 1
        self.scalers.append(Scaler(self, self.num_scalers))

    # ---- steps

    def _beat(self) -> None:
        ranks = [rank for rank in self.ranks.values() if rank.is_ready]
        for rank in ranks:
            if rank.is_alive and not rank.is_paused:
                rank.turn()
        ranks = [rank for rank in ranks if rank.is_alive]
        self._meet(ranks)
        _, _, is_running, _ = self.hmm.bus.membership()
        is_busy = not is_running or self.hmm.bus.staged()[0] or any(rank.is_busy for rank in ranks)
        self.sim.push(self.sim.now + (BEAT_S if is_busy else IDLE_BEAT_S), None, 0, self._beat, ())

    def _meet(self, ranks: list[Rank]) -> None:
        """All members step together, or flip, or wait for one that is not there."""
        bus, rng = self.hmm.bus, self.sim.rng
        generation, members, is_running, epoch = bus.membership()
        here = [rank for rank in ranks if members >> rank.seat.slot & 1]
        if not is_running or len(here) != members.bit_count():
            return
        if any(rank.generation != generation or not rank.is_member or rank.is_paused for rank in here):
            return
        self.expect(all(rank.epoch == epoch for rank in here), "two layouts are in force")
        is_early = self.sim.now < self._stepped_at + STEP_S
        plans = [rank.engine.plan(num_clean=rank.num_clean) for rank in here] if not is_early else []
        staged, _, following = bus.staged()
        if staged and all(following in rank.routings for rank in here):
            self.expect(bus.flip(staged), "a staged generation cannot be flipped to")
            self.num_flips += 1
            self.sim.note(f"bus: flipped to generation {staged}, epoch {following}")
            return
        alone = next((number for number, plan in enumerate(plans) if plan.is_alone), None)
        if alone is not None:
            nothing = Plan([], [], [], is_alone=True)
            plans = [plan if number == alone else nothing for number, plan in enumerate(plans)]
        if not any(plan.num_said for plan in plans):
            return
        self._stepped_at = self.sim.now
        self._check_homes(here, epoch)
        victim = rng.choice(here) if self.crash_rate and rng.random() < self.crash_rate else None
        struck = self.poisons.strikes(plans)
        for rank, plan in zip(here, plans, strict=True):
            rank.engine.trials.begin(plan)
        for number, (rank, plan) in enumerate(zip(here, plans, strict=True)):
            if struck is not None and number == struck[0]:
                self._fail(rank, plan, struck[1], is_awaited=len(here) > 1)
            elif rank is victim:
                rank.exit("killed in a step")
            elif struck is None and (victim is None or rng.random() < 0.5):
                rank.step(plan)
            else:
                rank.fail_step(plan)

    def _fail(self, rank: Rank, plan: Plan, kind: str, *, is_awaited: bool) -> None:
        """A rank fails in a step."""
        if kind == "dies" or (is_awaited and not rank.is_connected):
            rank.exit("killed by a request")
            return
        rank.fail_step(plan)
        if is_awaited:
            rank.reconnect()

    # ---- safety

    def expect(self, is_true: bool, text: str) -> None:
        """Fail with what is broken."""
        if not is_true:
            raise Violation(text)

    def seat(self, rank: Rank) -> None:
        """A rank's process begins."""
        others = [other.name for other in self.ranks.values() if other.seat.slot == rank.seat.slot]
        self.expect(not others, f"two processes have slot {rank.seat.slot}: {rank.name} beside {others}")
        self.ranks[rank.name] = rank

    def note_fence(self, resource: str, epoch: int) -> None:
        """A resource obeys a command of this fencing epoch."""
        highest = self._fences.get(resource, 0)
        self.expect(epoch >= highest, f"{resource} obeys epoch {epoch} after {highest}")
        self._fences[resource] = epoch

    def _check_homes(self, ranks: list[Rank], epoch: int) -> None:
        """Each expert is mapped by the rank that the routing in force sends its tokens to."""
        if epoch not in self._needs:
            needs: defaultdict[int, set[Any]] = defaultdict(set)
            for layer, experts in enumerate(ranks[0].routings[epoch].owners):
                for expert, slot in enumerate(experts):
                    needs[slot].add(("expert", layer, expert))
            self._needs[epoch] = {slot: frozenset(keys) for slot, keys in needs.items()}
        for rank in ranks:
            held = {(key.kind, key.layer, key.expert) for key in rank.held if not isinstance(key, int)}
            missing = self._needs[epoch].get(rank.seat.slot, frozenset()) - held
            self.expect(not missing, f"{rank.name} computes by epoch {epoch} without {missing}")

    def _check_hmm(self) -> None:
        """The HMM's state after every change of it."""
        hmm = self.hmm
        loaded, transition = hmm.loaded, hmm.transition
        if loaded is None:
            return
        sizes = tuple((len(m.records), len(m.kv), m.num_claimed, m.num_releasing) for m in hmm.memories.values())
        state = (loaded.layout.epoch, transition and (transition.request.op_id, transition.phase), sizes)
        if state == self._state:
            return
        self._state = state
        before, last = self._was
        self._was = loaded.layout, transition
        for memory in hmm.memories.values():
            used = hmm.bytes_of(memory)
            self.expect(used <= memory.device.budget, f"{memory.device.name}: {used} bytes exceed the budget")
        findings = check_integrity(hmm.catalog())
        self.expect(not findings, f"catalog: {findings}")
        if transition is not None and (last is None or last.request.op_id != transition.request.op_id):
            self.expect(last is None or last.is_over, f"{transition.request.op_id} begins in the middle of another one")
            self.sim.note(f"hmm: {transition.request.op_id} {transition.phase}")
        elif transition is not None and last is not None and last.phase != transition.phase:
            self.sim.note(f"hmm: {transition.request.op_id} {transition.phase}")
        if loaded.layout != before:
            self._check_commit(before, loaded.layout)

    def _check_commit(self, before: Layout, after: Layout) -> None:
        self.expect(after.epoch == before.epoch + 1, f"epoch {after.epoch} follows {before.epoch}")
        for seat in after.seats:
            attached = self.hmm.by_slot.get(seat.slot)
            rank = self.hmm.ranks.get(attached.incarnation) if attached else None
            self.expect(rank is not None, f"epoch {after.epoch} is committed, and nobody is in slot {seat.slot}")
            assert rank is not None
            missing = keys_of((after,), seat.device) - rank.held
            text = f"epoch {after.epoch} is committed, and {rank.name} lacks"
            self.expect(not missing, f"{text} {missing}")
            self.expect(after.epoch in rank.routings, f"{text} its routing")

    # ---- liveness

    def unrest(self) -> str:
        """What is not as it must be in the end; empty when all is quiet and in agreement."""
        hmm, bus = self.hmm, self.hmm.bus
        acting = [scaler for scaler in self.scalers if scaler.driver is not None and not scaler.is_fenced]
        if not acting:
            return "no scaler acts"
        assert hmm.loaded is not None
        layout, transition = hmm.loaded.layout, hmm.transition
        if self.orders or any(scaler.waiting for scaler in acting):
            return "orders wait"
        if text := self.losses.unrest():
            return text
        for scaler in acting:
            if scaler.driver is not None and scaler.driver.operation is not None:
                operation = scaler.driver.operation
                return f"{operation.op_id} is in progress: {operation.phase}, {operation.why}"
        if self.store.data.get("operation") is not None:
            return "the journal has an operation"
        # One that is fenced dies with what it took; the next operation takes the same.
        if self.store.reserved_by in {scaler.name for scaler in acting}:
            return "room is reserved for an operation that has ended"
        if transition is not None and not transition.is_over:
            return f"transition {transition.request.op_id} is {transition.phase}"
        if self.store.get_layout() != layout or self.router.dispatcher.layout != layout:
            return "the store's, the router's and the HMM's layouts differ"
        _, members, is_running, epoch = bus.membership()
        if not is_running or epoch != layout.epoch or members != sum(1 << slot for slot in layout.slots):
            return f"the members {members:b} run by epoch {epoch}: {is_running}"
        if sorted(self.pool.ranks) != list(layout.slots) or len(self.ranks) != len(layout.slots):
            return f"ranks in slots {sorted(self.pool.ranks)}; {sorted(self.ranks)} live"
        if self.router.dispatcher.streams:
            return f"requests {sorted(self.router.dispatcher.streams)} run"
        return self._unrest_of_ranks(layout)

    def _unrest_of_ranks(self, layout: Layout) -> str:
        for slot, rank in self.pool.ranks.items():
            if not rank.is_ready or rank.goal is not None or rank.epoch != layout.epoch:
                return f"{rank.name} is not there yet"
            scheduler, memory = rank.engine.scheduler, self.hmm.memories[rank.seat.device]
            self.expect(not rank.engine.check_integrity(), f"{rank.name}: {rank.engine.check_integrity()}")
            if scheduler.sequences() or scheduler.holds or rank.migration.num_moving:
                return f"{rank.name} has sequences, holds or transfers"
            if rank.migration.is_leaving:
                return f"{rank.name} leaves"
            blocks = scheduler.blocks
            if blocks.num_free != blocks.num_blocks or blocks.num_blocks != 4 * len(memory.kv):
                return f"{rank.name}: {blocks.num_free} of {blocks.num_blocks} blocks free"
            if {*memory.records, *memory.kv} != rank.held:
                return f"{rank.name} has something else mapped than the HMM says"
            self.expect(rank.seat.slot == slot, "a rank is in another slot")
        return ""


class _Defects(logging.Handler):
    """What the product logs with a stack, because it lives on after it, is a finding here."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
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
