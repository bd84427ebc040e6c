"""A machine that runs out of memory anywhere in a transition: the operation is refused, fails or goes on with less KV;
the layout in force stays whole and nothing is lost (promise P11). Real memory, catalog and bus; ranks as values."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import HmmConfig
from elasticmoe.common.layout import ExchangeKind, Layout, RankId, Seat, initial_layout
from elasticmoe.common.protocol.errors import DoesNotFit, Unavailable
from elasticmoe.common.protocol.handles import SeatMemory
from elasticmoe.common.protocol.hmm import LoadModel, RecordCopy, StageLayout
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.telemetry import get_logger
from elasticmoe.native import host
from elasticmoe.native.bus import Bus
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.memory import transfer
from elasticmoe.services.hmm.memory.catalog import keys_of
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.transfer import Supply
from elasticmoe.services.hmm.sessions.handles import Importer, Offer
from elasticmoe.services.hmm.sessions.membership import Membership
from elasticmoe.services.hmm.transition.transition import Transitions

pytestmark = pytest.mark.slow

BUDGET = 32 << 20
LOG = get_logger("test")
WAIT_S = 60.0
ALLOCATE, WRITE_FROM = host.allocate, host.write_from


class Memory:
    """The machine's: fails the allocations whose number is in `failing`."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.failing: range = range(0)

    def allocate(self, fd: int, offset: int, nbytes: int) -> None:
        self._count()
        ALLOCATE(fd, offset, nbytes)

    def write_from(self, fd: int, file_offset: int, addr: int, nbytes: int) -> None:
        self._count()
        WRITE_FROM(fd, file_offset, addr, nbytes)

    def _count(self) -> None:
        self.num_calls += 1
        if self.num_calls in self.failing:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    @property
    def has_failed(self) -> bool:
        """Whether the first of them was asked for."""
        return self.num_calls >= self.failing.start


class World:
    """An HMM without sockets that has a model loaded on all devices but one, as two replicas. Ranks map at once what
    they are sent."""

    def __init__(
        self, model: Path, folder: Path, *, device_bytes: int = BUDGET, exchange: ExchangeKind = "shm", tp: int = 1
    ) -> None:
        self.tp = tp
        self.machine = Memory()
        self.kept: dict[str, int] = {}  # what a keeper would hold
        self.config = HmmConfig(run_dir=str(folder), devices=f"host:{2 * tp + 1}", device_bytes=device_bytes)
        parking: Any = SimpleNamespace(
            fetch=lambda **_: {}, keep=self.kept.update, forget=self._forget, names=self.kept.keys()
        )
        self.holdings = Holdings(self.config, parking, LOG)
        self.holdings.start()
        layout = initial_layout((5, 5), [f"host:{slot}" for slot in range(2 * tp)], tp=tp)
        request = LoadModel("load", str(model), "float32", layout, 16, 3 << 21, 64, 4, 64, exchange)
        load = ModelLoad(request, self.holdings.memories, self.holdings.prepare(layout), self.holdings.granularity)
        self.holdings.commit(load.run())
        self.background = Background(LOG)
        self.members = Membership(self.holdings, LOG)
        self.by_slot: dict[int, Any] = {}
        self.num_requests = 0
        attachments: Any = SimpleNamespace(by_slot=self.by_slot, share=self._share)
        copies: Any = SimpleNamespace(is_busy=lambda _: False)
        supply = Supply(self.holdings, self.background)
        self.transitions = Transitions(self.holdings, attachments, self.members, copies, supply, LOG, SYSTEM_CLOCK)
        self.supply = supply
        for slot in layout.slots:
            self.attach(slot)
        self.members.publish(layout.slots, True)
        self.kv = {name: len(memory.kv) for name, memory in self.holdings.memories.items() if memory.kv}
        self.sums = self.checksums()

    def _forget(self, names: Iterable[str]) -> None:
        for name in set(names):
            self.kept.pop(name, None)

    def _share(self, attached: Any, tell: Callable[[Importer], tuple[SeatMemory, Offer]]) -> None:
        seat, _ = tell(attached.importer)
        attached.applied = seat.revision
        attached.sent = seat

    def attach(self, slot: int) -> None:
        sent = SimpleNamespace(revision=0)
        self.by_slot[slot] = SimpleNamespace(
            slot=slot, device=f"host:{slot}", importer=Importer(0), sent=sent, applied=0, version=-1
        )

    def checksums(self) -> dict[str, int]:
        jobs = self.holdings.checksum_jobs()
        return {name: device.checksum(address, nbytes) for name, device, address, nbytes in jobs}

    @property
    def layout(self) -> Layout:
        assert self.holdings.loaded is not None
        return self.holdings.loaded.layout

    def request(self, *slots: int) -> StageLayout:
        """To `slots`; a KV handle fewer until the release, and one more after it."""
        self.num_requests += 1
        before = self.layout
        homes = tuple(tuple((slots[(expert + layer) % len(slots)],) for expert in range(5)) for layer in range(2))
        seats = tuple(Seat(RankId(*divmod(slot, self.tp)), slot, f"host:{slot}") for slot in slots)
        layout = Layout(before.epoch + 1, self.tp, seats, homes)
        old = {seat.device for seat in before.seats}
        devices = old | {seat.device for seat in seats}
        fewer = {name: max(1, len(self.holdings.memories[name].kv) - 1) for name in devices}
        more = {seat.device: max(self.kv.values()) for seat in seats}
        return StageLayout(TransitionId(f"op-{self.num_requests}"), layout, copies_of(before, layout), fewer, more)

    def turn_to(self, *phases: str) -> str:
        """Be the loop until the transition is in one of `phases`."""
        deadline = time.monotonic() + WAIT_S
        while True:
            self.background.finish()
            self.transitions.advance()
            status = self.transitions.status()
            assert status is not None
            if status.phase in phases and not self.supply.is_releasing:
                return status.phase
            assert time.monotonic() < deadline, f"still {status}"
            self.background.join(0.001)

    def flip(self) -> None:
        bus = self.members._bus
        assert bus is not None
        assert bus.flip(bus.staged()[0])

    def check(self) -> None:
        """Whole: every page has an owner, every owner its pages, every record its bytes, and somebody runs."""
        assert self.holdings.check_integrity() == []
        wanted: dict[str, int] = {}
        for name, value in self.sums.items():
            wanted[name.split("/")[1]] = value
        for name, value in self.checksums().items():
            assert value == wanted[name.split("/")[1]]
        for name, memory in self.holdings.memories.items():
            keys = keys_of((self.layout,), name)
            assert set(memory.records) == keys
            handles = [*memory.records.values(), *memory.kv]
            assert memory.device.pages == sum(handle.nbytes for handle in handles)
            assert memory.device.free == memory.device.budget - memory.device.pages
            assert bool(memory.kv) == bool(memory.ledger) == bool(keys)
        _, members, is_running, epoch = self.members.current()
        assert (members, is_running, epoch) == (sum(1 << slot for slot in self.layout.slots), True, self.layout.epoch)
        assert set(self.holdings.doorbells) == set(self.layout.slots)

    def close(self) -> None:
        assert self.background.join(WAIT_S)
        self.background.close()
        self.holdings.close()


def copies_of(before: Layout, after: Layout) -> tuple[RecordCopy, ...]:
    """Every record that a device needs anew, from any that has it."""
    copies = []
    for seat in after.seats:
        held = keys_of((before,), seat.device) if before.seat_on(seat.device) else set()
        for key in sorted(keys_of((after,), seat.device) - held):
            source = next(one.device for one in before.seats if key in keys_of((before,), one.device))
            copies.append(RecordCopy(key, source, seat.device))
    return tuple(copies)


@pytest.fixture
def world(tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tiny_mixtral, tmp_path)
    monkeypatch.setattr(host, "allocate", made.machine.allocate)
    monkeypatch.setattr(host, "write_from", made.machine.write_from)
    yield made
    made.close()


def try_transition(world: World, slots: tuple[int, ...]) -> str:
    """One whole transition, given up where it cannot be staged; how it ended."""
    request, before = world.request(*slots), world.layout
    world.transitions.stage(request)
    if world.turn_to("staged", "failed") == "failed":
        status = world.transitions.status()
        assert status is not None
        assert status.error is not None
        assert (status.error.code, "no memory" in status.error.message) == ("does_not_fit", True)
        world.transitions.abort(request.id)
        world.turn_to("aborted")
        assert world.layout == before
        return "aborted"
    for slot in set(slots) - set(before.slots):
        world.attach(slot)
    world.turn_to("staged")
    world.transitions.commit(request.id)
    world.flip()
    world.turn_to("flipped")
    for slot in set(before.slots) - set(slots):
        del world.by_slot[slot]
    world.transitions.release(request.id)
    world.turn_to("released")
    assert world.layout == request.layout
    return "released"


def undo(world: World) -> None:
    """Back to the first layout with the KV that it had, on a machine that has memory again."""
    world.machine.failing = range(0)
    while (
        world.layout.slots != (0, 1) or {n: len(m.kv) for n, m in world.holdings.memories.items() if m.kv} != world.kv
    ):
        assert try_transition(world, (0, 1) if world.layout.slots != (0, 1) else (0, 1, 2)) == "released"


def test_a_transition_whose_handles_are_claimed_in_many_turns_ends_as_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of them the HMM answers, and it may be told to give up."""
    monkeypatch.setattr(transfer, "CLAIMS_MAX", 1)
    for num_turns in (1, 4, 9):
        given_up = world.request(0, 1, 2)
        world.transitions.stage(given_up)
        assert world.turn_to("vacating") == "vacating"
        while not world.supply.is_claiming:  # ranks give KV away first
            world.background.finish()
            world.transitions.advance()
        for _ in range(num_turns):
            world.transitions.advance()
        status = world.transitions.status()
        assert status is not None
        assert (status.phase, world.supply.is_claiming, world.supply.is_transferring) == ("vacating", True, False)
        world.transitions.abort(given_up.id)
        assert not world.supply.is_claiming
        world.turn_to("aborted")
        world.check()
    assert try_transition(world, (0, 1, 2)) == "released"
    world.check()
    assert try_transition(world, (0, 2)) == "released"
    world.check()


@pytest.mark.parametrize("num_failing", [1, 1_000_000])
@pytest.mark.parametrize("slots", [(0, 1, 2), (0, 2), (0,)])
def test_any_failing_allocation_of_a_transition_leaves_a_whole_layout(
    world: World, slots: tuple[int, ...], num_failing: int
) -> None:
    """`num_failing` 1: one allocation fails, and the next would not; else none succeeds any more from there on."""
    ends: list[str] = []
    for number in range(1, 1_000):
        world.machine.num_calls, world.machine.failing = 0, range(number, number + num_failing)
        ends.append(try_transition(world, slots))
        world.check()
        if not world.machine.has_failed:
            break
        undo(world)
        world.check()
    assert len(ends) > 3
    assert ends[-1] == "released"
    assert {len(memory.kv) for memory in world.holdings.memories.values() if memory.kv} == set(world.kv.values())
    if slots != (0,):  # there nothing comes, so nothing can fail to: only KV is made, after the flip
        assert ends[0] == "aborted"


def test_a_leavers_mailbox_stays_while_a_rank_that_may_have_it_is_between_two_connections(
    tiny_mixtral: Path, tmp_path: Path
) -> None:
    world = World(tiny_mixtral, tmp_path, exchange="mailbox")
    try:
        assert try_transition(world, (0, 1, 2)) == "released"
        request = world.request(0, 1)
        world.transitions.stage(request)
        world.turn_to("staged")
        world.transitions.commit(request.id)
        world.flip()
        world.turn_to("flipped")
        for slot in (1, 2):  # the one resumes, the other has left
            del world.by_slot[slot]
            world.transitions.on_detach(slot)
        world.transitions.release(request.id)
        for _ in range(20):
            world.turn_to("releasing")
        assert world.holdings.memories["host:2"].mailbox is not None
        world.attach(1)
        world.transitions.on_attach(1)
        world.turn_to("released")
        assert world.holdings.memories["host:2"].mailbox is None
    finally:
        world.close()


def test_who_comes_to_a_slot_is_not_taken_for_who_left_it(tiny_mixtral: Path, tmp_path: Path) -> None:
    """Its leader would give out as many KV blocks as the last one there had."""
    world = World(tiny_mixtral, tmp_path, tp=2)
    try:
        segment = world.holdings.segment
        assert segment is not None
        assert segment.bus is not None
        for slot in range(4):
            Bus(segment.shared.address, segment.shared.nbytes, slot).set_kv_blocks(7)
        assert try_transition(world, (0, 1)) == "released"
        world.transitions.stage(world.request(0, 1, 2, 3))
        assert [segment.bus.kv_blocks(slot) for slot in range(4)] == [7, 7, 0, 0]
        world.turn_to("staged")
    finally:
        world.close()


def test_a_leaving_followers_kv_stays_as_long_as_its_leader_may_have_it_copied(
    tiny_mixtral: Path, tmp_path: Path
) -> None:
    world = World(tiny_mixtral, tmp_path, tp=2)
    try:
        request = world.request(0, 1)
        world.transitions.stage(request)
        world.turn_to("staged")
        world.transitions.commit(request.id)
        world.flip()
        world.turn_to("flipped")
        del world.by_slot[3]  # it has no sequences, and has left
        world.transitions.on_detach(3)
        world.transitions.release(request.id)
        for _ in range(20):
            world.turn_to("releasing")
        assert all(world.holdings.memories[f"host:{slot}"].kv for slot in (2, 3))
        del world.by_slot[2]
        world.transitions.on_detach(2)
        world.turn_to("released")
        assert not any(world.holdings.memories[f"host:{slot}"].kv for slot in (2, 3))
    finally:
        world.close()


def test_kv_that_cannot_be_made_again_is_told_and_made_by_the_next_transition(world: World) -> None:
    world.machine.failing = range(1, 1_000)
    request = world.request(0)
    world.transitions.stage(request)
    if world.turn_to("staged", "failed") == "failed":
        world.transitions.abort(request.id)
        world.turn_to("aborted")
    else:
        world.transitions.commit(request.id)
        world.flip()
        world.turn_to("flipped")
        del world.by_slot[1]
        world.transitions.release(request.id)
        world.turn_to("released")
    status = world.transitions.status()
    assert status is not None
    assert status.error is not None
    assert status.error.code == DoesNotFit.code
    world.check()
    undo(world)
    world.check()


def test_no_descriptors_for_another_layout_is_a_refusal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.eventfd

    def eventfd(*arguments: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "eventfd", eventfd)
    request = world.request(0, 1, 2)
    with pytest.raises(Unavailable, match="no descriptors for 3 seats"):
        world.transitions.stage(request)
    world.check()
    monkeypatch.setattr(os, "eventfd", real)
    assert try_transition(world, (0, 1, 2)) == "released"
