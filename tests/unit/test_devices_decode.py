"""Ranks that decode, and flip to another layout, ask nothing of their devices' drivers, but what the exchange itself is
on NPUs: the copies between their mailboxes. As the stand-ins count calls. Memory, lockstep, exchange and model are the
product's, and so is what the HMM tells ranks; the rest of it is played. What torch asks to compute is not seen: it
computes on the CPU here."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.devices.base import KeyToken
from elasticmoe.common.devices.rules import Handle, ProcessRules
from elasticmoe.common.families import record
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import Layout, initial_layout
from elasticmoe.common.model_spec import RecordKey, round_up
from elasticmoe.common.protocol.handles import (
    AttachReply,
    Routing,
    SeatMemory,
    Segment,
    SharedFd,
    SharedHandle,
    SharedKey,
    SharedMailbox,
)
from elasticmoe.native.bus import Bus, bus_bytes, format_bus
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.sessions.handles import Importer, View, seat_memory
from elasticmoe.services.worker.backends.factory import open_backend
from elasticmoe.services.worker.exchange.base import StepAborted
from elasticmoe.services.worker.exchange.factory import open_exchange
from elasticmoe.services.worker.exchange.shm_barrier import ShmBarrier
from elasticmoe.services.worker.hmm import memory as memory_module
from elasticmoe.services.worker.hmm.memory import RankMemory
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from elasticmoe.services.worker.model.registry import build_model
from elasticmoe.services.worker.rank.lockstep import Lockstep
from tests.devices import standins
from tests.unit.test_rank_memory import SPEC, Owner

RANKS = 2
TOKENS = 8  # of a rank in a step, at most
STEPS = 8
BLOCK_SIZE = 4
BLOCKS = list(range(STEPS // BLOCK_SIZE))
PAGE = standins.GRANULARITY
DEADLINE_MS = 60_000.0
EXPERTS = [(layer, expert) for layer, count in enumerate(SPEC.num_experts_by_layer) for expert in range(count)]
MAILBOX_BYTES = round_up(TOKENS * (1 + SPEC.moe.top_k) * SPEC.hidden * 4, PAGE)


def owner_of(epoch: int, layer: int, expert: int) -> int:
    """The slot: in the second layout every expert is the other rank's."""
    return (layer + expert + epoch) % RANKS


ROUTINGS = tuple(
    Routing(epoch, tuple(tuple(owner_of(epoch, layer, e) for e in range(n)) for layer, n in enumerate(counts)))
    for epoch, counts in ((epoch, SPEC.num_experts_by_layer) for epoch in (1, 2))
)


class DeviceOwner(Owner):
    """What the HMM holds on one device: records that a model can compute with, and a mailbox."""

    def handle(self, key: RecordKey) -> Handle:
        if key not in self.handles:
            nbytes = round_up(record(SPEC, key).nbytes, PAGE)
            made = self.handles[key] = self.device.create(nbytes, "weights")
            seed = 1_000 * key.layer + key.expert + 1
            numbers = torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(seed)) * 0.1
            range_ = self.device.reserve(nbytes)
            self.device.map(range_, 0, made, True)
            self.device.write_bytes(range_.base, numbers.numpy().tobytes())
            self.device.unmap(range_, 0)
        return self.handles[key]

    def with_mailboxes(self, seat: SeatMemory, mailboxes: list[tuple[DeviceOwner, Handle]]) -> SeatMemory:
        """The goal of a seat that exchanges tokens with all."""
        named = []
        for slot, (there, handle) in enumerate(mailboxes):
            token = there.device.export(handle)
            if isinstance(token, KeyToken):
                shared: SharedKey | SharedFd = SharedKey(token.key)
            else:
                self.fds.append(os.dup(token.fd))
                shared = SharedFd(len(self.fds) - 1, token.offset, token.key)
            named.append(SharedMailbox(slot, SharedHandle(there.device.id_of(handle), token.nbytes, shared)))
        return msgspec.structs.replace(seat, mailboxes=tuple(named))


class DecodingRank:
    """A rank's own parts, in the place of a process: what it computes of one sequence, again from its beginning in each
    layout. `logits`: of each step."""

    def __init__(self, memory: RankMemory, slot: int, folder: Path) -> None:
        self.memory = memory
        memory.bus.join(slot + 1)
        barrier = ShmBarrier(memory.bus, memory.doorbells, slot)
        backend = open_backend("torch", barrier.tell_waiting, memory.device.open_torch())
        self._exchange = open_exchange(memory, backend, folder)
        self._model = build_model(backend, memory.weights, TOKENS)
        self.lockstep = Lockstep(barrier, self._exchange, memory.routings, slot, SYSTEM_CLOCK)
        self._slot = slot
        self.logits: list[torch.Tensor] = []

    def decode(self, num_steps: int) -> None:
        """So many more steps, with a flip before them where one is staged."""
        end = len(self.logits) + num_steps
        while len(self.logits) < end:
            self.lockstep.sync()
            assert self.lockstep.is_member, "the other rank has failed"
            try:
                total = self.lockstep.meet(1)
            except StepAborted:  # the other one was quicker to flip
                self.lockstep.abort()
                continue
            if total:
                position = len(self.logits) % STEPS
                part = BatchPart([17 * position + self._slot], position, BLOCKS, 1)
                self._exchange.begin_step(total, DEADLINE_MS)
                self.logits.append(self._model.forward(Batch([part], BLOCK_SIZE), self._exchange).clone())


class TwoDevices:
    """Two accelerators of a kind, the HMM that owns their memory, and a rank on each."""

    def __init__(self, kind: str, memory: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.copies_by_driver = kind == "npu"
        processes = [standins.process(kind, memory) for _ in range(1 + RANKS)]
        self._libraries = [standins.loaded(process) for process in processes]
        rules = ProcessRules()
        self.owners = [
            DeviceOwner(processes[0](f"{kind}:{slot}", PAGE, 256 << 20, rules=rules)) for slot in range(RANKS)
        ]
        self._mailboxes = [(owner, owner.device.create(MAILBOX_BYTES, "mailbox")) for owner in self.owners]
        memories = {owner.device.name: DeviceMemory(owner.device) for owner in self.owners}
        for owner, mailbox in self._mailboxes:
            memories[owner.device.name].mailbox = mailbox
        self._holdings: Any = SimpleNamespace(memories=memories, doorbells=dict.fromkeys(range(RANKS), 0))
        before = initial_layout(SPEC.num_experts_by_layer, list(memories))
        self.layouts = (before, msgspec.structs.replace(before, epoch=before.epoch + 1))
        shape = (RANKS, TOKENS, SPEC.hidden, SPEC.moe.top_k)
        self._bus = HostShared.create("bus")
        self._bus.resize(round_up(bus_bytes(*shape), 4096))
        format_bus(self._bus.address, self._bus.nbytes, *shape)
        self.hmm = Bus(self._bus.address, self._bus.nbytes)
        users = processes[1:]
        numbers = [user.importer_number(slot) for slot, user in enumerate(users)]
        self._importers = [Importer(number) for number in numbers]
        for owner in self.owners:
            owner.device.admit(numbers)
        self.ranks = []
        for slot, user in enumerate(users):
            patch.setattr(memory_module, "open_device", partial(user, rules=ProcessRules()))  # a process of its own
            self.ranks.append(self._rank(f"{kind}:{slot}", slot, folder))

    def _rank(self, device: str, slot: int, folder: Path) -> DecodingRank:
        owner = self.owners[slot]
        goal = self.goal(slot, EXPERTS)
        handed = [(owner.shared, owner.shared_fds), (goal, owner.fds)]
        return DecodingRank(RankMemory(*self._reply(owner), device, slot, handed), slot, folder)

    def goal(self, slot: int, experts: list[tuple[int, int]]) -> SeatMemory:
        """Of the seat in a slot; what goes with it is its owner's to hand."""
        owner = self.owners[slot]
        seat = msgspec.structs.replace(owner.seat(experts, len(BLOCKS)), routings=ROUTINGS)
        return owner.with_mailboxes(seat, self._mailboxes)

    def _reply(self, owner: DeviceOwner) -> tuple[AttachReply, list[int]]:
        reply, fds = owner.reply()
        os.close(fds[reply.bus.fd])
        fds[reply.bus.fd] = os.dup(self._bus.fd)
        segment = Segment(reply.bus.fd, self._bus.nbytes)
        identity = owner.device.identity
        return msgspec.structs.replace(reply, bus=segment, exchange="mailbox", identity=identity), fds

    def tell(self, *layouts: Layout) -> None:
        """What the HMM does in each phase of a change: it works out what each rank shall have for these layouts."""
        for importer, memory in zip(self._importers, self._holdings.memories.values(), strict=True):
            seat, _ = seat_memory(View({}, [], layouts), memory, self._holdings, importer)
            assert len(seat.mailboxes) == RANKS

    def num_calls(self) -> int:
        """Of the driver, by all three processes."""
        return sum(library.standin_calls() for library in self._libraries)

    def num_copies(self) -> int:
        """Of those, what ranks have copied between mailboxes."""
        return sum(
            library.standin_num_copied() for library in self._libraries if hasattr(library, "standin_num_copied")
        )

    def together(self, act: Callable[[DecodingRank], None]) -> None:
        """Each rank in a thread of its own."""
        errors: list[BaseException] = []

        def run(rank: DecodingRank) -> None:
            try:
                act(rank)
            except BaseException as error:
                errors.append(error)
                self.hmm.set_membership(self.hmm.membership()[0] + 2, 0, False)  # the other one does not wait

        threads = [threading.Thread(target=run, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def close(self) -> None:
        for rank in self.ranks:
            rank.memory.close()
        for owner in self.owners:
            owner.device.close()
        self._bus.close()


@pytest.fixture(params=standins.KINDS)
def devices(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoDevices]:
    with standins.memory(monkeypatch) as memory:
        made = TwoDevices(request.param, memory, tmp_path / "exchange", monkeypatch)
        yield made
        made.close()


def test_decoding_and_a_flip_make_no_call_of_the_driver(devices: TwoDevices) -> None:
    """The memory of both layouts is mapped before; what goes is unmapped afterwards, and that is seen. NPUs let no
    kernel copy between mailboxes (ADR 34): the driver does it by two calls for each member and way, as torch computes
    at once here, else by one; and a thread says once which device is its own. The HMM asks for nothing in any phase of
    the change: a rank is admitted to mailboxes when it attaches, and to those of joiners when they are made."""
    attaching = devices.num_calls()
    devices.tell(devices.layouts[0])
    assert devices.num_calls() - attaching == (2 * RANKS**2 if devices.copies_by_driver else 0)  # an NPU admits each
    devices.hmm.set_membership(1, (1 << RANKS) - 1, True, 1)
    before, copies_before = devices.num_calls(), devices.num_copies()
    devices.together(lambda rank: rank.decode(STEPS))
    assert [rank.lockstep.epoch for rank in devices.ranks] == [1] * RANKS
    devices.tell(*devices.layouts)
    devices.hmm.stage_membership(2, (1 << RANKS) - 1, 2)
    devices.together(lambda rank: rank.decode(STEPS))
    devices.tell(devices.layouts[1])
    assert [rank.lockstep.epoch for rank in devices.ranks] == [2] * RANKS
    num_copies, num_threads = devices.num_copies() - copies_before, 2 * RANKS
    by_exchange = 2 * num_copies + num_threads if devices.copies_by_driver else 0
    assert devices.num_calls() == before + by_exchange
    if devices.copies_by_driver:
        num_layers = sum(count > 0 for count in SPEC.num_experts_by_layer)
        assert 0 < num_copies <= 2 * STEPS * num_layers * RANKS * RANKS * 2
    before = devices.num_calls()
    for rank in devices.ranks:
        assert torch.isfinite(torch.cat(rank.logits)).all()
        assert torch.equal(torch.cat(rank.logits[:STEPS]), torch.cat(rank.logits[STEPS:]))
    for slot, rank in enumerate(devices.ranks):
        owner = devices.owners[slot]
        seat = devices.goal(slot, [one for one in EXPERTS if owner_of(2, *one) == slot])
        rank.memory.take(owner.shared, owner.shared_fds)
        rank.memory.take(seat, owner.fds)
        while not rank.memory.advance(lambda _: True):
            pass
    assert devices.num_calls() >= before + len(EXPERTS), "one is unmapped of each expert, by one of the ranks"
