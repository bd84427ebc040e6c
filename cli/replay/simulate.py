"""A replay: traffic, a plant and who decides its size, in virtual time. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from elasticmoe.cli.replay.judge import ReplayVerdict, judge
from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.plant import Plant
from elasticmoe.cli.replay.policies import Scaler
from elasticmoe.cli.traces.arrival import Arrival

TICK_S = 1.0
DRAIN_S_MAX = 600.0  # after the trace's end; what has not ended then has broken its objectives


class Replayed(msgspec.Struct, frozen=True):
    """`sizes`: (when, replicas wanted) from the beginning on, one for each change; `missed`: when each request came
    that broke an objective."""

    verdict: ReplayVerdict
    sizes: list[tuple[float, int]]
    missed: list[float]


def simulate(
    arrivals: Sequence[Arrival],
    duration_s: float,
    scaler: Scaler,
    model: DeploymentModel,
    actuation: Actuation,
    width: int,
    ttft_s: float,
    itl_s: float,
) -> Replayed:
    """What comes of `arrivals`, which end before `duration_s`, for a deployment of `width` replicas at first. Raises
    ValueError for no arrivals, and for one that a replica has no room for."""
    plant = Plant(model, actuation, width)
    tick, device_seconds = TICK_S, 0.0
    at = 0
    while at < len(arrivals) or tick <= duration_s or (plant.num_open and tick <= duration_s + DRAIN_S_MAX):
        while at < len(arrivals) and arrivals[at].at_s < tick:
            plant.advance(arrivals[at].at_s)
            plant.offer(arrivals[at])
            at += 1
        plant.advance(tick)
        if tick <= duration_s:
            device_seconds = plant.device_seconds
        plant.order(scaler.turn(plant, plant.look()))
        tick += TICK_S
    changes = [change for change in plant.changes if change[0] <= duration_s]
    verdict = judge(len(arrivals), plant.ended, changes, device_seconds, duration_s, model.devices, ttft_s, itl_s)
    kept = {stream.number for stream in plant.ended if stream.ttft_s <= ttft_s and stream.gap_s <= itl_s}
    missed = [arrival.at_s for number, arrival in enumerate(arrivals) if number not in kept]
    return Replayed(verdict, [(0.0, width), *((when, after) for when, _, after in changes)], missed)
