"""The simulated deployment: what its steps take, who gets them, and what a change of size does to its streams."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.plant import Plant
from elasticmoe.cli.replay.replica import steps_before
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.common.protocol.limits import STEP_SAMPLES_MAX
from elasticmoe.services.scaler.policy.step_model import StepModel

STEP = StepModel(a=0.01, b=1e-4, c=1e-6, d=1e-3)
MODEL = DeploymentModel(step=STEP, step_tokens_max=100, memory_tokens=10_000, expert_tokens=4_000)


def plant(width: int = 1, delay_s: float = 1.0, model: DeploymentModel = MODEL) -> Plant:
    return Plant(model, Actuation(delay_s), width)


def offer(to: Plant, *requests: tuple[float, int, int]) -> None:
    """(when, prompt, output) each."""
    for at, prompt, output in requests:
        to.advance(at)
        to.offer(Arrival(at, prompt, output))


def some(num: int, seed: int = 1) -> list[tuple[float, int, int]]:
    draw = random.Random(seed)
    return sorted((draw.uniform(0.0, 20.0), draw.randint(1, 700), draw.randint(1, 120)) for _ in range(num))


def test_a_lone_request_takes_its_chunks_and_then_a_step_for_each_token() -> None:
    lone = plant()
    offer(lone, (0.0, 250, 3))
    lone.advance(10.0)
    (stream,) = lone.ended
    chunks = [STEP.seconds(100, 250, 0), STEP.seconds(100, 250, 0), STEP.seconds(50, 250, 0)]
    assert stream.ttft_s == pytest.approx(sum(chunks))
    tokens = [STEP.seconds(0, 251, 1), STEP.seconds(0, 252, 1)]
    assert stream.ended_s - stream.first_s == pytest.approx(sum(tokens))
    assert stream.gap_s == pytest.approx(sum(tokens) / 2)
    assert lone.replicas[0].kv_used == 0


def test_a_request_waits_for_the_step_in_progress_and_shares_those_that_follow() -> None:
    two = plant()
    offer(two, (0.0, 100, 2), (0.001, 50, 1))
    two.advance(10.0)
    first, second = sorted(two.ended, key=lambda stream: stream.number)
    assert first.first_s == pytest.approx(STEP.seconds(100, 100, 0))
    assert second.first_s == pytest.approx(first.first_s + STEP.seconds(50, 151, 1))
    assert first.ended_s == second.first_s


def test_a_leap_is_as_long_as_its_steps() -> None:
    leaping, stepping = plant(2), plant(2)
    for one in (leaping, stepping):
        offer(one, *some(60))
    leaping.advance(200.0)
    while stepping.num_open:
        stepping.advance(stepping.now + 0.005)
    ends = [{stream.number: (stream.first_s, stream.ended_s) for stream in one.ended} for one in (leaping, stepping)]
    assert len(ends[0]) == 60
    for number, (first_s, ended_s) in ends[0].items():
        assert ends[1][number] == pytest.approx((first_s, ended_s))


@pytest.mark.parametrize("growth", [0.0, 1e-5, 0.3])
def test_steps_before_a_moment_are_counted_without_a_loop(growth: float) -> None:
    for seconds in (0.001, 0.05, 0.0999, 1.0, 7.3):
        num, at = 0, 0.0
        while at < seconds:
            at += 0.03 + growth * num
            num += 1
        assert steps_before(seconds, 0.03, growth) == num


def test_without_room_for_all_streams_the_newest_are_computed_anew_and_none_is_lost() -> None:
    tight = plant(model=DeploymentModel(step=STEP, step_tokens_max=100, memory_tokens=1_000, expert_tokens=0))
    requests = [(0.01 * at, 200, 300) for at in range(8)]
    offer(tight, *requests)
    most = 0
    while tight.num_open:
        tight.advance(tight.now + 0.05)
        most = max(most, tight.replicas[0].kv_used)
    assert len(tight.ended) == 8
    assert 900 < most <= 1_001  # a prompt's first token is counted with the step that made it
    prefilled = tight.replicas[0].tell().prefilled
    assert prefilled > 8 * 200, "some prompts were computed twice"
    assert tight.replicas[0].kv_used == 0


def test_new_replicas_serve_after_the_delay_and_are_held_from_the_order_on() -> None:
    grown = plant(1, delay_s=5.0)
    grown.advance(10.0)
    grown.order(3)
    assert (grown.width, grown.wanted) == (1, 3)
    grown.advance(14.9)
    assert grown.width == 1
    grown.advance(15.0)
    assert grown.width == 3
    grown.advance(20.0)
    assert grown.device_seconds == pytest.approx(10.0 + 3 * 10.0)
    assert [replica.kv_total for replica in grown.replicas] == [10_000 - 4_000 // 3] * 3


def test_what_waits_is_shared_out_when_replicas_come() -> None:
    requests = [(0.0, 600, 5)] * 30
    alone, helped = plant(), plant()
    offer(alone, *requests)
    offer(helped, *requests)
    helped.order(3)
    alone.advance(60.0)
    helped.advance(60.0)
    last = [max(stream.ended_s for stream in one.ended) for one in (alone, helped)]
    assert len(helped.ended) == 30
    assert last[1] < 0.6 * last[0]


def test_a_shrink_moves_streams_with_their_kv() -> None:
    shrunk = plant(2)
    offer(shrunk, *((0.0, 100, 400) for _ in range(4)))
    shrunk.advance(5.0)
    assert [replica.num_open for replica in shrunk.replicas] == [2, 2]
    used = sum(replica.kv_used for replica in shrunk.replicas)
    shrunk.order(1)
    assert [replica.num_open for replica in shrunk.replicas] == [4]
    assert shrunk.replicas[0].kv_used == used, "nothing is computed anew"
    shrunk.advance(100.0)
    assert len(shrunk.ended) == 4
    assert shrunk.replicas[0].kv_used == 0


def test_random_changes_of_size_lose_no_stream() -> None:
    draw, changed = random.Random(3), plant(2)
    for request in some(200, seed=4):
        offer(changed, request)
        if draw.random() < 0.3:
            changed.order(draw.randint(1, 4))
    changed.advance(500.0)
    assert sorted(stream.number for stream in changed.ended) == list(range(200))
    assert all(stream.at_s < stream.first_s <= stream.ended_s for stream in changed.ended)
    assert [replica.kv_used for replica in changed.replicas] == [0] * changed.width


def test_a_smaller_order_gives_up_first_who_is_on_the_way() -> None:
    changed = plant(2, delay_s=5.0)
    changed.order(4)
    changed.order(3)
    assert (changed.width, changed.wanted) == (2, 3)
    changed.order(1)
    assert (changed.width, changed.wanted) == (1, 1)
    changed.order(1)
    assert [(before, after) for _, before, after in changed.changes] == [(2, 4), (4, 3), (3, 1)]


def test_a_look_tells_what_happened_since_the_one_before() -> None:
    seen_twice = plant()
    offer(seen_twice, (0.0, 100, 50), (0.5, 100, 50))
    seen_twice.advance(0.5)
    first = seen_twice.look()
    assert (len(first.admitted), len(first.firsts), first.waiting, first.open) == (2, 1, 1, 2)
    assert math.isclose(first.oldest_s, 0.0)
    seen_twice.advance(20.0)
    second = seen_twice.look()
    assert (len(second.admitted), len(second.firsts), len(second.ended), second.waiting) == (0, 1, 2, 0)
    assert second.span_s == pytest.approx(19.5)
    assert sum(num for _, num in (*first.gaps, *second.gaps)) == 2 * 49


def test_a_replica_tells_some_of_its_steps_evenly() -> None:
    told = plant()
    offer(told, (0.0, 100, 900))
    told.advance(5.0)
    steps = told.replicas[0].tell()
    assert STEP_SAMPLES_MAX // 2 <= len(steps.samples) <= STEP_SAMPLES_MAX < steps.num_steps
    gaps = [b.steps_since_cutover - a.steps_since_cutover for a, b in itertools.pairwise(steps.samples)]
    assert len(set(gaps)) == 1
    for sample in steps.samples:
        taken = STEP.seconds(sample.prefill_tokens, sample.kv_tokens, sample.sequences)
        assert sample.seconds == pytest.approx(taken)
    assert told.replicas[0].tell().num_steps == 0


def test_what_no_deployment_does_is_refused() -> None:
    with pytest.raises(ValueError, match="has 6001 tokens, and a replica's KV 6000"):
        plant().offer(Arrival(0.0, 6_000, 1))
    with pytest.raises(ValueError, match="1 is the least"):
        plant().order(0)
    with pytest.raises(ValueError, match="leave none for KV"):
        DeploymentModel(memory_tokens=10, expert_tokens=10)
    with pytest.raises(ValueError, match="step_tokens_max is 0"):
        DeploymentModel(step_tokens_max=0)
    with pytest.raises(ValueError, match="a has to be above"):
        DeploymentModel(step=StepModel(0.0, 1.0, 1.0, 1.0))
