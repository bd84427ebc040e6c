"""A transition simulated on paper devices: handles are numbers, links are rates, time is arithmetic.

Nothing is allocated and nothing is measured here. What a real HMM does is followed step by step, with the budget
checked at every handle; copies share links as a fluid: each device reads its records one after the other, a device that
is read by several gives each the same part.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from typing import NamedTuple

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.protocol.hmm import RecordCopy
from elasticmoe.services.scaler.planning.plan import Leg, Plan


class Assumptions(NamedTuple):
    """What the simulated machine is like. `link_bytes_per_s`: of a device's link, each way; `share`: the part of it
    that copies may take on a device that serves; `handle_s`: to create, export, import and map one page handle;
    `warm_up_s`: of a joining rank, alone; `step_s`: one step of all ranks."""

    link_bytes_per_s: float
    share: float
    handle_s: float
    warm_up_s: float
    step_s: float


class Timeline(NamedTuple):
    """Seconds since the command. `capacity`: the first layout with the new membership computes; `balanced`: all experts
    are at their place; `total`: everything is released. `copying`: seconds of all legs in which records travel.
    `peak_bytes`: of all devices at the worst instant, `kv_least`: the smallest part of its KV that a staying device had
    to make do with meanwhile; `busiest_source`: bytes read from the busiest device over the mean of all that give."""

    capacity: float
    balanced: float
    total: float
    copying: float
    peak_bytes: int
    kv_least: float
    busiest_source: float


class NullHost:
    """All devices' memory as numbers. Raises ValueError when a handle would exceed a budget."""

    def __init__(self, plan: Plan, sizes: Sizes, memory: MemoryForecast) -> None:
        self._memory = memory
        self._sizes = sizes
        self.records: dict[str, int] = {}
        self.kv: Counter[str] = Counter()
        device = {seat.slot: seat.device for seat in plan.before.seats}
        weights = Counter({name: sizes.common for name in device.values()})
        for experts, nbytes in zip(plan.before.homes, sizes.experts, strict=True):
            for homes in experts:
                for slot in homes:
                    weights[device[slot]] += nbytes
        self.records = dict(weights)
        self.total = 0
        self.peak = 0
        for name in weights:
            self.add(name, weights[name] + memory.ledger)
            self.resize_kv(name, memory.kv_handles[name])

    def add(self, device: str, nbytes: int) -> None:
        """Count bytes that come, or go where negative; verify the budget."""
        self.total += nbytes
        self.peak = max(self.peak, self.total)
        used = self.records.get(device, 0) + self._memory.ledger + self.kv[device] * self._memory.kv_handle_bytes
        if used > self._memory.budgets[device]:
            raise ValueError(f"{device}: {used} bytes exceed the budget of {self._memory.budgets[device]}")

    def resize_kv(self, device: str, handles: int) -> int:
        """Bring a device's KV to `handles`; how many were added."""
        added = handles - self.kv[device]
        self.kv[device] = handles
        self.add(device, added * self._memory.kv_handle_bytes)
        return added

    def join(self, device: str) -> None:
        """A fresh device's ledger."""
        self.records[device] = 0
        self.add(device, self._memory.ledger)

    def arrive(self, copy: RecordCopy) -> None:
        """A handle for a record that is copied."""
        nbytes = self._sizes.of(copy.key)
        self.records[copy.target] += nbytes
        self.add(copy.target, nbytes)

    def keep(self, device: str, nbytes: int) -> None:
        """Release all records but `nbytes`."""
        gone = self.records[device] - nbytes
        self.records[device] = nbytes
        self.add(device, -gone)

    def leave(self, device: str) -> None:
        """Release everything of a device."""
        self.resize_kv(device, 0)
        self.add(device, -self.records.pop(device) - self._memory.ledger)


def simulate(plan: Plan, sizes: Sizes, memory: MemoryForecast, machine: Assumptions) -> Timeline:
    """Run `plan` on a null host. Raises ValueError where a budget would be exceeded."""
    host = NullHost(plan, sizes, memory)
    now = copying = balanced = 0.0
    capacity = None
    kv_least = 1.0
    given: Counter[str] = Counter()
    before = plan.before
    for leg in plan.legs:
        staying = {seat.device for seat in before.seats} & {seat.device for seat in leg.layout.seats}
        kv_least = min(kv_least, *(leg.kv_handles[device] / max(1, host.kv[device]) for device in staying))
        ready, seconds = _prepare(leg, host, sizes, machine)
        for copy in leg.copies:
            given[copy.source] += sizes.of(copy.key)
        now += ready + machine.step_s  # the flip is agreed on at one step and takes place at the next
        copying += seconds
        balanced = now
        capacity = now if capacity is None else capacity
        now += _release(leg, host, sizes, machine)
        before = leg.layout
    if host.total != plan.bytes_after:
        raise ValueError(f"{host.total} bytes are held in the end, {plan.bytes_after} were planned")
    busiest = max(given.values()) * len(given) / sum(given.values()) if given else 0.0
    return Timeline(capacity or 0.0, balanced, now, copying, host.peak, kv_least, busiest)


def _prepare(leg: Leg, host: NullHost, sizes: Sizes, machine: Assumptions) -> tuple[float, float]:
    """Vacate, create, copy, attach; seconds until all is prepared, and those of the copies in them."""
    joining = {seat.device for seat in leg.joining}
    shrunk = [host.resize_kv(device, handles) for device, handles in leg.kv_handles.items() if device not in joining]
    vacating = machine.step_s if any(added < 0 for added in shrunk) else 0.0
    handles: Counter[str] = Counter()
    for device in sorted(joining):
        host.join(device)
        handles[device] = host.resize_kv(device, leg.kv_handles[device]) + 1
    for copy in leg.copies:
        host.arrive(copy)
        handles[copy.target] += 1
    creating = max(handles.values(), default=0) * machine.handle_s
    copying = Links(leg, sizes, machine).run()
    attaching = machine.warm_up_s if joining else machine.step_s
    return vacating + creating + copying + attaching, copying


def _release(leg: Leg, host: NullHost, sizes: Sizes, machine: Assumptions) -> float:
    """Give back what only the old layout used, make KV of it; seconds."""
    weights = Counter({seat.device: sizes.common for seat in leg.layout.seats})
    device = {seat.slot: seat.device for seat in leg.layout.seats}
    for experts, nbytes in zip(leg.layout.homes, sizes.experts, strict=True):
        for homes in experts:
            for slot in homes:
                weights[device[slot]] += nbytes
    for name, nbytes in weights.items():
        host.keep(name, nbytes)
    for seat in leg.leaving:
        host.leave(seat.device)
    grown = max(host.resize_kv(name, handles) for name, handles in leg.kv_handles_after.items())
    return machine.step_s + max(0, grown) * machine.handle_s


class _Flow:
    """A copy that is under way."""

    def __init__(self, source: str, target: str, remaining: float, now: float) -> None:
        self.source, self.target, self.remaining = source, target, remaining
        self.rate = 0.0
        self.since = now
        self.event = 0  # the latest number under which its end is expected


class Links:
    """The copies of one leg as flows over the devices' links."""

    def __init__(self, leg: Leg, sizes: Sizes, machine: Assumptions) -> None:
        joining = {seat.device for seat in leg.joining}
        self._queues: defaultdict[str, deque[tuple[str, int]]] = defaultdict(deque)
        for copy in leg.copies:
            self._queues[copy.target].append((copy.source, sizes.of(copy.key)))
        full, part = machine.link_bytes_per_s, machine.link_bytes_per_s * machine.share
        self._ingress = {target: full if target in joining else part for target in self._queues}
        self._egress = part
        self._readers: defaultdict[str, list[_Flow]] = defaultdict(list)
        self._events: list[tuple[float, int, _Flow]] = []
        self._serial = 0

    def run(self) -> float:
        """Seconds until the last copy ends."""
        for target in self._queues:
            self._start(target, 0.0)
        now = 0.0
        while self._events:
            at, event, flow = heapq.heappop(self._events)
            if event != flow.event:
                continue
            now = at
            self._readers[flow.source].remove(flow)
            self._reprice(flow.source, now)
            self._start(flow.target, now)
        return now

    def _start(self, target: str, now: float) -> None:
        queue = self._queues[target]
        if queue:
            source, nbytes = queue.popleft()
            self._readers[source].append(_Flow(source, target, nbytes, now))
            self._reprice(source, now)

    def _reprice(self, source: str, now: float) -> None:
        """Share the source's link anew among its readers."""
        readers = self._readers[source]
        for flow in readers:
            flow.remaining = max(0.0, flow.remaining - flow.rate * (now - flow.since))
            flow.rate = min(self._ingress[flow.target], self._egress / len(readers))
            flow.since = now
            self._serial += 1
            flow.event = self._serial
            heapq.heappush(self._events, (now + flow.remaining / flow.rate, flow.event, flow))
