"""What a model needs on each device, and whether it fits. Pure; all in bytes.

The launcher asks here before a start, the HMM when it loads and when it stages a layout, and the planner for its plans:
so all of them get the same answer. Longer than other files, so that this arithmetic stays in one place.

A device holds weights, its rank's ledger, a mailbox where ranks exchange tokens by mailboxes, and KV in handles, at
least as many as one sequence of full length needs. While a layout is staged, the device holds the weights of both
layouts, and no more KV than before. KV takes what the footprint leaves beside weights, at least what a device had at
the load, and never more than the budget leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from elasticmoe.common.config import HmmConfig, ScalerConfig
from elasticmoe.common.devices.driver import MemoryInfo
from elasticmoe.common.devices.factory import backend_of_device, granularity_of
from elasticmoe.common.devices.names import DeviceCount, hardware_of
from elasticmoe.common.families import record, records
from elasticmoe.common.layout import Layout, keys_on, level_replicas
from elasticmoe.common.model_spec import KvGeometry, ModelSpec, RecordKey, RecordSpec, kv_geometry, round_up
from elasticmoe.common.protocol.errors import DoesNotFit, InvalidRequest, NotFound
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.common.seat_sizes import BusSizes, LedgerSizes, size_bus, size_ledger, size_mailbox
from elasticmoe.common.wording import size

AVAILABLE_SHARE = 0.8  # of the memory of devices; the rest is for activations, our processes and all others
_FIRST_SHARE = 8  # a joiner that gets its experts in the next leg starts with this part of its final KV


class Sizes(msgspec.Struct, frozen=True):
    """Bytes of a model's records, rounded up to the granularity: the base record, each layer's record, one expert of
    each layer (0: a dense layer). Of a replica's shards of a record, the largest: all have as much room."""

    base: int
    layers: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def common(self) -> int:
        """Bytes that every device holds: base and layer records, of its rank's tp index."""
        return self.base + sum(self.layers)

    def of(self, key: RecordKey) -> int:
        """Bytes of the record called `key`."""
        if key.kind == "expert":
            return self.experts[key.layer]
        return self.layers[key.layer] if key.kind == "layer" else self.base


@lru_cache(maxsize=2)  # asked for at each check and stage; one model is loaded, with many records
def sizes_of(spec: ModelSpec, granularity: int) -> Sizes:
    """The sizes of the records of `spec`, as the HMM makes page handles of them."""

    def nbytes(*keys: RecordKey) -> int:
        return round_up(max(record(spec, key).nbytes for key in keys), granularity)

    shards = range(spec.tp)
    return Sizes(
        base=nbytes(*(RecordKey("base", shard=shard) for shard in shards)),
        layers=tuple(
            nbytes(*(RecordKey("layer", layer, shard=shard) for shard in shards)) for layer in range(spec.num_layers)
        ),
        experts=tuple(
            nbytes(RecordKey("expert", layer, 0)) if count else 0
            for layer, count in enumerate(spec.num_experts_by_layer)
        ),
    )


def weights_on(sizes: Sizes, *layouts: Layout) -> dict[str, int]:
    """Bytes of weights by device of `layouts`, which agree on the slots' devices; what several of them want is there
    once."""
    by_slot: Counter[int] = Counter()
    for slot in {slot for layout in layouts for slot in layout.slots}:
        by_slot[slot] = sizes.common
    first, *others = layouts
    for layer, nbytes in enumerate(sizes.experts):
        for expert, slots in enumerate(first.homes[layer]):
            homes = set(slots).union(*(other.homes[layer][expert] for other in others)) if others else slots
            for slot in homes:
                by_slot[slot] += nbytes
    return {seat.device: by_slot[seat.slot] for layout in layouts for seat in layout.seats}


class Needs(NamedTuple):
    """What a rank's device needs beside weights: its ledger's bytes, KV handles of `kv_handle_bytes`, the fewest that
    one sequence of full length needs, and its mailbox's bytes (0: it has none)."""

    ledger: int
    kv_handle_bytes: int
    kv_handles_min: int
    mailbox: int = 0

    @property
    def fixed(self) -> int:
        """Bytes of what never changes: ledger and mailbox."""
        return self.ledger + self.mailbox

    def kv_room(self, budget: int, weights: int) -> int:
        """KV handles for which a budget has room; below 0 where it has none for the rest."""
        return (budget - weights - self.fixed) // self.kv_handle_bytes

    def total(self, weights: int, kv_handles: int) -> int:
        """Bytes of a device with so many KV handles."""
        return weights + self.fixed + kv_handles * self.kv_handle_bytes

    def check(
        self, when: str, budgets: Mapping[str, int], weights: Mapping[str, int], kv_handles: Mapping[str, int]
    ) -> None:
        """Raise DoesNotFit with the figures of the first device of `weights` that exceeds its budget or has too few KV
        handles; NotFound (`unknown_device`) for one without a budget."""
        for device, nbytes in sorted(weights.items()):
            budget, count = budgets.get(device), kv_handles[device]
            if budget is None:
                raise NotFound(f"{device} is not one of the {len(budgets)} devices", code="unknown_device")
            excess = self.total(nbytes, count) - budget
            if count < self.kv_handles_min:
                what = f"are left, and one sequence of full length needs {self.kv_handles_min}"
            elif excess > 0:
                what = f"would exceed it by {size(excess)}"
            else:
                continue
            raise DoesNotFit(
                f"{device} {when}: of the budget of {size(budget)}, weights take {size(nbytes)} and "
                f"{_fixed(self)}; {max(0, count)} KV handles of {size(self.kv_handle_bytes)} {what}; more "
                "replicas leave each device fewer experts; a start with more --device-memory has larger budgets"
            )


def _fixed(needs: Needs) -> str:
    """Its parts, with their sizes."""
    mailbox = f", its mailbox {size(needs.mailbox)}" if needs.mailbox else ""
    return f"the ledger {size(needs.ledger)}{mailbox}"


class DeviceTooSmall(DoesNotFit):
    """The `budget` of `device` holds no `weights_bytes`, `ledger_bytes`, `mailbox_bytes` and `kv_bytes_min`, the KV of
    one sequence of full length; or the load allows less KV than that."""

    def __init__(self, device: str, budget: int, weights_bytes: int, needs: Needs, load: LoadModel) -> None:
        kv_bytes_min = needs.kv_handles_min * needs.kv_handle_bytes
        room = max(0, budget - weights_bytes - needs.fixed)
        super().__init__(
            f"{device}: the KV of one sequence of {load.max_model_len} tokens needs {size(kv_bytes_min)}; of the "
            f"budget of {size(budget)}, weights take {size(weights_bytes)} and {_fixed(needs)}, which "
            f"leaves {size(room)}, and KV may take {size(load.kv_bytes_max)}: {_way_out(room < kv_bytes_min)}"
        )
        self.device, self.budget = device, budget
        self.weights_bytes = weights_bytes
        self.ledger_bytes = needs.ledger
        self.mailbox_bytes = needs.mailbox
        self.kv_bytes_min = kv_bytes_min


class DeviceSizes(NamedTuple):
    """What one device gets at a load.

    keys: its weight records; `weights_bytes`: what they take
    ledger_bytes, mailbox_bytes: of its rank; a mailbox of 0 bytes stands for none
    num_kv_handles: as many as the load's limit allows and all devices of its replica have room for
    """

    keys: tuple[RecordKey, ...]
    weights_bytes: int
    ledger_bytes: int
    mailbox_bytes: int
    num_kv_handles: int


class LoadSizes(NamedTuple):
    """All that a load needs.

    records: of the model
    kv: how KV blocks lie in KV handles
    ledger: of one rank
    bus: of the host
    devices: what each device of the layout gets, by its name
    """

    records: tuple[RecordSpec, ...]
    kv: KvGeometry
    ledger: LedgerSizes
    bus: BusSizes
    devices: dict[str, DeviceSizes]

    @property
    def footprint(self) -> int:
        """The most bytes of weights and KV of one device."""
        handle_bytes = self.kv.handle_bytes
        return max(device.weights_bytes + device.num_kv_handles * handle_bytes for device in self.devices.values())

    @property
    def kv_handles(self) -> int:
        """The most KV handles of one device."""
        return max(device.num_kv_handles for device in self.devices.values())


def budgets_of(config: HmmConfig, available_bytes: int, memory: Mapping[str, MemoryInfo]) -> dict[str, int]:
    """Bytes that each device may use, a multiple of the granularity. What the operator says; else AVAILABLE_SHARE of
    what the device has, as its driver says (`memory`), shared equally by the parts of one accelerator; without a driver
    an equal part of that share of `available_bytes`. A driver tells what a device has, not what is free: an HMM's
    successor has the same budgets, whatever ranks hold."""
    devices = DeviceCount.parse(config.devices)
    granularity = granularity_of(devices, config.granularity)
    names = devices.names()
    equal = int(available_bytes * AVAILABLE_SHARE) // len(names)
    parts = Counter(map(hardware_of, names))

    def budget(name: str) -> int:
        share = int(memory[name].total * AVAILABLE_SHARE) // parts[hardware_of(name)] if name in memory else equal
        return (config.device_bytes or share) // granularity * granularity

    return {name: budget(name) for name in names}


def load_of(config: ScalerConfig, spec: ModelSpec, layout: Layout) -> LoadModel:
    """What the HMM is told to load for a deployment of this configuration."""
    return LoadModel(
        op_id=f"load-epoch-{layout.epoch}",
        model_path=str(Path(config.model).absolute()),
        dtype=spec.dtype,
        layout=layout,
        block_size=config.block_size,
        kv_bytes_max=config.kv_bytes,
        max_tokens=config.max_tokens_per_step,
        max_sequences=config.max_sequences,
        max_model_len=min(config.max_model_len, spec.max_positions),
        exchange=config.exchange_kind,
    )


def size_load(load: LoadModel, spec: ModelSpec, budgets: Mapping[str, int], granularity: int) -> LoadSizes:
    """`budgets`: of every device of the host; `spec`: for replicas as the layout's. Raises DoesNotFit with the figures,
    InvalidRequest."""
    if load.max_model_len > spec.max_positions:
        limit = "sliding_window" if spec.sliding_window == spec.max_positions else "max_position_embeddings"
        raise InvalidRequest(
            f"max_model_len {load.max_model_len} exceeds the model's {limit} of {spec.max_positions} tokens"
        )
    check_layout(load.layout, spec)
    if spec.tp != load.layout.tp:
        raise ValueError(f"the spec is for tp {spec.tp}, the layout has tp {load.layout.tp}")
    specs = tuple(records(spec))
    handle_bytes_min = max(backend_of_device(seat.device).kv_handle_bytes_min for seat in load.layout.seats)
    geometry = kv_geometry(spec, load.block_size, granularity, handle_bytes_min)
    bus = size_bus(load, spec, len(budgets), granularity)
    devices = _size_devices(load, sizes_of(spec, granularity), needs_of(load, spec, geometry, granularity), budgets)
    return LoadSizes(specs, geometry, size_ledger(load, granularity), bus, devices)


def needs_of(load: LoadModel, spec: ModelSpec, geometry: KvGeometry, granularity: int) -> Needs:
    """What the load's ranks need beside weights. Raises InvalidRequest."""
    handles_min = -(-load.max_model_len // (load.block_size * geometry.blocks_per_handle))
    ledger, mailbox = size_ledger(load, granularity).nbytes, size_mailbox(load, spec, granularity)
    return Needs(ledger, geometry.handle_bytes, handles_min, mailbox)


def _size_devices(load: LoadModel, sizes: Sizes, needs: Needs, budgets: Mapping[str, int]) -> dict[str, DeviceSizes]:
    """By device of the layout. KV takes what its limit and the budgets of a replica allow. Raises DeviceTooSmall."""
    weights = weights_on(sizes, load.layout)
    num_kv = {}
    for seat in load.layout.seats:
        budget, nbytes = budgets[seat.device], weights[seat.device]
        num = max(0, min(load.kv_bytes_max // needs.kv_handle_bytes, needs.kv_room(budget, nbytes)))
        if num < needs.kv_handles_min:
            raise DeviceTooSmall(seat.device, budget, nbytes, needs, load)
        num_kv[seat.device] = num
    return {
        seat.device: DeviceSizes(
            tuple(keys_on(load.layout, seat.slot)), weights[seat.device], needs.ledger, needs.mailbox, count
        )
        for seat, count in zip(load.layout.seats, level_replicas(num_kv, load.layout).values(), strict=True)
    }


def _way_out(is_budget: bool) -> str:
    """Which settings help, with the flags of `elasticmoe up` that set them."""
    if is_budget:
        return "raise device_bytes (--device-memory), take fewer devices, or lower max_model_len (--max-model-len)"
    return "raise kv_bytes (--kv-memory), or lower max_model_len (--max-model-len)"


def check_layout(layout: Layout, spec: ModelSpec) -> None:
    """Raise InvalidRequest unless the layout gives exactly the model's experts a home."""
    counts = tuple(len(experts) for experts in layout.homes)
    if counts != spec.num_experts_by_layer:
        raise InvalidRequest(
            f"the layout has experts {list(counts)[:8]} in its first layers of {len(counts)}, the model has "
            f"{list(spec.num_experts_by_layer)[:8]} of {spec.num_layers}"
        )


class MemoryForecast(msgspec.Struct, frozen=True):
    """What bounds a plan.

    budgets: bytes of each device of the host
    footprint: bytes of weights and KV of one device; KV fills it up as weights leave
    ledger, mailbox: bytes of one rank's; a mailbox of 0 bytes stands for none
    kv_handle_bytes: bytes of a KV handle
    kv_handles_min: the fewest KV handles that a rank can work with
    kv_handles: how many each device of the layout in force has now
    kv_handles_load: how many a device had at the load; a device gets at least as many where its budget has room
    """

    budgets: dict[str, int]
    footprint: int
    ledger: int
    kv_handle_bytes: int
    kv_handles_min: int
    kv_handles: dict[str, int]
    kv_handles_load: int = 0
    mailbox: int = 0

    @property
    def needs(self) -> Needs:
        """Of each device."""
        return Needs(self.ledger, self.kv_handle_bytes, self.kv_handles_min, self.mailbox)


def kv_handles_at(sizes: Sizes, memory: MemoryForecast, num_experts: Sequence[int], num_devices: int) -> int:
    """KV handles of a device when `num_experts` of each layer are spread evenly over so many: of the fullest one, with
    the smallest budget. Below 0 where the weights alone do not fit."""
    weights = sizes.common + sum(
        -(-count // num_devices) * nbytes for count, nbytes in zip(num_experts, sizes.experts, strict=True)
    )
    return _kv_beside(memory, min(memory.budgets.values()), weights)


def _kv_beside(memory: MemoryForecast, budget: int, weights: int) -> int:
    """KV handles beside `weights`: what the footprint leaves, within the budget."""
    wanted = max((memory.footprint - weights) // memory.kv_handle_bytes, memory.kv_handles_load)
    return min(wanted, memory.needs.kv_room(budget, weights))


class Instants(NamedTuple):
    """The figures of one leg. Bytes are of weights, KV, ledger and mailbox.

    start: bytes at its start, by device of the layout before
    staged: bytes while it is staged, by device of both layouts
    released: bytes after its release, by device of the new layout
    peak: the most of these, by device of both layouts
    peak_total: the most bytes of all devices together, at the start or later; later each device counts with the most
        that it has then
    kv_handles: until the release, by device of both layouts
    kv_handles_after: from the release on, by device of the new layout
    vacates: KV has to be cleared first
    """

    start: dict[str, int]
    staged: dict[str, int]
    released: dict[str, int]
    peak: dict[str, int]
    peak_total: int
    kv_handles: dict[str, int]
    kv_handles_after: dict[str, int]
    vacates: bool


class Capacity:
    """What each device holds before, during and after each leg: arithmetic over one model's sizes and one memory."""

    def __init__(self, sizes: Sizes, memory: MemoryForecast) -> None:
        self._sizes = sizes
        self._memory = memory
        self._needs = memory.needs

    def held(self, layout: Layout, kv_handles: Mapping[str, int]) -> dict[str, int]:
        """Bytes of weights, KV, ledger and mailbox by device of `layout`."""
        return self._sum(weights_on(self._sizes, layout), kv_handles)

    def instants(self, layout: Layout, steps: Sequence[Layout]) -> list[Instants]:
        """The figures of each leg; `steps` are the layouts that follow on `layout`.

        Raises DoesNotFit (`does_not_fit`) for the first device that could not keep `kv_handles_min`, or whose bytes
        would exceed its budget; NotFound (`unknown_device`) for one without a budget.
        """
        now = {seat.device: self._memory.kv_handles.get(seat.device, 0) for seat in layout.seats}
        result = []
        for number, step in enumerate(steps):
            following = steps[number + 1] if number + 1 < len(steps) else None
            instants = self._leg(layout, step, now, following)
            result.append(instants)
            layout, now = step, instants.kv_handles_after
        return result

    def _leg(self, before: Layout, layout: Layout, now: dict[str, int], following: Layout | None) -> Instants:
        old, new = weights_on(self._sizes, before), weights_on(self._sizes, layout)
        both = weights_on(self._sizes, before, layout)
        after = {device: self._kv(device, weights) for device, weights in new.items()}
        first = self._first(layout, following) if following is not None else {}
        during = {}
        for device, weights in both.items():
            if device in now:
                during[device] = max(0, min(now[device], self._kv(device, weights)))
            else:
                during[device] = after[device] = min(first.get(device, after[device]), after[device])
        during, after = level_replicas(during, before, layout), level_replicas(after, layout)
        self._needs.check("after the release", self._memory.budgets, new, after)
        self._needs.check("while both layouts are in memory", self._memory.budgets, both, during)
        start, staged, released = self._sum(old, now), self._sum(both, during), self._sum(new, after)
        ends = {device: max(nbytes, released.get(device, 0)) for device, nbytes in staged.items()}
        peak = {device: max(nbytes, start.get(device, 0)) for device, nbytes in ends.items()}
        vacates = any(during[device] < handles for device, handles in now.items())
        total = max(sum(start.values()), sum(ends.values()))
        return Instants(start, staged, released, peak, total, during, after, vacates)

    def _first(self, layout: Layout, following: Layout) -> dict[str, int]:
        """KV handles of joiners that get their experts in the following leg, beside which these fit."""
        both, handles_min = weights_on(self._sizes, layout, following), self._memory.kv_handles_min
        return {
            device: max(handles_min, min(self._kv(device, weights) // _FIRST_SHARE, self._kv(device, both[device])))
            for device, weights in weights_on(self._sizes, following).items()
        }

    def _kv(self, device: str, weights: int) -> int:
        return _kv_beside(self._memory, self._memory.budgets.get(device, 0), weights)

    def _sum(self, weights: Mapping[str, int], kv_handles: Mapping[str, int]) -> dict[str, int]:
        return {name: self._needs.total(nbytes, kv_handles.get(name, 0)) for name, nbytes in weights.items()}
