"""A rank whose connection has ended may live on: what it has mapped is not given back under its feet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elasticmoe.common.layout import initial_layout
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.handles import Attach, SeatMemory
from elasticmoe.common.protocol.hmm import LoadModel, RecordCopy, StageLayout
from elasticmoe.common.protocol.ids import TransitionId
from tests.sim.heap import Sim
from tests.sim.hmm import BLOCK_SIZE, MAX_MODEL_LEN, MAX_SEQUENCES, MAX_TOKENS, PAGE, SPEC, Hmm

DEVICES = ("host:0", "host:1")
OP = TransitionId("op")
KEY = RecordKey("expert", 0, 0)  # of host:0; host:1 gets it too


class Channel:
    """To a rank that maps at once what it is sent."""

    def __init__(self, hmm: Hmm, slot: int) -> None:
        self.process = SimpleNamespace(seat=SimpleNamespace(slot=slot))
        self.is_closed = False
        self._hmm = hmm

    def tell(self, message: Any) -> None:
        if isinstance(message, SeatMemory):
            self._hmm.after(0.0, self._hmm.applied, self, message.revision)


def attach(hmm: Hmm, slot: int) -> Any:
    assert hmm.loaded is not None
    channel: Any = Channel(hmm, slot)
    seat = hmm.loaded.layout.seats[slot]
    hmm.introduce(channel, Attach(seat.rank, slot, seat.device, f"rank-{slot}"))
    return channel


@pytest.fixture
def hmm() -> Hmm:
    """With a transition staged: host:1 holds what only the next layout needs."""
    layout = initial_layout(SPEC.num_experts_by_layer, DEVICES)
    assert layout.owners(0)[0] == 0
    load = LoadModel("load", "/m", "float32", layout, BLOCK_SIZE, 4 * PAGE, MAX_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN)
    sim = Sim(1)
    world: Any = SimpleNamespace(sim=sim, disk={}, ranks={})
    hmm = Hmm(world, DEVICES, 420 << 10, load)
    for slot in layout.slots:
        attach(hmm, slot)
    hmm.service._members.publish(layout.slots, True)
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
