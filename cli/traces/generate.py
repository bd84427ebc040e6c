"""Traffic drawn from a seed, in the shapes that the Azure LLM inference trace 2023 (CC-BY, Microsoft) has.

- *conversation*: the rate of every 10 s is 5.53·exp(x) per second, x an AR(1) process; Poisson inside.
- *code*: bursts, silence between; a burst's rate is drawn once for it, and again for each of its seconds. In the mean
  of 60 seeds, variance/mean of the counts in 1, 10 and 60 s is 13, 80 and 171, and the busiest 10 s have 11.6 times the
  mean; the one hour that was recorded has 13, 71 and 160, and 12.8. Its gaps vary more (a coefficient of variation of
  13.2 against 10.2), for it is silent for minutes at times.
- *day*: a conversation whose rate follows the hours, from 0.4 times the mean at 04:00 to 1.6 times at 16:00.
- *step*: a Poisson process that for 120 s of each 480 s has three times its rate.

The same seed and length make the same trace, as far as numpy keeps its streams (NEP 19). Pure.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.cli.traces.profiles import DURATION_S_MAX, PROFILES, STEP_BEGIN_S, STEP_FACTOR, STEP_S

_Floats = npt.NDArray[np.float64]

_CONVERSATION_RATE = 5.53  # requests per second
_CONVERSATION_BIN_S = 10.0
_SIGMA, _RHO = 0.24, 0.93  # of x: its spread, and how much of it the next bin keeps
_CONVERSATION_LENGTHS = ((6.63, 0.99), (5.02, 0.86))  # log-normal, input and output

_CODE_RATE = 2.57
_ON_S, _OFF_S = 12.0, 28.0  # mean lengths, exponential
_BURST_SHAPE, _SECOND_SHAPE = 2.0, 4.0  # of the gamma distributions, whose mean is 1
_CODE_LENGTHS = ((7.0, 1.36), (2.79, 0.85))
_CODE_INPUT_MAX = 7400

_HOUR_S = 3600.0
_DAY_SWING, _DAY_LOW_S = 0.6, 4 * _HOUR_S


def generate(profile: str, seed: int, duration_s: float | None = None) -> list[Arrival]:
    """The arrivals of one of PROFILES in [0, `duration_s`), ordered; of its own length where none is given.

    Raises ValueError for a profile that there is not, and for a length that is not above 0 and at most DURATION_S_MAX.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is none of {', '.join(PROFILES)}")
    duration = PROFILES[profile] if duration_s is None else duration_s
    if not 0 < duration <= DURATION_S_MAX:
        raise ValueError(f"a duration of {duration:g} s is not above 0 and at most {DURATION_S_MAX:g}")
    rng = np.random.default_rng(seed)
    if profile == "code":
        times, lengths, input_max = _code(rng, duration), _CODE_LENGTHS, float(_CODE_INPUT_MAX)
    else:
        draw = {"conversation": _conversation, "day": _day, "step": _step}[profile]
        times, lengths, input_max = draw(rng, duration), _CONVERSATION_LENGTHS, math.inf
    times = np.sort(times[times < duration])
    prompts = np.maximum(1, np.rint(rng.lognormal(*lengths[0], len(times)))).clip(max=input_max)
    outputs = np.maximum(1, np.rint(rng.lognormal(*lengths[1], len(times))))
    rows = zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [Arrival(at, int(prompt), int(output)) for at, prompt, output in rows]


def _poisson(rng: np.random.Generator, begins: _Floats, seconds: _Floats, rates: _Floats) -> _Floats:
    """Arrivals in pieces of time with a constant rate each; pieces in order, arrivals in a piece not."""
    counts = rng.poisson(rates * seconds)
    times: _Floats = np.repeat(begins, counts) + rng.random(counts.sum()) * np.repeat(seconds, counts)
    return times


def _conversation_rates(rng: np.random.Generator, num_bins: int) -> _Floats:
    shocks = rng.normal(0.0, 1.0, num_bins) * _SIGMA
    x, rates = shocks[0], np.empty(num_bins)  # begins with the spread that it keeps
    for number in range(num_bins):
        x = x if number == 0 else _RHO * x + math.sqrt(1 - _RHO**2) * shocks[number]
        rates[number] = _CONVERSATION_RATE * math.exp(x)
    return rates


def _bins(duration_s: float, bin_s: float) -> _Floats:
    return bin_s * np.arange(math.ceil(duration_s / bin_s), dtype=np.float64)


def _conversation(rng: np.random.Generator, duration_s: float) -> _Floats:
    begins = _bins(duration_s, _CONVERSATION_BIN_S)
    rates = _conversation_rates(rng, len(begins))
    return _poisson(rng, begins, np.full(len(begins), _CONVERSATION_BIN_S), rates)


def _day(rng: np.random.Generator, duration_s: float) -> _Floats:
    begins = _bins(duration_s, _CONVERSATION_BIN_S)
    hours = 1 - _DAY_SWING * np.cos(2 * np.pi * (begins - _DAY_LOW_S) / (24 * _HOUR_S))
    rates = _conversation_rates(rng, len(begins)) * hours
    return _poisson(rng, begins, np.full(len(begins), _CONVERSATION_BIN_S), rates)


def _step(rng: np.random.Generator, duration_s: float) -> _Floats:
    period = PROFILES["step"]
    begins, seconds = [0.0], list[float]()
    for number in range(math.ceil(duration_s / period)):
        first = number * period + STEP_BEGIN_S
        begins += [first, first + STEP_S]
        seconds += [first - begins[-3], STEP_S]
    seconds.append(max(0.0, duration_s - begins[-1]))
    rates = [_CONVERSATION_RATE * (STEP_FACTOR if number % 2 else 1.0) for number in range(len(begins))]
    return _poisson(rng, np.array(begins), np.array(seconds), np.array(rates))


def _code(rng: np.random.Generator, duration_s: float) -> _Floats:
    mean = _CODE_RATE * (_ON_S + _OFF_S) / _ON_S  # while a burst lasts
    begins: list[float] = []
    ends: list[float] = []
    rates: list[float] = []
    now, is_on = 0.0, rng.random() < _ON_S / (_ON_S + _OFF_S)
    while now < duration_s:
        until = now + rng.exponential(_ON_S if is_on else _OFF_S)
        if is_on:
            amplitude = mean * rng.gamma(_BURST_SHAPE, 1 / _BURST_SHAPE)
            while now < until:
                begins.append(now)
                now = min(until, now + 1)
                ends.append(now)
                rates.append(amplitude * rng.gamma(_SECOND_SHAPE, 1 / _SECOND_SHAPE))
        now, is_on = until, not is_on
    return _poisson(rng, np.array(begins), np.array(ends) - np.array(begins), np.array(rates))
