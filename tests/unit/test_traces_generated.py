"""Traffic from a seed has the shape that was measured, and the same one each time."""

from __future__ import annotations

import math
import statistics
from functools import cache

import pytest

from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.cli.traces.generate import generate
from elasticmoe.cli.traces.profiles import DURATION_S_MAX, PROFILES
from elasticmoe.cli.traces.scale import TraceFigures, figures_of

SEEDS = range(12)


@cache
def figures(profile: str) -> list[TraceFigures]:
    return [figures_of(generate(profile, seed)) for seed in SEEDS]


def mean(profile: str, what: str) -> float:
    return statistics.fmean(getattr(found, what) for found in figures(profile))


def dispersion(profile: str, seconds: int) -> float:
    return statistics.fmean(found.dispersion[seconds] or 0.0 for found in figures(profile))


def logs(arrivals: list[Arrival]) -> tuple[float, float, float, float]:
    prompts = [math.log(one.input_tokens) for one in arrivals]
    outputs = [math.log(one.output_tokens) for one in arrivals]
    return (
        statistics.fmean(prompts),
        statistics.pstdev(prompts),
        statistics.fmean(outputs),
        statistics.pstdev(outputs),
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_a_seed_says_everything(profile: str) -> None:
    first = generate(profile, 7, 900)
    assert first == generate(profile, 7, 900)
    assert first != generate(profile, 8, 900)
    assert [one.at_s for one in first] == sorted(one.at_s for one in first)
    assert 0 <= first[0].at_s <= first[-1].at_s < 900
    assert min(one.input_tokens for one in first) >= 1
    assert min(one.output_tokens for one in first) >= 1


def test_a_conversation_is_as_it_was_measured() -> None:
    """Azure LLM inference trace 2023: rate 5.53, gap CV 1.09, variance/mean 1.4 / 4.0 / 21 at 1 / 10 / 60 s."""
    assert mean("conversation", "rate") == pytest.approx(5.53, rel=0.08)
    assert mean("conversation", "gap_cv") == pytest.approx(1.09, rel=0.08)
    assert dispersion("conversation", 1) == pytest.approx(1.4, rel=0.15)
    assert dispersion("conversation", 10) == pytest.approx(4.0, rel=0.25)
    assert dispersion("conversation", 60) == pytest.approx(21, rel=0.4)
    assert logs(generate("conversation", 1)) == pytest.approx((6.63, 0.99, 5.02, 0.86), abs=0.05)


def test_code_comes_in_bursts_as_it_was_measured() -> None:
    """In the hour that was recorded: gap CV 13.2 (minutes of silence are rarer here), variance/mean 13 / 71 / 160 at
    1 / 10 / 60 s, peak/mean 12.8."""
    assert mean("code", "rate") == pytest.approx(2.57, rel=0.1)
    assert 9 < mean("code", "gap_cv") < 13.2
    for seconds, measured in ((1, 13), (10, 71), (60, 160)):
        assert dispersion("code", seconds) == pytest.approx(measured, rel=0.15)
    assert mean("code", "peak_ratio") == pytest.approx(12.8, rel=0.2)
    arrivals = generate("code", 1)
    assert max(one.input_tokens for one in arrivals) == 7400
    assert statistics.median(one.input_tokens for one in arrivals) == pytest.approx(math.exp(7.0), rel=0.15)
    assert logs(arrivals)[2:] == pytest.approx((2.79, 0.85), abs=0.06)


def test_a_day_follows_its_hours() -> None:
    arrivals = generate("day", 3)
    hours = [0] * 24
    for one in arrivals:
        hours[int(one.at_s // 3600)] += 1
    night, noon = sum(hours[2:6]), sum(hours[14:18])
    assert noon / night == pytest.approx(4.0, rel=0.15)  # 1.6 to 0.4
    assert len(arrivals) / 86_400 == pytest.approx(5.53, rel=0.08)


def test_a_step_is_three_times_the_rate_for_120_s() -> None:
    before = after = during = 0
    for seed in SEEDS:
        for one in generate("step", seed):
            before += one.at_s < 180
            during += 180 <= one.at_s < 300
            after += one.at_s >= 300
    assert before / 180 / len(SEEDS) == pytest.approx(5.53, rel=0.05)
    assert during / 120 / len(SEEDS) == pytest.approx(3 * 5.53, rel=0.05)
    assert after / 180 / len(SEEDS) == pytest.approx(5.53, rel=0.05)
    assert generate("step", 1, 100)[-1].at_s < 100


def test_a_longer_trace_has_a_step_in_each_eight_minutes() -> None:
    rates = [0] * 8
    for seed in SEEDS:
        for one in generate("step", seed, 960.0):
            rates[int(one.at_s // 120)] += 1
    ups = [rate / 120 / len(SEEDS) > 1.3 * 5.53 for rate in rates]  # a step covers halves of two of these parts
    assert ups == [False, True, True, False] * 2


def test_what_there_is_not_is_said() -> None:
    with pytest.raises(ValueError, match="'chat' is none of conversation, code, day, step"):
        generate("chat", 1)
    for duration in (0.0, -1.0, math.nan, DURATION_S_MAX + 1):
        with pytest.raises(ValueError, match="duration"):
            generate("step", 1, duration)
