"""Sequences that move between ranks while they run: same tokens, nothing lost, nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.peer import Reserved, Taken
from elasticmoe.common.protocol.rank import HandOver, Reserve, Sampling, Submit, Unreserve
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.worker.engine.engine import Engine
from tests.unit.migration_world import ROUTER, Node, World
from tests.unit.ranks import Ranks


@pytest.fixture(scope="module")
def models(directory: Path) -> list[Ranks]:
    return [Ranks(directory, 1, max_tokens=16) for _ in range(3)]


@pytest.fixture
def world(directory: Path, models: list[Ranks], tmp_path: Path) -> Iterator[World]:
    world = World(directory, tmp_path, models)
    yield world
    world.close()


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(260) for _ in range(length)]


def running(node: Node, name: str, num_output: int = 1) -> bool:
    sequence = node.engine.scheduler.get(ROUTER, name)
    return sequence is not None and sequence.num_output >= num_output


def test_moves_in_decode_with_its_kv(world: World) -> None:
    a, b, _ = world.nodes
    request = world.submit(a, "r", prompt(1, 50), 80)
    world.until(lambda: running(a, "r", 20))
    a.move_to((b, 1))
    world.until(lambda: request.node is b)
    sequence = b.engine.scheduler.get(ROUTER, "r")
    assert sequence is not None
    assert sequence.kv_len >= 70  # nothing is computed again
    assert world.num_copied >= 12
    assert (a.migration.handed_over, b.migration.taken_over, a.migration.num_moving) == (1, 1, 0)
    assert a.ids == set()
    assert not a.migration.has_work
    world.finish()


def test_where_other_ranks_have_parts_of_the_blocks_all_are_copied_before_the_hand_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are more than one copy takes."""
    monkeypatch.setattr(Engine, "has_followers", property(lambda _: True))
    monkeypatch.setattr("elasticmoe.services.worker.migration.outgoing.BLOCKS_PER_COPY_MAX", 3)
    a, b, _ = world.nodes
    request = world.submit(a, "r", prompt(1, 50), 80)
    world.until(lambda: running(a, "r", 20))
    a.move_to((b, 1))
    world.until(lambda: request.node is b)
    assert [message.tail for message in b.seen if isinstance(message, HandOver)] == [b""]
    world.finish()


def test_what_comes_in_the_message_is_refused_where_other_ranks_have_parts_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "has_followers", property(lambda _: True))
    node, tokens = world.nodes[0], list(range(11))
    reserve(node, tokens, 4)
    with pytest.raises(ElasticMoEError, match="2 blocks not copied on all ranks"):
        node.migration.take("x:1", hand_over(node, tokens, 10, 1, 2), 0.0)
    assert node.engine.check_integrity() == []
    assert node.migration.take("x:1", hand_over(node, tokens, 10, 3, 0), 0.0) == Taken("r")


def test_moves_in_the_midst_of_a_prompt(world: World) -> None:
    a, b, _ = world.nodes
    request = world.submit(a, "r", prompt(2, 120), 20, prompt_logprobs=True)
    world.turn()
    world.turn()
    a.is_stepping = False
    a.move_to((b, 1))
    world.until(lambda: request.node is b)
    b_sequence = b.engine.scheduler.get(ROUTER, "r")
    assert b_sequence is not None
    assert b_sequence.num_output == 0 or request.tokens
    world.finish()
    assert request.prompt_logprobs is not None
    assert len(request.prompt_logprobs) == 119


def test_leaving_hands_over_all_also_what_waits_and_what_comes(world: World) -> None:
    a, b, c = world.nodes
    for number in range(9):
        world.submit(a, f"r{number}", prompt(number, 10 + number), 40)
    world.turn()
    assert a.engine.scheduler.waiting
    a.move_to((b, 0), (c, 0), is_leaving=True)
    a.is_stepping = False  # it is no member any more
    late = world.submit(a, "late", prompt(99, 12), 10)
    world.until(lambda: a.ids == set())
    assert late.node in (b, c)
    assert b.ids
    assert c.ids
    assert a.migration.is_leaving
    world.finish()
    assert a.migration.handed_over == 10


def test_leaving_rank_takes_nothing(world: World) -> None:
    a, b, c = world.nodes
    b.move_to((c, 0), is_leaving=True)
    world.submit(a, "r", prompt(1, 20), 60)
    world.until(lambda: running(a, "r"))
    a.is_stepping = False  # the sequence has not ended before it is asked for twice
    a.move_to((b, 1))
    world.until(lambda: b.seen_of(Reserve) >= 2)
    assert a.ids == {"r"}
    a.is_stepping = True
    b.move_to()
    assert not b.migration.is_leaving
    world.finish()


def test_levelling_moves_as_many_as_told(world: World) -> None:
    a, b, c = world.nodes
    for number in range(4):
        world.submit(a, f"r{number}", prompt(number, 20), 60 + number)
    world.until(lambda: all(running(a, f"r{n}") for n in range(4)))
    a.move_to((b, 1), (c, 2))
    world.until(lambda: a.migration.handed_over == 3)
    assert a.ids == {"r0"}  # the least to come
    assert (len(b.ids), len(c.ids)) == (1, 2)
    world.finish()


def test_shared_beginning_is_not_copied(world: World) -> None:
    a, b, _ = world.nodes
    shared = prompt(3, 64)
    world.submit(b, "there", [*shared, 1, 2], 60)
    world.submit(a, "r", [*shared, 9, 8, 7], 60)
    world.until(lambda: running(a, "r", 4) and running(b, "there"))
    a.move_to((b, 1))
    world.until(lambda: "r" in b.ids)
    one, other = (b.engine.scheduler.get(ROUTER, name) for name in ("r", "there"))
    assert one is not None
    assert other is not None
    assert one.blocks[:16] == other.blocks[:16]
    assert world.num_copied == 0
    world.finish()


def test_prompt_logprobs_are_computed_though_the_target_has_the_prompt(world: World) -> None:
    a, b, _ = world.nodes
    shared = prompt(3, 100)
    world.submit(b, "there", shared, 8)
    world.until(lambda: running(b, "there"))
    request = world.submit(a, "r", shared, 8, prompt_logprobs=True)
    world.turn()
    a.is_stepping = False
    a.move_to((b, 1))
    world.finish()
    assert request.node is b
    assert request.prompt_logprobs is not None
    assert len(request.prompt_logprobs) == 99


def test_target_that_refuses_is_asked_again(world: World) -> None:
    a, b, c = world.nodes
    request = world.submit(a, "r", prompt(1, 30), 100)
    world.until(lambda: running(a, "r"))
    b.move_to((c, 0), is_leaving=True)
    world.tick = 0.02
    a.move_to((b, 1))
    world.until(lambda: b.seen_of(Reserve) >= 3)
    assert a.migration.has_work
    b.move_to()
    world.until(lambda: request.node is b)
    world.finish()


def test_a_target_that_does_not_step_yet_gets_copies_and_no_sequence(world: World) -> None:
    a, b, _ = world.nodes
    request = world.submit(a, "r", prompt(1, 60), 60)
    world.members = 0b001
    a.move_to((b, 1))
    world.until(lambda: world.num_copied > 0)
    world.until(lambda: len(request.tokens) > 20)
    assert request.node is a
    assert not b.seen_of(HandOver)
    places = b.seen_of(Reserve)
    world.now += 11.0  # what is not heard of for long expires there
    world.until(lambda: b.seen_of(Reserve) > places)
    world.members = 0b011
    world.until(lambda: request.node is b)
    world.finish()


def test_full_target_keeps_what_it_needs(world: World) -> None:
    a, b, c = world.nodes
    for number in range(4):
        world.submit(b, f"b{number}", prompt(number, 50), 60)
    world.submit(a, "r", prompt(50, 40), 60)
    world.until(lambda: running(a, "r") and len(b.engine.scheduler.running) == 4)
    a.move_to((b, 0), (c, 0), is_leaving=True)
    world.until(lambda: a.ids == set())
    assert "r" in c.ids or b.seen_of(HandOver) == 1
    world.finish()


@pytest.mark.parametrize("stage", ["reserving", "copying", "handing", "gone"])
def test_cancel_at_each_stage(world: World, stage: str) -> None:
    a, b, _ = world.nodes
    request = world.submit(a, "r", prompt(1, 60), 90)
    world.until(lambda: running(a, "r", 3))
    if stage == "reserving":
        b.is_deaf = True
    elif stage == "copying":
        world.hmm_turn = lambda: None
    elif stage == "handing":
        b.lost = {Taken}
    a.move_to((b, 1))
    if stage == "gone":
        world.until(lambda: request.node is b)
        request.node = a  # the router's Cancel crossed the news
    elif stage == "handing":
        world.until(lambda: b.seen_of(HandOver) > 0)
    else:
        world.until(lambda: [t.stage for t in a.migration._outgoing.transfers] == [stage])
    world.cancel("r")
    if stage == "copying":
        assert b.engine.scheduler.holds  # the HMM may still be writing
        world.turn()
        assert b.engine.scheduler.holds
    b.is_deaf, world.hmm_turn = False, world.answer_copies
    world.finish()
    assert a.migration.num_moving == 0


def test_router_that_is_gone_ends_what_moves(world: World) -> None:
    a, b, _ = world.nodes
    b.lost = {Taken}
    request = world.submit(a, "r", prompt(1, 30), 90)
    world.until(lambda: running(a, "r"))
    a.move_to((b, 1))
    world.until(lambda: bool(a.engine.scheduler.detached) and b.seen_of(HandOver) > 0)
    request.is_cancelled = True
    a.engine.cancel_peer(ROUTER)
    b.lost = set()
    world.finish()


def test_lost_answer_is_asked_for_again(world: World) -> None:
    a, b, _ = world.nodes
    b.lost = {Taken}
    request = world.submit(a, "r", prompt(1, 30), 120)
    world.until(lambda: running(a, "r"))
    a.move_to((b, 1))
    world.until(lambda: b.seen_of(HandOver) == 1)
    b.lost = set()
    world.now += 6
    world.until(lambda: request.node is b)
    assert b.seen_of(HandOver) == 2
    assert b.migration.taken_over == 1
    world.finish()


def test_target_that_never_answers_leaves_the_sequence_here(world: World) -> None:
    a, b, _ = world.nodes
    b.lost = {Taken}
    request = world.submit(a, "r", prompt(1, 30), 125)
    world.until(lambda: running(a, "r"))
    a.move_to((b, 1))
    for attempt in (1, 2, 3):
        world.until(lambda n=attempt: b.seen_of(HandOver) == n)  # type: ignore[misc]
        b.is_stepping = False
        world.now += 6
    a.move_to()
    world.until(lambda: bool(a.engine.scheduler.running) and not b.ids)
    b.is_stepping = True
    world.finish()
    assert request.node is a
    assert a.migration.handed_over == 0


@pytest.mark.parametrize("is_handed", [False, True])
def test_target_dies(world: World, is_handed: bool) -> None:
    a, b, c = world.nodes
    b.lost = {Taken, Refused} if is_handed else {Reserved}
    request = world.submit(a, "r", prompt(1, 60), 90)
    world.until(lambda: running(a, "r", 2))
    a.move_to((b, 0), (c, 0), is_leaving=True)
    world.until(lambda: b.seen_of(HandOver if is_handed else Reserve) > 0)
    b.die()
    for _ in range(3 if is_handed else 1):
        world.now += 6
        world.turn()
    world.until(lambda: request.node is c)
    world.finish()


def test_hmm_that_is_gone_stops_no_sequence(world: World) -> None:
    a, b, _ = world.nodes
    world.hmm_turn = world.drop_copies
    request = world.submit(a, "r", prompt(1, 60), 90)
    world.until(lambda: running(a, "r", 2))
    a.move_to((b, 1))
    world.until(lambda: [t.stage for t in a.migration._outgoing.transfers] == ["copying"])
    world.now += 11
    world.turn()
    assert a.migration.num_moving == 0
    assert b.engine.scheduler.holds  # nobody can say whether it is still written to
    assert a.ids == {"r"}
    world.hmm_turn = world.answer_copies
    world.now += 11
    world.until(lambda: request.is_over or request.node is b)
    world.now += 31
    world.finish()


def test_preempted_sequence_is_handed_over_later(world: World) -> None:
    a, b, _ = world.nodes
    world.hmm_turn = lambda: None
    request = world.submit(a, "r", prompt(1, 60), 90)
    world.until(lambda: running(a, "r", 2))
    a.move_to((b, 1))
    world.until(lambda: [t.stage for t in a.migration._outgoing.transfers] == ["copying"])
    scheduler = a.engine.scheduler
    sequence = scheduler.running[0]
    a.engine.ledger.close_row(scheduler._stop(sequence))
    scheduler.waiting.append(sequence)
    world.turn()
    assert [t.stage for t in a.migration._outgoing.transfers] == ["draining"]
    world.hmm_turn = world.answer_copies
    world.until(lambda: request.node is b)
    world.finish()


def test_deadline_is_kept(world: World) -> None:
    a, b, _ = world.nodes
    message = Submit("r", tuple(prompt(1, 20)), 130, Sampling(seed=1, temperature=0.0), deadline_s=50.0)
    request = world.submit(a, "r", message.prompt, 130)
    world.cancel("r")
    request.is_cancelled, request.submit = False, message
    a.engine.add(message, ROUTER, world.now)
    world.until(lambda: running(a, "r"))
    world.now += 40
    a.move_to((b, 1))
    world.until(lambda: request.node is b)
    b.is_stepping = False
    world.now += 9
    world.turn()
    assert request.failed is None
    world.now += 2
    world.until(lambda: request.failed is not None)
    assert request.failed is not None
    assert request.failed.code == "deadline_exceeded"
    world.finish()


# ---- the receiving side alone ---------------------------------------------------------------------------------------


def reserve(node: Node, tokens: list[int], num_blocks: int, sender: str = "x:1") -> Reserved:
    message = Reserve("r", ROUTER, tuple(tokens), num_blocks)
    return node.migration.reserve(sender, message)


def hand_over(node: Node, tokens: list[int], kv_len: int, num_copied: int, tail_blocks: int) -> HandOver:
    request = Submit("r", tuple(tokens[:-1]), 5, Sampling(seed=1), deadline_s=100.0)
    tail = bytes(tail_blocks * node.engine.kv.geometry.block_bytes)
    return HandOver(request, ROUTER, tuple(tokens[-1:]), 1, kv_len, num_copied, tail)


def test_what_does_not_fit_is_refused_and_changes_nothing(world: World) -> None:
    node = world.nodes[0]
    tokens = list(range(11))
    with pytest.raises(ElasticMoEError, match="no place"):
        node.migration.take("x:1", hand_over(node, tokens, 0, 0, 0), 0.0)
    place = reserve(node, tokens, 4)
    assert reserve(node, tokens, 4) == place
    assert reserve(node, tokens, 6).blocks[:4] == place.blocks
    good = hand_over(node, tokens, 10, 1, 2)
    change = msgspec.structs.replace
    for bad in (
        change(good, kv_len=11),
        change(good, kv_len=12),
        change(good, num_copied=0),
        change(good, num_copied=3),
        change(good, num_copied=7, tail=b""),
        change(good, tail=good.tail[1:]),
        change(good, tail=b""),
        change(good, num_sent=2),
        change(good, output=(1, 2, 3, 4, 5)),
        change(good, request=change(good.request, prompt=(5,) * 10)),
        change(good, request=change(good.request, prompt_logprobs=True), output=(), num_sent=0, kv_len=9),
    ):
        with pytest.raises(ElasticMoEError):
            node.migration.take("x:1", bad, 0.0)
        assert node.engine.check_integrity() == []
        assert node.ids == set()
    assert node.migration.take("x:1", good, 0.0) == Taken("r")
    assert node.migration.take("x:1", good, 0.0) == Taken("r")
    assert node.engine.check_integrity() == []
    assert len(node.engine.scheduler.running) == 1
    with pytest.raises(ElasticMoEError, match="in use"):
        reserve(node, tokens, 4, "y:1")
    node.migration.unreserve("y:1", Unreserve("r", ROUTER))
    assert node.ids == {"r"}
    node.migration.unreserve("x:1", Unreserve("r", ROUTER))
    assert node.ids == set()
    with pytest.raises(ElasticMoEError, match="no place"):
        node.migration.take("x:1", good, 0.0)


def test_places_are_bounded_and_expire(world: World) -> None:
    node = world.nodes[0]
    with pytest.raises(ElasticMoEError, match="leave no room"):
        reserve(node, [1] * 160, 40)
    for number in range(4):
        reserve(node, [number] * 10, 15, f"x:{number}")
    with pytest.raises(ElasticMoEError, match="rows"):
        reserve(node, [9] * 10, 1, "x:9")
    with pytest.raises(ElasticMoEError, match="KV blocks wanted"):
        reserve(node, [0] * 10, 20, "x:0")
    assert node.engine.check_integrity() == []
    world.turn()
    world.now += 31
    world.turn()
    assert node.engine.scheduler.holds == []
    assert node.engine.scheduler.blocks.num_free == 64


# ---- everything at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_interleavings(world: World, seed: int) -> None:
    rng = random.Random(seed)
    beginnings = [prompt(n, 40) for n in range(2)]
    world.tick = 0.01
    sizes = {node.rank: 64 for node in world.nodes}
    for turn in range(150):
        if rng.random() < 0.2 and len(world.requests) < 25:
            ids = [*rng.choice(beginnings)[: rng.randrange(41)], *prompt(turn, rng.randrange(1, 60))]
            node = rng.choice(world.nodes)
            if len(node.engine.scheduler.waiting) < 8:
                world.submit(node, f"r{turn}", ids, rng.randrange(1, 50), prompt_logprobs=rng.random() < 0.2)
        if rng.random() < 0.15:
            node, *others = rng.sample(world.nodes, 3)
            targets = [(other, rng.randrange(4)) for other in others[: rng.randrange(3)]]
            node.move_to(*targets, is_leaving=rng.random() < 0.3)
        if rng.random() < 0.05 and world.requests:
            world.cancel(rng.choice(list(world.requests)))
        for node in world.nodes:
            node.is_deaf = rng.random() < 0.3
            node.is_stepping = rng.random() < 0.8
            if rng.random() < 0.1:
                sizes[node.rank] = rng.choice((40, 48, 64))
            node.lost = {Taken} if rng.random() < 0.05 else set()
            node.engine.resize_kv(sizes[node.rank], rng.randrange(1, 8))
        world.hmm_turn = rng.choice((world.answer_copies, world.answer_copies, lambda: None))
        if rng.random() < 0.03:
            world.now += 4
        world.turn()
    for node in world.nodes:
        node.is_deaf, node.is_stepping, node.lost = False, True, set()
        node.move_to()
    world.hmm_turn = world.answer_copies
    world.until(lambda: all(request.is_over for request in world.requests.values()))
    for _ in range(6):  # what was in doubt
        world.now += 6
        world.turn()
    world.finish()
    assert all(request.failed is None for request in world.requests.values())
