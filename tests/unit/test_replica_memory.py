"""From a checkpoint to the ranks of one replica: what the HMM hands to each is what they compute with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from elasticmoe.cli.models import configs, random_checkpoint
from elasticmoe.common.layout import RankId, Seat, initial_layout
from elasticmoe.services.hmm.memory.catalog import Loaded
from elasticmoe.services.hmm.sessions.handles import attach_reply, full_view, seat_memory, shares
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.exchange.factory import open_exchange
from elasticmoe.services.worker.hmm.memory import RankMemory
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from elasticmoe.services.worker.model.registry import build_model
from tests.unit.loading import PAGE, World
from tests.unit.ranks import DEADLINE_MS, Ranks
from tests.unit.threads import at_once

SEATS = (Seat(RankId(3, 0), 1, "host:0"), Seat(RankId(3, 1), 0, "host:1"))  # the leader in the higher slot
MAX_TOKENS = 32


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "model", configs.TINY_DEEPSEEK_V3, seed=3, dtype="float32")


@pytest.fixture
def bells() -> Iterator[dict[int, int]]:
    bells = {slot: os.eventfd(0) for slot in range(2)}
    yield bells
    for fd in bells.values():
        os.close(fd)


def attach(world: World, loaded: Loaded, bells: dict[int, int], seat: Seat) -> RankMemory:
    """The memory of the rank on a device, handed over as by the HMM's socket."""
    holdings: Any = SimpleNamespace(
        loaded=loaded, segment=world.segment, granularity=PAGE, doorbells=bells, memories=world.memories
    )
    memory = world.memories[seat.device]
    reply, fds = attach_reply(memory, holdings)
    told, offer = seat_memory(full_view(memory, loaded, None), memory, holdings, 0)
    messages = (*(make() for make in shares(offer, ())), (msgspec.structs.replace(told, revision=1), offer.fds))
    handed = [(message, [os.dup(fd) for fd in own]) for message, own in messages]
    return RankMemory(reply, [os.dup(fd) for fd in fds], seat.device, seat.slot, handed, seat.rank.tp)


def test_two_ranks_compute_with_what_they_are_handed(
    world: World, directory: Path, bells: dict[int, int], tmp_path: Path
) -> None:
    ranks = Ranks(directory, 1, tp=2)
    counts = ranks.spec.num_experts_by_layer
    layout = msgspec.structs.replace(initial_layout(counts, ["host:0", "host:1"], tp=2), seats=SEATS)
    loaded = world.load(directory, layout=layout, block_size=4).run()
    assert world.segment.bus is not None
    world.segment.bus.set_membership(1, 0b11, True)
    parts = [BatchPart([5, 6, 7, 8, 9], 0, [0, 1], 5)]
    memories = [attach(world, loaded, bells, seat) for seat in SEATS]
    try:
        works = []
        for memory, seat in zip(memories, SEATS, strict=True):
            assert memory.replica == (1, 0)
            memory.bus.join(seat.slot + 1)
            backend = HostBackend()
            model = build_model(backend, memory.weights, MAX_TOKENS)
            exchange = open_exchange(memory, backend, tmp_path / "rendezvous")
            exchange.set_routing(1, [layout.owners(layer) for layer in range(len(counts))])

            def compute(model: Any = model, exchange: Exchange = exchange) -> torch.Tensor:
                exchange.begin_step(5, DEADLINE_MS)
                logits: torch.Tensor = model.forward(Batch(parts, 4), exchange).clone()
                return logits

            works.append(compute)
        leader, follower = at_once(*works)
    finally:
        for memory in memories:
            memory.close()
    assert follower.shape == (0, ranks.spec.vocab)
    assert torch.equal(leader, ranks.step([parts])[0])
