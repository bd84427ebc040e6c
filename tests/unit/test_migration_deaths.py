"""Ranks that die while sequences move between them, each replaced by one that adopts its rows: at every moment, on
either side, every token comes, and nothing stays behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from elasticmoe.common.protocol import rank as rank_messages
from elasticmoe.common.protocol.peer import Taken
from elasticmoe.common.protocol.rank import Unreserve
from elasticmoe.common.transport import Server, Sockets
from elasticmoe.services.worker.engine.adoption import adopt_rows
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.migration import Migration
from tests.unit.migration_world import MAX_MODEL_LEN, MAX_SEQUENCES, ROUTER, SECONDS_MAX, Node, World
from tests.unit.ranks import Ranks

VOCAB = 260


@pytest.fixture(scope="module")
def models(directory: Path) -> list[Ranks]:
    return [Ranks(directory, 1, max_tokens=16) for _ in range(3)]


@pytest.fixture
def world(directory: Path, models: list[Ranks], tmp_path: Path) -> Iterator[World]:
    world = World(directory, tmp_path, models)
    yield world
    world.close()


def replace(world: World, number: int) -> Node:
    """kill -9 of a rank; another takes its seat, the others learn of it, and the router starts anew what nobody has."""
    old = world.nodes[number]
    old.die()
    new = Node.__new__(Node)
    new.__dict__ |= old.__dict__
    incarnation = f"rank-{old.rank}:{int(old.seat.incarnation.rpartition(':')[2], 16) + 16:016x}"
    new.seat = msgspec.structs.replace(old.seat, incarnation=incarnation)
    new.server = Server(world.socket(f"rank-{old.rank}"), incarnation, rank_messages.CODEC)
    new.engine = Engine(
        old.engine._model,
        old.engine._exchange,
        old.engine.kv,
        old.engine.ledger,
        max_tokens=16,
        max_sequences=MAX_SEQUENCES,
        max_model_len=MAX_MODEL_LEN,
    )
    new.engine.memory_kept_by_the_test = old.engine.memory_kept_by_the_test  # type: ignore[attr-defined]
    new.watched, new.seen, new.is_alive, new.is_deaf = set(), [], True, False
    new.lost = set()
    new.migration = Migration(
        new.seat, new.engine, Sockets(world.socket), watch=new.watched.add, unwatch=new.watched.remove
    )
    world.nodes[number] = new
    world.take(new, adopt_rows(new.engine, VOCAB))
    connect_again(world, new)
    for node in world.nodes:
        node.migration.ask_again()
    for name, request in world.requests.items():
        if request.node is old:
            request.node = new
        if not request.is_over and not any(name in node.ids for node in world.nodes):
            new.engine.add(msgspec.structs.replace(request.submit, output=tuple(request.tokens)), ROUTER, world.now)
    return new


def connect_again(world: World, new: Node) -> None:
    """Those who had a connection to the dead have one to `new`: a death is noticed by sockets long before the others
    are told of it, and what is sent in between is lost."""
    for node in world.nodes:
        if node is new or f"rank-{new.rank}" not in node.migration._outgoing._links:
            continue
        mark = Unreserve(f"from {node.rank}", ROUTER)  # a sequence that nobody has
        deadline = time.monotonic() + SECONDS_MAX
        while mark not in new.seen:
            assert time.monotonic() < deadline
            node.migration._outgoing.tell(new.rank, mark, world.now)
            new.server.poll(20)
            new.take_messages()


def stages(world: World) -> set[str]:
    return {transfer.stage for node in world.nodes for transfer in node.migration._outgoing.transfers}


@pytest.mark.parametrize("stage", ["reserving", "ready", "copying", "handing", "taken", "over"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_death_at_each_stage(world: World, stage: str, number: int) -> None:
    a, b, _ = world.nodes
    request = world.submit(a, "r", [3, 4, 5] * 15, 90)
    world.submit(b, "other", [7] * 9, 60)
    world.until(lambda: len(request.tokens) >= 20)
    if stage == "copying":
        world.hmm_turn = lambda: None
    if stage == "taken":
        b.lost = {Taken}
    a.move_to((b, 1))
    if stage == "over":
        world.until(lambda: request.node is b)
    elif stage == "taken":
        world.until(lambda: "r" in b.ids)
    elif stage == "handing":
        world.until(lambda: "copying" in stages(world))
        b.is_deaf = True  # it dies without having read the hand-over
        world.until(lambda: "handing" in stages(world))
        assert "r" not in b.ids
    else:
        world.until(lambda: stage in stages(world) or "handing" in stages(world))
    replace(world, number)
    world.hmm_turn = world.answer_copies
    before = world.now
    world.until(lambda: request.is_over)
    assert world.now - before < 4.0  # nobody waits for an answer that cannot come
    world.tick = 0.5  # places that were kept for the dead expire
    world.finish()


@pytest.mark.parametrize("seed", range(6))
def test_random_deaths(world: World, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(6):
        world.submit(rng.choice(world.nodes), f"r{number}", [number] * rng.randrange(1, 50), rng.randrange(20, 90))
    for _ in range(8):
        for _ in range(rng.randrange(1, 25)):
            world.turn()
        node = rng.choice(world.nodes)
        targets = [(other, rng.randrange(3)) for other in world.nodes if other is not node]
        node.move_to(*targets)
        for _ in range(rng.randrange(12)):
            world.turn()
        if rng.random() < 0.6:
            replace(world, rng.randrange(3))
    for node in world.nodes:
        node.move_to()
    world.until(lambda: all(request.is_over for request in world.requests.values()))
    world.tick = 0.5
    world.finish()
