"""`elasticmoe bench plan`: plan transitions of a very large model on hundreds of devices, and simulate them.

Planning is measured; everything else is simulated on a null backend with the assumptions that the output names. Nothing
is copied, no memory is allocated, no rank runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any, NamedTuple

from elasticmoe.cli.arguments import number, whole
from elasticmoe.cli.bench.plan_simulation import Assumptions, simulate
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.terminal import say
from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.layout import Layout, initial_layout
from elasticmoe.common.model_spec import round_up
from elasticmoe.services.scaler.planning.plan import Plan, Rates, Target
from elasticmoe.services.scaler.planning.planner import plan_way

GRANULARITY = 2 << 20
GIB = 1 << 30
KV_BLOCK_TOKENS = 16
KV_BLOCKS_PER_HANDLE = 16
KV_TOKENS_MIN = 32_768  # the longest sequence that a device must hold
LEDGER_BYTES = 64 << 20
DEVICES_V3 = 384
PAPER = {
    ("DeepSeek-V2-Lite", 3, 4): "2.43 s, downtime 0, peak 275.2 GB",
    ("DeepSeek-V2-Lite", 4, 3): "1.38 s, downtime 0, peak 274.4 GB",
}


class Geometry(NamedTuple):
    """A model with multi-head latent attention. `query_rank` 0: queries are not compressed."""

    name: str
    layers: int
    dense_layers: int
    hidden: int
    vocab: int
    dense_width: int
    expert_width: int
    experts: int
    shared_experts: int
    heads: int
    query_rank: int
    kv_rank: int
    nope: int = 128
    rope: int = 64
    value: int = 128

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention."""
        query = self.heads * (self.nope + self.rope)
        queries = self.query_rank * (self.hidden + query) if self.query_rank else self.hidden * query
        keys = self.hidden * (self.kv_rank + self.rope) + self.kv_rank * self.heads * (self.nope + self.value)
        return queries + keys + self.heads * self.value * self.hidden

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of each layer."""
        return tuple(0 if layer < self.dense_layers else self.experts for layer in range(self.layers))


DEEPSEEK_V3 = Geometry("DeepSeek-V3", 61, 3, 7168, 129_280, 18_432, 2048, 256, 1, 128, 1536, 512)
DEEPSEEK_V2_LITE = Geometry("DeepSeek-V2-Lite", 27, 1, 2048, 102_400, 10_944, 1408, 64, 2, 16, 0, 512)
# Bytes of a weight in matrices; fp8 has a float32 scale for each 128 x 128 block.
DTYPES = {"bf16": 2.0, "fp8": 1.0 + 4 / 128**2}
TRANSITIONS_V3 = ((32, 384), (64, 72), (256, 288), (376, 384), (288, 256), (384, 320), (384, 32))
TRANSITIONS_V2_LITE = ((3, 4), (4, 3))


def sizes_of_geometry(model: Geometry, dtype: str) -> Sizes:
    """Bytes of the records, padded to the granularity. Embeddings and head are bfloat16, norms and gate float32."""
    weight = DTYPES[dtype]
    layers = []
    for count in model.counts:
        width = model.expert_width * model.shared_experts if count else model.dense_width
        matrices = model.attention_weights + 3 * model.hidden * width
        small = 4 * (2 * model.hidden + count * (model.hidden + 1))
        layers.append(round_up(int(matrices * weight) + small, GRANULARITY))
    expert = round_up(int(3 * model.hidden * model.expert_width * weight), GRANULARITY)
    base = round_up(4 * model.vocab * model.hidden + 4 * model.hidden, GRANULARITY)
    return Sizes(base, tuple(layers), tuple(expert if count else 0 for count in model.counts))


def kv_handle_bytes(model: Geometry) -> int:
    """Bytes of one KV handle: the compressed keys and values in bfloat16."""
    block = KV_BLOCK_TOKENS * model.layers * (model.kv_rank + model.rope) * 2
    return round_up(block * KV_BLOCKS_PER_HANDLE, GRANULARITY)


def memory_for(model: Geometry, layout: Layout, sizes: Sizes, devices: list[str], budget: int) -> MemoryForecast:
    """Memory after a load that gives KV all that the budget leaves. Raises ValueError when that is too little."""
    weights = {seat.slot: sizes.common for seat in layout.seats}
    for experts, nbytes in zip(layout.homes, sizes.experts, strict=True):
        for homes in experts:
            for slot in homes:
                weights[slot] += nbytes
    handle = kv_handle_bytes(model)
    handles_min = -(-KV_TOKENS_MIN // (KV_BLOCK_TOKENS * KV_BLOCKS_PER_HANDLE))
    kv = {}
    for seat in layout.seats:
        kv[seat.device] = (budget - LEDGER_BYTES - weights[seat.slot]) // handle
        if kv[seat.device] < handles_min:
            raise ValueError(f"{weights[seat.slot]} bytes of weights leave too little of a budget of {budget}")
    footprint = max(weights[seat.slot] + kv[seat.device] * handle for seat in layout.seats)
    return MemoryForecast(dict.fromkeys(devices, budget), footprint, LEDGER_BYTES, handle, handles_min, kv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench plan`; the defaults are the assumptions of benchmarks/plan.md."""
    parser.add_argument("--link-gb-s", type=number(), default=392.0, help="a device's link, each way, in 10^9 bytes/s")
    parser.add_argument(
        "--share", type=number(), default=0.05, help="part of a serving device's link that copies may take"
    )
    parser.add_argument("--handle-us", type=number(), default=100.0, help="create, export and map a page handle")
    parser.add_argument("--warm-up-s", type=number(), default=4.2, help="a joining rank's warm-up, alone")
    parser.add_argument("--step-ms", type=number(), default=50.0, help="one step of all ranks")
    parser.add_argument("--budget-gib", type=number(), default=112.0, help="of each device")
    parser.add_argument("--repeats", type=whole(1), default=3, help="plans per transition; the median time is given")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and simulate, print the table, write raw data. Raises ValueError when a budget would be exceeded."""
    machine = Assumptions(args.link_gb_s * 1e9, args.share, args.handle_us * 1e-6, args.warm_up_s, args.step_ms * 1e-3)
    cases = [(DEEPSEEK_V3, dtype, pair, DEVICES_V3) for dtype in DTYPES for pair in TRANSITIONS_V3]
    cases += [(DEEPSEEK_V2_LITE, "bf16", pair, 4) for pair in TRANSITIONS_V2_LITE]
    rows = []
    for model, dtype, (before, after), devices in cases:
        rows.append(_case(model, dtype, before, after, devices, machine, int(args.budget_gib * GIB), args.repeats))
    say("SIMULATION on a null backend: only `plan s` is measured, all else follows from the assumptions.")
    assumed = ", ".join(f"{name}={value:g}" for name, value in machine._asdict().items())
    say(f"{assumed} budget={args.budget_gib:g} GiB")
    say(table([{name: _shown(value) for name, value in row.items()} for row in rows]))
    data = {
        "provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])),
        "simulated": "all columns but `plan s`",
        "assumptions": machine._asdict() | {"budget_gib": args.budget_gib},
        "rows": rows,
    }
    say(f"raw data: {write_raw(args.output, 'plan', data)}")
    return 0


def _case(
    model: Geometry,
    dtype: str,
    before: int,
    after: int,
    num_devices: int,
    machine: Assumptions,
    budget: int,
    repeats: int,
) -> dict[str, Any]:
    """One row: plan `repeats` times, simulate once."""
    devices = list(DeviceCount("device", num_devices).names())
    sizes = sizes_of_geometry(model, dtype)
    layout = initial_layout(model.counts, devices[:before], slots_max=num_devices)
    memory = memory_for(model, layout, sizes, devices, budget)
    rates = Rates(
        link_bytes_per_s=machine.link_bytes_per_s * machine.share,
        handle_s=machine.handle_s,
        warm_up_s=machine.warm_up_s,
        step_s=machine.step_s,
    )
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        plan = plan_way(layout, Target(replicas=after), sizes, memory, devices, rates)
        seconds.append(time.perf_counter() - started)
    for leg in plan.legs:
        leg.layout.check(num_devices)
    return _row(model, dtype, plan, statistics.median(seconds), max(seconds), sizes, memory, machine)


def _row(
    model: Geometry,
    dtype: str,
    plan: Plan,
    plan_s: float,
    plan_s_max: float,
    sizes: Sizes,
    memory: MemoryForecast,
    machine: Assumptions,
) -> dict[str, Any]:
    line = simulate(plan, sizes, memory, machine)
    before, after = plan.before.dp, plan.after.dp
    return {
        "model": f"{model.name} {dtype}",
        "devices": f"{before} → {after}",
        "experts moved": plan.experts_moved,
        "GB moved": plan.bytes_copied / 1e9,
        "capacity s": line.capacity,
        "copying s": line.copying,
        "total s": line.total,
        "planner's s": plan.seconds,
        "pause ms": plan.pause_ms,
        "peak / larger": line.peak_bytes / max(plan.bytes_before, plan.bytes_after),
        "KV least": line.kv_least,
        "busiest / mean source": line.busiest_source,
        "plan s": plan_s,
        "plan s max": plan_s_max,
        "paper": PAPER.get((model.name, before, after), "–"),
    }


def _shown(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
