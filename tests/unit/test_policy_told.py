"""What is added up as it comes is what one would find by adding all of it up anew."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.signals import RankWindow, StepSample
from elasticmoe.services.scaler.policy.told import STEP_S, WINDOWS_MAX, Latencies, RanksTold, RouterTold
from tests.unit import policy_world as world


def counts_of(rng: random.Random) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((bucket, rng.randint(1, 5)) for bucket in rng.sample(range(30), rng.randint(0, 4))))


@pytest.mark.parametrize("seed", range(20))
def test_latencies_are_those_of_the_windows_that_ended_since(seed: int) -> None:
    rng, latencies, told = random.Random(seed), Latencies(), list[tuple[float, tuple[tuple[int, int], ...]]]()
    since = -1.0
    for turn in range(40):
        ended = turn + rng.uniform(-3.0, 0.0)  # some come late, and some too late
        counts = counts_of(rng)
        latencies.add(ended, counts)
        told.append((ended, counts))
        if rng.random() < 0.5:
            since = max(since, turn - rng.uniform(0.0, 12.0))
            expected = Counter[int]()
            for at, each in told:
                for bucket, num in each:
                    expected[bucket] += num if at > since else 0
            assert dict(latencies.since(since)) == dict(+expected)


def test_a_flood_of_windows_takes_no_more_memory() -> None:
    latencies, router = Latencies(), RouterTold(0.0)
    for number in range(1, 10 * WINDOWS_MAX):
        latencies.add(float(number), ((3, 1),))
        router.take(world.router_window(number, float(number), ttft=((3, 1),)), float(number))
    assert dict(latencies.since(-1.0)) == {3: WINDOWS_MAX}
    assert dict(router.ttft.since(-1.0)) == {3: WINDOWS_MAX}
    assert len(router.windows) == WINDOWS_MAX


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_ranks_are_of_what_each_has_told_last(seed: int) -> None:
    """Of those that are expected now, whoever came and went before."""
    rng, ranks = random.Random(seed), RanksTold()
    expected = dict[RankId, str]()
    last = dict[str, RankWindow]()
    steps = dict[str, list[tuple[float, list[float]]]]()
    for turn in range(60):
        now = float(turn)
        if rng.random() < 0.2:
            expected = {RankId(at, 0): f"{at}:{rng.randint(1, 2)}" for at in range(8) if rng.random() < 0.8}
            ranks.expect(expected, now)
            for name in {*last} - {*expected.values()}:  # what is not expected any more is forgotten
                del last[name], steps[name]
        for rank, name in expected.items():
            if rng.random() < 0.4:
                continue
            told = tuple(StepSample(rng.uniform(0.01, 0.1), 1, 1, 1, 50) for _ in range(rng.randint(0, 3)))
            used = rng.randint(0, 100)
            facts = dict(running=rng.randint(0, 9), queued_prefill_tokens=rng.randint(0, 99), kv_used=used)
            facts |= dict(generated=rng.randint(0, 50), uncached_tokens=rng.randint(0, 50), cached_tokens=3)
            window = world.rank_window(
                turn + 1, now, rank=rank, incarnation=name, kv_total=100, num_steps=3, steps=told, **facts
            )
            assert ranks.take(window, now)
            assert not ranks.take(window, now), "it came before"
            last[name] = window
            steps.setdefault(name, []).append((now, [step.seconds for step in told]))
        mine = [last[name] for name in expected.values() if name in last]
        assert ranks.queued == sum(one.queued_prefill_tokens for one in mine)
        assert ranks.running == sum(one.running for one in mine)
        assert ranks.kv_used == sum(one.kv_used for one in mine)
        assert ranks.generated_per_s == pytest.approx(sum(one.generated / one.span_s for one in mine))
        assert ranks.prompt_per_s == pytest.approx(sum((one.uncached_tokens + 3) / one.span_s for one in mine))
        assert max(ranks.kv_shares, default=0.0) == max((one.kv_used / 100 for one in mine), default=0.0)
        means = [0.0]
        for name in (name for name in expected.values() if name in steps):
            recent = [second for at, some in steps[name] if at > now - STEP_S for second in some]
            means.append(sum(recent) / len(recent) if recent else 0.0)
        assert ranks.step_s(now) == pytest.approx(max(means))
        silent = {rank for rank, name in expected.items() if name not in last or last[name].ended_s < now - 3.0}
        assert ranks.silent(now - 3.0).keys() == silent


def test_a_window_of_another_process_or_rank_is_not_taken() -> None:
    ranks = RanksTold()
    ranks.expect({RankId(0, 0): "rank:1", RankId(1, 0): ""}, 0.0)
    assert not ranks.take(world.rank_window(1, 1.0, incarnation="rank:2"), 1.0)
    assert not ranks.take(world.rank_window(1, 1.0, rank=RankId(1, 0), incarnation="rank:1"), 1.0)
    assert ranks.take(world.rank_window(1, 1.0, incarnation="rank:1"), 1.0)
