"""A rank whose connection has ended may live on: what it has mapped is not given back under its feet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elasticmoe.common.layout import Layout, RankId, Seat, initial_layout, keys_on
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.handles import Attach, AttachReply, SeatMemory
from elasticmoe.common.protocol.hmm import LoadModel, RecordCopy, StageLayout
from elasticmoe.common.protocol.ids import TransitionId
from tests.sim.heap import Sim
from tests.sim.hmm import SPEC, Hmm
from tests.sim.memory import BLOCK_SIZE, MAX_MODEL_LEN, MAX_SEQUENCES, MAX_TOKENS, PAGE

DEVICES = ("host:0", "host:1")
OP = TransitionId("op")
JOINING = Seat(RankId(2, 0), 2, "host:2")
KEY = RecordKey("expert", 0, 0)  # of host:0; host:1 gets it too


class Channel:
    """To a rank that maps at once what it is sent."""

    def __init__(self, hmm: Hmm, slot: int) -> None:
        self.process = SimpleNamespace(seat=SimpleNamespace(slot=slot))
        self.is_closed = False
        self.told: list[Any] = []
        self._hmm = hmm

    def tell(self, message: Any) -> None:
        self.told.append(message)
        if isinstance(message, SeatMemory):
            self._hmm.after(0.0, self._hmm.applied, self, message.revision)


def attach(hmm: Hmm, slot: int) -> Any:
    assert hmm.loaded is not None
    channel: Any = Channel(hmm, slot)
    seat = hmm.loaded.layout.seats[slot]
    hmm.introduce(channel, Attach(seat.rank, slot, seat.device, f"rank-{slot}"))
    return channel


def loaded(devices: tuple[str, ...]) -> tuple[Hmm, Layout]:
    """With ranks on DEVICES, and their layout."""
    layout = initial_layout(SPEC.num_experts_by_layer, DEVICES)
    load = LoadModel("load", "/m", "float32", layout, BLOCK_SIZE, 4 * PAGE, MAX_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN)
    sim = Sim(1)
    world: Any = SimpleNamespace(sim=sim, disk={}, ranks={})
    hmm = Hmm(world, devices, 420 << 10, load)
    for slot in layout.slots:
        attach(hmm, slot)
    hmm.service._members.publish(layout.slots, True)
    return hmm, layout


@pytest.fixture
def hmm() -> Hmm:
    """With a transition staged: host:1 holds what only the next layout needs."""
    hmm, layout = loaded(DEVICES)
    assert layout.owners(0)[0] == 0
    homes = (((1,), *layout.homes[0][1:]), *layout.homes[1:])
    kv = dict.fromkeys(DEVICES, 4)
    after = msgspec.structs.replace(layout, epoch=layout.epoch + 1, homes=homes)
    hmm.transitions.stage(StageLayout(OP, after, (RecordCopy(KEY, *DEVICES),), kv, kv))
    pass_time(hmm, 2.0)
    assert phase(hmm) == "staged"
    assert KEY in hmm.memories["host:1"].records
    return hmm


def pass_time(hmm: Hmm, seconds: float) -> None:
    hmm.sim.run(hmm.sim.now + seconds)
    hmm.turn()
    hmm.sim.run(hmm.sim.now + 0.1)


def phase(hmm: Hmm) -> str:
    assert hmm.transition is not None
    return hmm.transition.phase


def test_memory_stays_until_the_rank_has_resumed_and_let_go(hmm: Hmm) -> None:
    hmm.detached(hmm.by_slot[1].channel)
    hmm.transitions.abort(OP)
    pass_time(hmm, 4.0)
    assert phase(hmm) == "aborting"
    assert KEY in hmm.memories["host:1"].records
    attach(hmm, 1)
    pass_time(hmm, 0.1)
    assert phase(hmm) == "aborted"
    assert KEY not in hmm.memories["host:1"].records


@pytest.mark.parametrize("gone", [(), (1,)])
def test_memory_of_a_rank_that_has_ended_goes(hmm: Hmm, gone: tuple[int, ...]) -> None:
    """At once where the scaler knows it, else when it could have resumed."""
    hmm.detached(hmm.by_slot[1].channel)
    hmm.transitions.abort(OP, gone)
    pass_time(hmm, 0.1)
    assert (phase(hmm) == "aborted") == bool(gone)
    pass_time(hmm, 6.0)
    assert phase(hmm) == "aborted"
    assert KEY not in hmm.memories["host:1"].records


def test_who_resumes_when_all_was_given_back_is_refused() -> None:
    """A rank of a seat that was given up again, which had not ended though its connection had."""
    hmm, layout = loaded((*DEVICES, "host:2"))
    after = msgspec.structs.replace(layout, epoch=layout.epoch + 1, seats=(*layout.seats, JOINING))
    kv = dict.fromkeys((*DEVICES, JOINING.device), 4)
    copies = tuple(RecordCopy(key, DEVICES[0], JOINING.device) for key in keys_on(after, JOINING.slot))
    hmm.transitions.stage(StageLayout(OP, after, copies, kv, kv))
    pass_time(hmm, 2.0)
    assert phase(hmm) == "staged"
    channel: Any = Channel(hmm, JOINING.slot)
    request = Attach(JOINING.rank, JOINING.slot, JOINING.device, "joining")
    hmm.introduce(channel, request)
    assert isinstance(channel.told[0], AttachReply)
    hmm.detached(channel)
    hmm.transitions.abort(OP)
    assert hmm.memories[JOINING.device].ledger is None
    assert phase(hmm) == "aborting"
    again: Any = Channel(hmm, JOINING.slot)
    hmm.introduce(again, msgspec.structs.replace(request, resume=True))
    assert [message.code for message in again.told] == ["not_found"]
    assert "was given back" in again.told[0].message
    pass_time(hmm, 1.0)
    assert phase(hmm) == "aborted"
