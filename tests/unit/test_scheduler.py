"""The scheduler and its blocks against a model that never computes: every sequence ends, nothing leaks."""

import itertools
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.protocol.errors import InvalidRequest, Overloaded
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.services.worker.engine.blocks import BlockManager
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.engine.sequence import HEAD_START_S, head_start_s

PEER = b"router:1"


def submit(name: str, prompt: list[int], max_tokens: int, priority: int = 0) -> Submit:
    return Submit(name, tuple(prompt), max_tokens, Sampling(seed=1), priority=priority)


def make(num_blocks: int = 16, block_size: int = 4, **options: int) -> Scheduler:
    sizes = {"max_tokens": 8, "max_sequences": 4, "max_model_len": 64, "max_waiting": 100} | options
    return Scheduler(BlockManager(num_blocks, block_size), **sizes)


def run_step(scheduler: Scheduler, token: int = 7) -> int:
    plan = scheduler.plan()
    assert plan.num_tokens <= scheduler.max_tokens
    scheduler.commit(plan.chunks, [token for chunk in plan.chunks if chunk.sample])
    for chunk in plan.chunks:
        if chunk.sequence.finish_reason(scheduler.capacity_tokens):
            scheduler.remove(chunk.sequence)
    assert scheduler.check_integrity() == []
    return plan.num_tokens


def test_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    scheduler = make()
    scheduler.add(submit("short", [1, 2], 20), PEER, 0.0)
    assert run_step(scheduler) == 2
    long = scheduler.add(submit("long", list(range(20)), 5), PEER, 0.0)
    counts = []
    while long.num_output == 0:
        plan = scheduler.plan()
        counts.append([chunk.num_tokens for chunk in plan.chunks])
        scheduler.commit(plan.chunks, [7 for chunk in plan.chunks if chunk.sample])
    assert counts == [[1, 7], [1, 7], [1, 6]]


def test_a_step_of_decodes_alone_leaves_prompts_where_they_are() -> None:
    scheduler = make()
    decoding = scheduler.add(submit("decoding", [1, 2], 20), PEER, 0.0)
    run_step(scheduler)
    half_read = scheduler.add(submit("half read", list(range(20)), 5), PEER, 0.0)
    run_step(scheduler)
    waiting = scheduler.add(submit("waiting", [3, 4, 5], 5), PEER, 0.0)
    before = half_read.kv_len, waiting.kv_len
    plan = scheduler.plan(decode_only=True)
    assert [(chunk.sequence, chunk.num_tokens) for chunk in plan.chunks] == [(decoding, 1)]
    assert not plan.admitted
    scheduler.commit(plan.chunks, [7])
    assert (half_read.kv_len, waiting.kv_len) == before
    assert scheduler.check_integrity() == []
    assert run_step(scheduler) == scheduler.max_tokens
    scheduler.remove(decoding)
    assert scheduler.plan(decode_only=True).num_tokens == 0


def test_an_urgent_prompt_does_not_stop_those_behind_it() -> None:
    scheduler = make(num_blocks=40, max_model_len=120)
    behind = scheduler.add(submit("behind", [1, 2], 20), PEER, 0.0)
    run_step(scheduler)
    scheduler.add(submit("urgent", list(range(60)), 5, priority=-1), PEER, 0.0)
    for _ in range(6):
        before = behind.num_output
        assert run_step(scheduler) == 8
        assert behind.num_output == before + 1


def test_same_beginning_shares_blocks() -> None:
    scheduler = make()
    first = scheduler.add(submit("a", list(range(10)), 10), PEER, 0.0)
    run_step(scheduler)
    run_step(scheduler)
    second = scheduler.add(submit("b", [*range(8), 99], 1), PEER, 0.0)
    run_step(scheduler)
    assert second.num_output == 1
    third = scheduler.add(submit("c", [*range(8), 98, 97], 4), PEER, 0.0)
    plan = scheduler.plan()
    assert third.blocks[:2] == first.blocks[:2]
    assert next(chunk for chunk in plan.chunks if chunk.sequence is third).start == 8


def test_prompt_logprobs_are_computed_not_taken_from_the_cache() -> None:
    scheduler = make()
    first = scheduler.add(submit("a", list(range(10)), 10), PEER, 0.0)
    run_step(scheduler)
    run_step(scheduler)
    assert first.num_output == 1
    scheduler.add(msgspec.structs.replace(submit("b", list(range(10)), 1), prompt_logprobs=True), PEER, 0.0)
    chunk = next(chunk for chunk in scheduler.plan().chunks if chunk.sequence.request.request_id == "b")
    assert chunk.start == 0


def test_plan_that_is_given_up_is_planned_again() -> None:
    scheduler = make()
    sequence = scheduler.add(submit("a", list(range(6)), 3), PEER, 0.0)
    first, second = scheduler.plan(), scheduler.plan()
    assert first.chunks == second.chunks
    assert [s.request.request_id for s in first.admitted] == ["a"]
    assert second.admitted == []
    assert sequence.kv_len == 0


def test_preemption_prefers_the_older() -> None:
    scheduler = make(num_blocks=4, max_tokens=16, max_model_len=16)
    old = scheduler.add(submit("old", [1, 2, 3, 4], 12), PEER, 0.0)
    new = scheduler.add(submit("new", [5, 6, 7, 8], 12), PEER, 0.0)
    done: list[str] = []
    for _ in range(100):
        plan = scheduler.plan()
        scheduler.commit(plan.chunks, [7 for chunk in plan.chunks if chunk.sample])
        for chunk in plan.chunks:
            if chunk.sequence.finish_reason(scheduler.capacity_tokens):
                scheduler.remove(chunk.sequence)
                done.append(chunk.sequence.request.request_id)
        assert scheduler.check_integrity() == []
    assert done == ["old", "new"]
    assert (old.num_output, new.num_output) == (12, 12)


def test_refusals() -> None:
    scheduler = make(max_waiting=1)
    with pytest.raises(InvalidRequest, match="maximum context length is 64 tokens"):
        scheduler.add(submit("long", [1] * 64, 1), PEER, 0.0)
    scheduler.add(submit("a", [1], 1), PEER, 0.0)
    with pytest.raises(InvalidRequest, match="in use"):
        scheduler.add(submit("a", [1], 1), PEER, 0.0)
    with pytest.raises(Overloaded, match="limit is 1"):
        scheduler.add(submit("b", [1], 1), PEER, 0.0)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_everything_ends_and_nothing_leaks(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make(num_blocks=rng.randint(16, 40), max_tokens=rng.randint(1, 20), max_sequences=rng.randint(1, 6))
    expected: dict[str, int] = {}
    ended: dict[str, int] = {}
    for turn in range(400):
        if turn < 200 and rng.random() < 0.4:
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 40))]
            name = f"r{turn}"
            expected[name] = rng.randint(1, 20)
            scheduler.add(submit(name, prompt, expected[name], rng.randint(0, 1)), PEER, 0.0)
        if scheduler.sequences() and rng.random() < 0.05:
            victim = rng.choice(scheduler.sequences())
            scheduler.remove(victim)
            del expected[victim.request.request_id]
        plan = scheduler.plan()
        if rng.random() < 0.1:
            continue  # the exchange was aborted
        scheduler.commit(plan.chunks, [rng.randint(0, 1) for chunk in plan.chunks if chunk.sample])
        for chunk in plan.chunks:
            if chunk.sequence.finish_reason(scheduler.capacity_tokens):
                scheduler.remove(chunk.sequence)
                ended[chunk.sequence.request.request_id] = chunk.sequence.num_output
        assert scheduler.check_integrity() == []
    turns = 0
    while scheduler.sequences():
        turns += 1
        assert turns < 20_000
        plan = scheduler.plan()
        assert plan.chunks or plan.freed_rows
        scheduler.commit(plan.chunks, [0 for chunk in plan.chunks if chunk.sample])
        for chunk in plan.chunks:
            if chunk.sequence.finish_reason(scheduler.capacity_tokens):
                scheduler.remove(chunk.sequence)
                ended[chunk.sequence.request.request_id] = chunk.sequence.num_output
    assert {name: ended[name] for name in expected} == expected
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


# ---- priorities ------------------------------------------------------------------------------------------------------


def test_a_priority_is_worth_time_the_more_the_higher_and_never_more_than_a_bound() -> None:
    starts = [head_start_s(priority) for priority in range(-1_000, 1_001)]
    assert all(earlier < later for earlier, later in itertools.pairwise(starts))
    assert head_start_s(0) == 0.0
    assert all(abs(start) < HEAD_START_S for start in starts)
    assert head_start_s(1) > 5.0  # small ones, which most clients use, are worth something


def waiting_names(scheduler: Scheduler) -> list[str]:
    return [sequence.request.request_id for sequence in scheduler.waiting]


def test_the_more_urgent_goes_first_and_equals_in_order_of_arrival() -> None:
    scheduler = make()
    for name, priority in (("b", 0), ("c", 0), ("a", -1), ("e", 5), ("d", 0), ("first", -1_000)):
        scheduler.add(submit(name, [1], 1, priority), PEER, 0.0)
    assert waiting_names(scheduler) == ["first", "a", "b", "c", "d", "e"]


@pytest.mark.parametrize("honest", [0, 1_000])
def test_nobody_starves_behind_those_who_always_come_first(honest: int) -> None:
    """Every second another request of the highest priority, and one can run at a time, for a second."""
    scheduler = make(max_sequences=1)
    served_after = 0
    scheduler.add(submit("honest", [1], 1, honest), PEER, 0.0)
    for second in range(1, 200):
        for number in range(2):  # more than can be served
            scheduler.add(submit(f"urgent {second} {number}", [1], 1, -1_000), PEER, float(second))
            if len(scheduler.waiting) > 50:
                scheduler.remove(scheduler.waiting[-1])  # its client has left
        run_step(scheduler)
        if scheduler.get(PEER, "honest") is None:
            served_after = second
            break
    bound = HEAD_START_S if honest == 0 else 2 * HEAD_START_S
    assert 0 < served_after <= bound + 2


def test_who_has_waited_elsewhere_is_as_old_as_it_is() -> None:
    """A sequence that moves while it waits, and one that is submitted anew, keep their deadlines, so their ages."""
    scheduler = make()
    scheduler.add(submit("here", [1], 1), PEER, 100.0)
    moved = msgspec.structs.replace(submit("moved", [1], 1), deadline_s=530.0)  # it came at 30
    scheduler.add(moved, PEER, 100.0)
    assert waiting_names(scheduler) == ["moved", "here"]


def test_the_least_urgent_loses_its_blocks_first() -> None:
    scheduler = make(num_blocks=4, max_tokens=16, max_model_len=16)
    low = scheduler.add(submit("low", [1, 2, 3, 4], 12, priority=3), PEER, 0.0)
    high = scheduler.add(submit("high", [5, 6, 7, 8], 12, priority=-3), PEER, 1.0)
    while not low.stops:
        run_step(scheduler)
    assert high.stops == 0
