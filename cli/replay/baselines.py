"""What others decide by, from their sources and guides, each with its defaults; written anew for the replay. Pure.

Where a law needs the number of requests that a replica may have, it gets `open_target`: what this plant's replica has
open at the objectives, with the traffic's own lengths. Nobody who runs one of them knows it as well.

- HPA on queue length: Kubernetes' HorizontalPodAutoscaler, `autoscaling/v2`.
- KPA: Knative's autoscaler, which AIBrix and KServe use as well.
- Ray Serve 2.60: `AutoscalingConfig`.
- llm-d: the SLO law of its KEDA guide, behind an HPA with that guide's behaviour.
- Dynamo 1.6.1: the planner's load loop.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from elasticmoe.cli.replay.model import DeploymentModel
from elasticmoe.cli.replay.plant import Plant, Seen
from elasticmoe.cli.replay.replica import Replica
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import WidthFacts
from elasticmoe.services.scaler.policy.saturation import predicted

TARGET_UTILIZATION = 0.7  # Knative's default, of what a replica may have open
QUEUE_TARGET = 5.0  # waiting requests of a replica, as KEDA's examples for vLLM have it


class Bounds(NamedTuple):
    """Of the size."""

    least: int
    most: int

    def clamp(self, width: int) -> int:
        """Within them."""
        return max(self.least, min(self.most, width))


class History:
    """Figures of the last `span_s` seconds, one for each turn."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._entries: deque[tuple[float, float]] = deque()

    def add(self, at_s: float, figure: float) -> None:
        """Keep one, and forget the old ones."""
        self._entries.append((at_s, figure))
        while self._entries[0][0] <= at_s - self._span_s:
            self._entries.popleft()

    @property
    def figures(self) -> list[float]:
        """One at the least, after the first turn."""
        return [figure for _, figure in self._entries]

    @property
    def mean(self) -> float:
        """Of all."""
        return sum(self.figures) / len(self._entries)


class Hpa:
    """How an HPA gets from a wish to a size: each 15 s; a growth takes the least wish of a window, a shrink the most;
    at most so many replicas in so many seconds."""

    PERIOD_S = 15.0

    def __init__(
        self, bounds: Bounds, up_window_s: float, down_window_s: float, up_s: float, down: tuple[int, float] | None
    ) -> None:
        self._bounds = bounds
        self._up, self._down = History(max(self.PERIOD_S, up_window_s)), History(down_window_s)
        self._up_s, self._down_by = up_s, down
        self._grown_s = self._shrunk_s = -math.inf

    def is_due(self, now: float) -> bool:
        """Whether it looks in this turn."""
        return now % self.PERIOD_S == 0.0

    def size(self, now: float, current: int, wish: int) -> int:
        """After a look at which `wish` replicas are wanted."""
        self._up.add(now, wish)
        self._down.add(now, wish)
        most, least = int(min(self._up.figures)), int(max(self._down.figures))
        if most > current and now - self._grown_s >= self._up_s:
            size = self._bounds.clamp(min(most, current + max(current, 4)))
            self._grown_s = now if size > current else self._grown_s
            return size
        if least < current:
            if self._down_by is None:
                return self._bounds.clamp(least)
            by, each_s = self._down_by
            if now - self._shrunk_s >= each_s:
                self._shrunk_s = now
                return self._bounds.clamp(max(least, current - by))
        return current


class HpaOnQueue:
    """QUEUE_TARGET waiting requests for each replica; tolerance 10 %, a shrink by the most of 300 s."""

    TOLERANCE = 0.1

    def __init__(self, bounds: Bounds) -> None:
        self._hpa = Hpa(bounds, 0.0, 300.0, Hpa.PERIOD_S, None)

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """As the class says."""
        if not self._hpa.is_due(seen.at_s):
            return plant.wanted
        ratio = seen.waiting / (QUEUE_TARGET * seen.ready)
        is_near = abs(ratio - 1.0) <= self.TOLERANCE
        return self._hpa.size(seen.at_s, plant.wanted, plant.wanted if is_near else math.ceil(seen.ready * ratio))


class Kpa:
    """Open requests in the mean of 60 s for each replica; in a panic, in which 6 s ask for twice what is ready, by
    those 6 s, and never less."""

    STABLE_S, PANIC_S, PANIC_RATIO, DOWN_RATE = 60.0, 6.0, 2.0, 2.0

    def __init__(self, bounds: Bounds, open_target: float) -> None:
        self._bounds = bounds
        self._target = TARGET_UTILIZATION * open_target
        self._stable, self._short = History(self.STABLE_S), History(self.PANIC_S)
        self._panic_s = -math.inf  # when there was cause for one last
        self._most = 0

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """As the class says."""
        now = seen.at_s
        self._stable.add(now, seen.open)
        self._short.add(now, seen.open)
        stable, short = math.ceil(self._stable.mean / self._target), math.ceil(self._short.mean / self._target)
        stable = max(stable, math.floor(seen.ready / self.DOWN_RATE))
        if short / seen.ready >= self.PANIC_RATIO:
            self._panic_s = now
        if now - self._panic_s >= self.STABLE_S:
            self._most = 0
            return self._bounds.clamp(stable)
        self._most = max(self._most, plant.wanted, stable, short)
        return self._bounds.clamp(self._most)


class RayServe:
    """Ongoing requests in the mean of 30 s for each replica; a growth after 30 s in which it was wanted, a shrink after
    600 s; by the last wish."""

    LOOK_BACK_S, UP_S, DOWN_S = 30.0, 30.0, 600.0

    def __init__(self, bounds: Bounds, open_target: float) -> None:
        self._bounds = bounds
        self._target = open_target
        self._open = History(self.LOOK_BACK_S)
        self._since: tuple[int, float] = (0, 0.0)  # -1 less is wanted, 1 more; since when

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """As the class says."""
        self._open.add(seen.at_s, seen.open)
        wish = self._bounds.clamp(math.ceil(self._open.mean / self._target))
        way = (wish > plant.wanted) - (wish < plant.wanted)
        if way != self._since[0]:
            self._since = (way, seen.at_s)
        after = {1: self.UP_S, -1: self.DOWN_S, 0: math.inf}[way]
        if seen.at_s - self._since[1] < after:
            return plant.wanted
        self._since = (0, seen.at_s)
        return wish


class LlmD:
    """s, the mean over 45 s of the 90th percentiles over their objectives, at most 2: more above 0.55, less below 0.40;
    growth at most by the greater of 100 % and 4 in 60 s, shrink by 1 in 120 s."""

    UP, DOWN, MEAN_S, LATENCY_S, QUANTILE, CLAMP = 0.55, 0.40, 45.0, 15, 0.9, 2.0

    def __init__(self, bounds: Bounds, ttft_s: float, itl_s: float) -> None:
        self._hpa = Hpa(bounds, 30.0, 180.0, 60.0, (1, 120.0))
        self._ttft_s, self._itl_s = ttft_s, itl_s
        self._recent: deque[Seen] = deque(maxlen=self.LATENCY_S)
        self._s = History(self.MEAN_S)

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """As the class says."""
        self._recent.append(seen)
        ttft = _quantile(((stream.ttft_s, 1) for one in self._recent for stream in one.firsts), self.QUANTILE)
        gap = _quantile((entry for one in self._recent for entry in one.gaps), self.QUANTILE)
        self._s.add(seen.at_s, min(self.CLAMP, max(ttft / self._ttft_s, gap / self._itl_s)))
        if not self._hpa.is_due(seen.at_s):
            return plant.wanted
        return self._hpa.size(seen.at_s, plant.wanted, self.wish(plant.wanted, seen.ready, self._s.mean))

    def wish(self, wanted: int, ready: int, s: float) -> int:
        """Replicas, of `wanted` of which `ready` serve."""
        raised = s * min(1.0, ready / wanted)
        if raised > self.UP:
            return wanted + math.ceil(wanted * (raised / self.UP - 1.0))
        return wanted - math.floor(wanted * (1.0 - s / self.DOWN)) if s < self.DOWN else wanted


class DynamoLoad:
    """Each 5 s: one more where every engine's predicted latencies break an objective, one less where they all keep 80 %
    of both with load · N/(N-1); nothing while replicas come. Its regression is taken as exact."""

    PERIOD_S, SENSITIVITY = 5.0, 0.8

    def __init__(self, bounds: Bounds, ttft_s: float, itl_s: float, prompt_tokens: float) -> None:
        self._bounds = bounds
        self._ttft_s, self._itl_s = ttft_s, itl_s
        self._prompt = prompt_tokens

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """As the class says."""
        width = plant.width
        if seen.at_s % self.PERIOD_S or plant.wanted != width:
            return plant.wanted
        if min(self.saturation(plant.model, replica, 1.0) for replica in plant.replicas) > 1.0:
            return self._bounds.clamp(width + 1)
        if width > self._bounds.least:
            grown = width / (width - 1)
            if max(self.saturation(plant.model, one, grown) for one in plant.replicas) < self.SENSITIVITY:
                return width - 1
        return width

    def saturation(self, model: DeploymentModel, replica: Replica, times: float) -> float:
        """Latencies over their objectives, with so many times the load."""
        decoding = model.step.seconds(0.0, replica.kv_used * times, replica.num_running * times)
        tokens = replica.queued_prefill * times + self._prompt
        ttft = math.ceil(tokens / model.step_tokens_max) * decoding + model.step.b * tokens
        return max(ttft / self._ttft_s, decoding / self._itl_s)


def _quantile(entries: Iterable[tuple[float, int]], q: float) -> float:
    """By nearest rank; 0 of nothing: the metric of an idle deployment."""
    ascending = sorted(entries)
    rank = q * sum(num for _, num in ascending)
    reached = itertools.accumulate(num for _, num in ascending)
    return next((value for (value, _), num in zip(ascending, reached, strict=True) if num >= rank), 0.0)


def mean_demand(arrivals: Sequence[Arrival], requests_per_s: float) -> Demand:
    """So many requests per second of the traffic's mean lengths."""
    prompt = sum(arrival.input_tokens for arrival in arrivals) / len(arrivals)
    output = sum(arrival.output_tokens for arrival in arrivals) / len(arrivals)
    return Demand(requests_per_s, prompt, output, prompt)


def open_target(arrivals: Sequence[Arrival], model: DeploymentModel, config: PolicyConfig) -> float:
    """Requests that one replica has open at the most load of these lengths with which it is predicted to keep its
    objectives; 1 at the least."""
    facts = WidthFacts(1, model.kv_tokens(1), model.step, model.step_tokens_max, model.devices)
    least, most = 0.0, 1e3
    for _ in range(40):
        rate = (least + most) / 2
        fits = predicted(facts, mean_demand(arrivals, rate), config).worst < 1.0
        least, most = (rate, most) if fits else (least, rate)
    demand = mean_demand(arrivals, least)
    after = predicted(facts, demand, config)
    seconds = (after.itl or 0.0) * config.itl_s * demand.output_tokens
    return max(1.0, least * seconds)
