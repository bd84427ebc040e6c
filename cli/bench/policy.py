"""`elasticmoe bench policy`: what the autoscaling policy costs the scaler's loop, with hundreds of devices.

The policy's own code decides by windows that are made up; no rank runs. In processor time: `decode`, what it costs to
decode and validate the windows of a second; `take`, to add them up as they come; `turn`, what the policy's turn then
does: to sum up what is known, learn steps, and decide. A shrink that everything else speaks for has its price asked of
the planner.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from elasticmoe.cli.arguments import whole
from elasticmoe.cli.bench.plan import (
    DEEPSEEK_V3,
    GIB,
    KV_BLOCK_TOKENS,
    KV_BLOCKS_PER_HANDLE,
    memory_for,
    sizes_of_geometry,
)
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.terminal import say
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.layout import Layout, initial_layout
from elasticmoe.common.protocol.codec import encode
from elasticmoe.common.protocol.signals import CODEC, RankWindow, RouterWindow, StepSample
from elasticmoe.common.sketch import index
from elasticmoe.services.scaler.control.autoscaling import Autoscaling, follow_load
from elasticmoe.services.scaler.observation import Load
from elasticmoe.services.scaler.planning.plan import Rates
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.signals import Intake
from elasticmoe.services.scaler.policy.step_model import StepModels

DEVICES = 384
ROUTERS = 4
BUDGET_BYTES = 112 * GIB
WARM_TURNS = 70  # by then a shrink is judged
STEPS_TOLD = 8  # of each rank's window
SPREAD = 16  # buckets of each sketch of a router
QUICK: dict[str, Any] = {"down_over_s": 20.0, "hold_s": 20.0}


class Case(NamedTuple):
    """`requests_per_s`: of all routers; `latency_s`: of their first tokens; `policy`: beside QUICK."""

    name: str
    replicas: int
    requests_per_s: int
    latency_s: float
    policy: dict[str, Any]


CASES = (
    Case("busy", 384, 1_500, 0.5, {}),
    Case("grows", 192, 1_500, 5.0, {}),
    Case("idle", 384, 4, 0.1, {}),
    Case("idle, and a shrink is not worth its price", 384, 4, 0.1, {"price_factor": 1_000.0}),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench policy`."""
    parser.add_argument("--turns", type=whole(1), default=100, metavar="N", help="turns that are measured (100)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure each case, print the table, write raw data."""
    rows = [_measure(case, args.turns) for case in CASES]
    say(table(rows))
    command = " ".join(["elasticmoe", *sys.argv[1:]])
    data = {"provenance": provenance(command), "devices": DEVICES, "turns": args.turns, "rows": rows}
    say(f"raw data: {write_raw(args.output, 'policy-cost', data)}")
    return 0


class _Deployment:
    """Windows and facts of a deployment that is made up."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.devices = DeviceCount("device", DEVICES).names()
        self.layout: Layout = initial_layout(DEEPSEEK_V3.counts, list(self.devices)[: case.replicas], slots_max=DEVICES)
        sizes = sizes_of_geometry(DEEPSEEK_V3, "fp8")
        memory = memory_for(DEEPSEEK_V3, self.layout, sizes, list(self.devices), BUDGET_BYTES)
        self.config = PolicyConfig(mode="advise", replicas_max=DEVICES, **{**QUICK, **case.policy})
        self.intake, self.models = Intake(self.config), StepModels()
        self.load: Callable[..., Load] = lambda signals, steps: Load(
            config=self.config,
            signals=signals,
            steps=steps,
            sizes=sizes,
            memory=memory,
            devices=tuple(self.devices),
            rates=Rates(),
            kv_handle_tokens=KV_BLOCK_TOKENS * KV_BLOCKS_PER_HANDLE,
            step_tokens_max=8_192,
        )

    def windows(self, second: int) -> list[RouterWindow | RankWindow]:
        """Of one second."""
        now, num = float(second), self.case.requests_per_s // ROUTERS
        place = index(self.case.latency_s)
        ttft = tuple((place + at, max(1, num // SPREAD)) for at in range(SPREAD))
        gaps = tuple((index(0.02) + at, 200 * max(1, num // SPREAD)) for at in range(SPREAD))
        joint = tuple((bucket, gaps[at][0], 1) for bucket, _ in ttft for at in range(SPREAD) if at < num // SPREAD)
        told: list[RouterWindow | RankWindow] = [
            RouterWindow(
                router=f"router:{router}",
                number=second,
                epoch=self.layout.epoch,
                ended_s=now,
                span_s=1.0,
                admitted=num,
                prompt_tokens=500 * num,
                finished=num,
                output_tokens=200 * num,
                ttft=ttft,
                gaps=gaps,
                joint=joint,
            )
            for router in range(ROUTERS)
        ]
        work = [(64 * at, 500 * (at * at % 7), 1 + at % 3) for at in range(STEPS_TOLD)]
        steps = tuple(
            StepSample(0.02 + 1e-5 * prefill + 1e-7 * kv + 1e-3 * sequences, prefill, kv, sequences, 1_000)
            for prefill, kv, sequences in work
        )
        for seat in self.layout.seats:
            told.append(
                RankWindow(
                    rank=seat.rank,
                    incarnation=f"rank-{seat.rank}:1",
                    number=second,
                    epoch=self.layout.epoch,
                    ended_s=now,
                    span_s=1.0,
                    running=3,
                    kv_used=1_500,
                    kv_total=500_000,
                    uncached_tokens=1_500,
                    cached_tokens=500,
                    num_steps=40,
                    steps=steps,
                )
            )
        return told


def _measure(case: Case, turns: int) -> dict[str, Any]:
    deployment, after = _Deployment(case), Autoscaling()
    layout, intake, models = deployment.layout, deployment.intake, deployment.models
    ranks = {seat.rank: f"rank-{seat.rank}:1" for seat in layout.seats}
    routers = {f"router:{router}" for router in range(ROUTERS)}
    times: dict[str, list[float]] = {"decode": [], "take": [], "turn": []}
    reasons = set[str]()
    intake.expect(routers, ranks, layout.epoch, 0.0)
    for second in range(1, WARM_TURNS + turns + 1):
        sent, now = [encode(window, sender="sender:1") for window in deployment.windows(second)], second + 0.01
        begun = time.thread_time()
        told = [CODEC.decode(raw).body for raw in sent]
        decoded = time.thread_time()
        for window in told:
            intake.take(window, now)
        taken = time.thread_time()
        intake.expect(routers, ranks, layout.epoch, now)
        models.learn(layout.dp, intake.take_steps())
        seen = deployment.load(intake.signals(now), models.known)
        after, _ = follow_load(after, seen, layout, None, None, now, is_serving=True, is_lossy=False)
        decided = time.thread_time()
        if second > WARM_TURNS:
            spent = decoded - begun, taken - decoded, decided - taken
            for kept, seconds in zip(times.values(), spent, strict=True):
                kept.append(seconds)
            assert after.decision is not None, "a turn decides"
            reasons.add(after.decision.reason.value)
    return {
        "case": case.name,
        "replicas": case.replicas,
        "decided": ", ".join(sorted(reasons)),
        **{f"{part} {name} ms": value for part, kept in times.items() for name, value in _told(kept).items()},
    }


def _told(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(1e3 * ordered[len(ordered) // 2], 3),
        "p99": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 3),
        "max": round(1e3 * ordered[-1], 3),
    }
