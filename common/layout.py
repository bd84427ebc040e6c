"""Which rank sits on which device, and where each expert lives. Pure; the invariants are checked here.

A *layout* is immutable and numbered by its epoch. A *seat* is one rank's place: its device and its slot on the bus.
A slot stays with its device for as long as the device is part of the deployment, so that routing tables, mailboxes and
shared-memory rows can be addressed by it across epochs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec

from elasticmoe.common.described import says
from elasticmoe.common.devices.names import LOCAL_HOST, DeviceCount, DeviceId, DeviceName, HostId
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.protocol.limits import EXPERTS_MAX, LAYERS_MAX, RANKS_MAX
from elasticmoe.common.wording import counted


class RankId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """(replica, tp index): replica = one copy of attention; tp index = the share of it that this rank computes."""

    replica: int
    tp: int

    def __str__(self) -> str:
        return f"r{self.replica}t{self.tp}"


class Seat(msgspec.Struct, frozen=True):
    """One rank's place."""

    rank: Annotated[RankId, says("[replica, number in the replica]")]
    slot: Annotated[int, says("Its place on the bus")]
    device: Annotated[DeviceName, says("The device whose memory it computes on", "host:0")]

    @property
    def host(self) -> HostId:
        """That the device is in."""
        return DeviceId.parse(self.device).host


Compute = Literal["host", "torch", "triton", "torch_npu"]
"""Names of the compute backends (services/worker/backends)."""

COMPUTES: Final[dict[str, tuple[Compute, ...]]] = {
    "host": ("host", "torch"),
    "npu": ("torch", "torch_npu"),
    "cuda": ("torch", "triton"),
}
"""What computes on devices, by the backend that these are of; the first is what `auto` means there."""

Activations = Literal["float32", "bfloat16"]
"""What bfloat16 weights are multiplied by: numbers as they are, or rounded to bfloat16, too."""

_ROUNDING: Final[frozenset[Compute]] = frozenset({"host", "torch"})


def check_activations(compute: Compute, activations: Activations) -> None:
    """Raises ConfigError no_compute where they are to be rounded and `compute` does not follow that."""
    if activations != "float32" and compute not in _ROUNDING:
        text = f"--compute {compute} does not follow --activations {activations}: leave it at float32"
        raise ConfigError(text, code="no_compute")


ExchangeKind = Literal["shm", "mailbox", "torch_dist"]
"""Names of the exchanges between ranks (services/worker/exchange)."""


class Served(msgspec.Struct, frozen=True):
    """What a layout is of: the checkpoint's folder, the dtype of its weights, the backend that computes it, and its
    activations: KV that one has written is not, bit by bit, what another would have."""

    model: str
    dtype: str
    compute: Compute = "host"
    activations: Activations = "float32"


class Layout(msgspec.Struct, frozen=True):
    """One epoch's placement.

    `homes[layer][expert]` are the slots whose devices hold that expert, in ascending order; the first is the one that
    serves it unless a routing table says otherwise. A layer without experts has an empty tuple.
    """

    epoch: int
    tp: int
    seats: tuple[Seat, ...]
    homes: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def dp(self) -> int:
        """Number of replicas."""
        return len(self.seats) // self.tp

    @property
    def slots(self) -> tuple[int, ...]:
        """All slots in use, ascending."""
        return tuple(sorted(seat.slot for seat in self.seats))

    def seat_on(self, device: str) -> Seat | None:
        """The seat on `device`, or None when the layout does not use it."""
        return next((seat for seat in self.seats if seat.device == device), None)

    def seat_in(self, slot: int) -> Seat:
        """The seat in `slot`. Raises KeyError where the layout does not use it."""
        for seat in self.seats:
            if seat.slot == slot:
                return seat
        raise KeyError(slot)

    def replica_of(self, seat: Seat) -> tuple[int, ...]:
        """Slots of the ranks of its replica, by their tp index."""
        seats = (each for each in self.seats if each.rank.replica == seat.rank.replica)
        return tuple(each.slot for each in sorted(seats, key=lambda each: each.rank))

    def experts_on(self, slot: int, layer: int) -> tuple[int, ...]:
        """Experts of `layer` that live on `slot`'s device, ascending."""
        return tuple(expert for expert, slots in enumerate(self.homes[layer]) if slot in slots)

    def num_experts_on(self, slot: int) -> int:
        """Expert records on `slot`'s device over all layers."""
        return sum(len(self.experts_on(slot, layer)) for layer in range(len(self.homes)))

    def num_experts(self) -> Counter[int]:
        """By slot, expert records on its device over all layers; of all slots in one pass."""
        homes = itertools.chain.from_iterable(self.homes)
        return Counter(itertools.chain.from_iterable(homes))

    def owners(self, layer: int) -> tuple[int, ...]:
        """Routing table of `layer`: for each expert the slot that computes it."""
        return tuple(slots[0] for slots in self.homes[layer])

    def check(self, slots_max: int = RANKS_MAX) -> None:
        """Verify the invariants. `slots_max`: slots of the bus; a simulation may have more than a real one.

        Raises ValueError naming the first that is broken (a programming error).
        """
        slots = [seat.slot for seat in self.seats]
        if self.epoch < 1 or self.tp < 1 or not self.seats:
            raise ValueError(f"layout needs epoch >= 1, tp >= 1 and a seat; has {self.epoch}, {self.tp}, {len(slots)}")
        if len(set(slots)) != len(slots) or not all(0 <= slot < slots_max for slot in slots):
            raise ValueError(f"slots {slots} are not unique numbers below {slots_max}")
        if len(slots) % self.tp:
            raise ValueError(f"{len(slots)} seats make no whole replicas of tp={self.tp}")
        if len(self.homes) > LAYERS_MAX or any(len(experts) > EXPERTS_MAX for experts in self.homes):
            raise ValueError(f"homes exceed the limits of {LAYERS_MAX} layers or {EXPERTS_MAX} experts")
        if len({seat.device for seat in self.seats}) != len(self.seats):
            raise ValueError("two seats share a device")
        ranks = sorted(seat.rank for seat in self.seats)
        replicas = sorted({rank.replica for rank in ranks})
        if ranks != [RankId(replica, tp) for replica in replicas for tp in range(self.tp)]:
            raise ValueError(f"ranks {[str(rank) for rank in ranks]} are not whole replicas of tp={self.tp}")
        known = set(slots)
        for layer, experts in enumerate(self.homes):
            for expert, homes in enumerate(experts):
                if not homes or list(homes) != sorted(set(homes)) or not known.issuperset(homes):
                    raise ValueError(f"expert {expert} of layer {layer} has homes {homes}, not a sorted set of {slots}")


def lacking(layout: Layout, devices: DeviceCount) -> str:
    """Why a deployment of one host with `devices` does not do for the layout, and which devices would, by the setting's
    name; empty where it does."""
    used = [DeviceId.parse(seat.device) for seat in layout.seats]
    foreign = [device for device in used if (device.host, device.backend) != (LOCAL_HOST, devices.backend)]
    if foreign:
        return f"its replicas use {foreign[0]}, and this deployment has only this machine's {devices}"
    if {seat.device for seat in layout.seats} <= set(devices.names()):
        return ""
    needed = DeviceCount.with_all(used)
    where = f"the first {counted(needed.count, 'device')}" if not needed.numbers else str(needed)
    asked = f"--devices (ELASTICMOE_DEVICES) has to be {needed} or more"
    return f"its replicas lie on {where}, so {asked}; it is {devices} now"


def keys_on(layout: Layout, slot: int) -> Iterator[RecordKey]:
    """The records that belong on the device of `slot`: base and all layers, of its rank's tp index, and the experts
    that live there."""
    shard = layout.seat_in(slot).rank.tp
    yield RecordKey("base", shard=shard)
    for layer in range(len(layout.homes)):
        yield RecordKey("layer", layer, shard=shard)
    for layer in range(len(layout.homes)):
        for expert in layout.experts_on(slot, layer):
            yield RecordKey("expert", layer, expert)


def initial_layout(
    num_experts: Sequence[int], devices: Sequence[str], *, tp: int = 1, epoch: int = 1, slots_max: int = RANKS_MAX
) -> Layout:
    """Place a model on fresh devices: one seat per device, experts spread within one of each other.

    `num_experts[layer]` is that layer's number of experts (0: dense). The remainder of an uneven division rotates with
    the layer, so that no device carries it in every layer. Raises ConfigError when the devices make no whole replicas
    or are more than `slots_max`.
    """
    if not devices or len(devices) % tp:
        raise ConfigError(f"{counted(len(devices), 'device')}: no whole replicas of tp={tp}")
    if len(devices) > slots_max:
        raise ConfigError(f"{len(devices)} devices exceed the limit of {slots_max} ranks")
    seats = tuple(Seat(RankId(i // tp, i % tp), i, device) for i, device in enumerate(devices))
    size = len(devices)
    homes = tuple(
        tuple((((expert * size) // count + layer) % size,) for expert in range(count))
        for layer, count in enumerate(num_experts)
    )
    layout = Layout(epoch, tp, seats, homes)
    layout.check(slots_max)
    return layout


def level_replicas(kv_handles: Mapping[str, int], *layouts: Layout) -> dict[str, int]:
    """KV handles by device, where all ranks of a replica have as many as the one that has least: a sequence's block has
    the same number on each. A device is in the same replica in all `layouts` that use it."""
    if layouts[0].tp == 1:
        return dict(kv_handles)
    replicas = {seat.device: seat.rank.replica for layout in layouts for seat in layout.seats}
    least: dict[int, int] = {}
    for device, count in kv_handles.items():
        least[replicas[device]] = min(least.get(replicas[device], count), count)
    return {device: least[replicas[device]] for device in kv_handles}
