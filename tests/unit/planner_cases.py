"""Layouts, targets and memories for the planner's tests, and a model of what a host holds while a plan runs."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.services.scaler.planning.plan import Leg, Plan, Target

DEVICES = [f"host:{i}" for i in range(10)]
LEDGER = 7
KV_HANDLE = 16
KV_MIN = 2


@st.composite
def sizes(draw: st.DrawFn) -> tuple[Sizes, tuple[int, ...]]:
    """Sizes and the number of experts of each layer."""
    counts = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 5, 8, 12]), min_size=1, max_size=5)))
    expert = draw(st.integers(1, 40))
    layers = tuple(draw(st.lists(st.integers(1, 30), min_size=len(counts), max_size=len(counts))))
    experts = tuple(draw(st.sampled_from([expert, 2 * expert])) if count else 0 for count in counts)
    return Sizes(draw(st.integers(1, 100)), layers, experts), counts


@st.composite
def layouts(draw: st.DrawFn, counts: tuple[int, ...], holders_max: int = 1) -> Layout:
    """Any layout: experts anywhere, slots, replica numbers and devices with gaps."""
    tp = draw(st.sampled_from([1, 1, 1, 2]))
    dp = draw(st.integers(1, 3 if tp == 2 else 6))
    replicas = sorted(draw(st.permutations(range(8)))[:dp])
    slots = draw(st.permutations(range(10)))[: dp * tp]
    devices = draw(st.permutations(DEVICES))[: dp * tp]
    seats = tuple(Seat(RankId(replicas[i // tp], i % tp), slots[i], devices[i]) for i in range(dp * tp))
    holders = st.lists(st.sampled_from(slots), min_size=1, max_size=holders_max, unique=True)
    homes = tuple(tuple(tuple(sorted(draw(holders))) for _ in range(count)) for count in counts)
    return Layout(draw(st.integers(1, 9)), tp, seats, homes)


@st.composite
def targets(draw: st.DrawFn, layout: Layout) -> Target:
    """Any target that can be reached."""
    replicas = sorted({seat.rank.replica for seat in layout.seats})
    kind = draw(st.sampled_from(["replicas", "remove", "devices"]))
    if kind == "replicas":
        return Target(replicas=draw(st.integers(1, len(DEVICES) // layout.tp)))
    gone = draw(st.lists(st.sampled_from(replicas), max_size=len(replicas) - 1, unique=True))
    if kind == "remove":
        return Target(remove=tuple(gone))
    kept = [seat.device for seat in layout.seats if seat.rank.replica not in gone]
    free = [device for device in DEVICES if device not in {seat.device for seat in layout.seats}]
    added = draw(st.permutations(free))[: draw(st.integers(0, len(free) // layout.tp)) * layout.tp]
    return Target(devices=(*added, *kept))


def memory_of(
    layout: Layout, sizes: Sizes, spare: int, budget_spare: int = 1_000, kv_handles_load: int = 0
) -> MemoryForecast:
    """Memory as a load settles it: the fullest device has `spare` KV handles, all others as many."""
    weights = weights_of(layout, sizes)
    footprint = max(weights.values()) + spare * KV_HANDLE
    return MemoryForecast(
        budgets=dict.fromkeys(DEVICES, footprint + LEDGER + budget_spare),
        footprint=footprint,
        ledger=LEDGER,
        kv_handle_bytes=KV_HANDLE,
        kv_handles_min=KV_MIN,
        kv_handles={seat.device: spare for seat in layout.seats},
        kv_handles_load=kv_handles_load,
    )


def records_of(layout: Layout) -> dict[str, set[RecordKey]]:
    """The records that `layout` wants on each device."""
    return {
        seat.device: {
            RecordKey("base", shard=seat.rank.tp),
            *(RecordKey("layer", layer, shard=seat.rank.tp) for layer in range(len(layout.homes))),
            *(
                RecordKey("expert", layer, expert)
                for layer in range(len(layout.homes))
                for expert in layout.experts_on(seat.slot, layer)
            ),
        }
        for seat in layout.seats
    }


def size_of(key: RecordKey, sizes: Sizes) -> int:
    """Bytes of a record."""
    return {"base": sizes.base, "layer": sizes.layers[key.layer], "expert": sizes.experts[key.layer]}[key.kind]


def weights_of(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """Bytes of weights by device."""
    return {device: sum(size_of(key, sizes) for key in keys) for device, keys in records_of(layout).items()}


class Host:
    """What all devices hold; every change verifies the budgets, and notes the peaks."""

    def __init__(self, layout: Layout, sizes: Sizes, memory: MemoryForecast) -> None:
        self.layout, self.sizes, self.memory = layout, sizes, memory
        self.records = records_of(layout)
        self.kv = Counter(memory.kv_handles)
        self.peak: dict[str, int] = {}
        self.peak_total = 0
        self.note()

    def bytes_on(self, device: str) -> int:
        """Bytes of weights, KV and ledger."""
        keys = self.records[device]
        return sum(size_of(key, self.sizes) for key in keys) + LEDGER + self.kv[device] * KV_HANDLE

    def total(self) -> int:
        """Bytes on all devices."""
        return sum(self.bytes_on(device) for device in self.records)

    def note(self) -> None:
        """Take the figures of this instant."""
        for device in self.records:
            used = self.bytes_on(device)
            assert used <= self.memory.budgets[device]
            self.peak[device] = max(self.peak.get(device, 0), used)
        self.peak_total = max(self.peak_total, self.total())

    def run(self, leg: Leg) -> None:
        """One leg, in the order in which the HMM does it."""
        self.peak = {}
        self.note()
        old = {seat.device for seat in self.layout.seats}
        for device in sorted(old):
            assert leg.kv_handles[device] <= self.kv[device], "KV must not grow before the release"
            self.kv[device] = leg.kv_handles[device]
            self.note()
        for seat in leg.joining:
            assert seat.device not in self.records
            self.records[seat.device] = set()
            self.kv[seat.device] = leg.kv_handles[seat.device]
        for copy in leg.copies:
            if copy.source:  # else the checkpoint has it
                assert copy.source in old, "sources are of the layout before"
                assert copy.key in self.records[copy.source], "a source holds what it gives"
            assert copy.key not in self.records[copy.target], "nothing arrives twice"
            self.records[copy.target].add(copy.key)
            self.note()
        self.release(leg)

    def release(self, leg: Leg) -> None:
        """What only the old layout used goes, leaving devices last of all."""
        wanted = records_of(leg.layout)
        for device, keys in wanted.items():
            assert keys <= self.records[device], "everything has arrived"
            self.records[device] = keys
        self.kv.update({device: count - self.kv[device] for device, count in leg.kv_handles_after.items()})
        self.note()
        for seat in leg.leaving:
            del self.records[seat.device], self.kv[seat.device]
        self.layout = leg.layout
        self.note()


def run_plan(plan: Plan, sizes: Sizes, memory: MemoryForecast) -> Host:
    """Run all legs; the host as it is afterwards. Asserts all rules of `Host`, and the plan's own figures."""
    host = Host(plan.before, sizes, memory)
    assert host.total() == plan.bytes_before
    for leg in plan.legs:
        host.run(leg)
        assert host.peak == leg.peak_bytes
        assert leg.bytes_copied == sum(size_of(copy.key, sizes) for copy in leg.copies)
    assert host.total() == plan.bytes_after
    assert host.peak_total <= plan.peak_bytes
    return host
