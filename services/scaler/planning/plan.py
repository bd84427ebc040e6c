"""What the planner takes and gives: sizes, what bounds a plan, the target, and the plan with its legs. Pure data."""

from __future__ import annotations

from typing import Literal

import msgspec

from elasticmoe.common.families import record
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.model_spec import ModelSpec, RecordKey, round_up
from elasticmoe.common.protocol.hmm import RecordCopy


class Sizes(msgspec.Struct, frozen=True):
    """Bytes of a model's records, rounded up to the granularity: the base record, each layer's record, one expert of
    each layer (0: a dense layer)."""

    base: int
    layers: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def common(self) -> int:
        """Bytes that every device holds: the base record and all layer records."""
        return self.base + sum(self.layers)

    def of(self, key: RecordKey) -> int:
        """Bytes of the record called `key`."""
        if key.kind == "expert":
            return self.experts[key.layer]
        return self.layers[key.layer] if key.kind == "layer" else self.base


def sizes_of(spec: ModelSpec, granularity: int) -> Sizes:
    """The sizes of the records of `spec`, as the HMM makes page handles of them."""

    def nbytes(key: RecordKey) -> int:
        return round_up(record(spec, key).nbytes, granularity)

    return Sizes(
        base=nbytes(RecordKey("base")),
        layers=tuple(nbytes(RecordKey("layer", layer)) for layer in range(spec.num_layers)),
        experts=tuple(
            nbytes(RecordKey("expert", layer, 0)) if count else 0
            for layer, count in enumerate(spec.num_experts_by_layer)
        ),
    )


class MemoryForecast(msgspec.Struct, frozen=True):
    """What bounds a plan, in bytes: each device's budget, the footprint (bytes of weights and KV of one device, which
    KV fills up as weights leave), the ledger of one rank, and KV handles: their size, the fewest that a rank can work
    with, how many each device of the layout in force has now, and how many a device had at the load."""

    budgets: dict[str, int]
    footprint: int
    ledger: int
    kv_handle_bytes: int
    kv_handles_min: int
    kv_handles: dict[str, int]
    kv_handles_load: int = 0


class Target(msgspec.Struct, frozen=True):
    """Where to: exactly one of the three is set. `replicas`: how many; `devices`: exactly these devices afterwards;
    `remove`: replica numbers that have to leave. `is_lost`: what their devices hold cannot be read any more."""

    replicas: int | None = None
    devices: tuple[str, ...] | None = None
    remove: tuple[int, ...] | None = None
    is_lost: bool = False


class Rates(msgspec.Struct, frozen=True):
    """What predictions are made from. `link_bytes_per_s`: of one device's link, each way; `copy_bytes_per_s`: limit of
    all copies of a leg together, but where replicas join or lost devices are left out, 0 for none; `handle_s`: seconds
    to create, export and map one page handle; `warm_up_s`: from a standby's attach to its first step; `step_s`: one
    step of the engine."""

    link_bytes_per_s: float = 4e9
    copy_bytes_per_s: float = 0.0
    handle_s: float = 20e-6
    warm_up_s: float = 0.2
    step_s: float = 0.03


class Leg(msgspec.Struct, frozen=True):
    """One change of the layout, from the epoch before to `layout.epoch`.

    `copies`: every weight record that has to come to a device, with the device that it is read from, or none where only
    the checkpoint has it; together they are `bytes_copied`. `kv_handles`: by device of both layouts, from the
    preparation to the release; `kv_handles_after`: by device of `layout`, from the release on. `peak_bytes`: by device
    of both layouts, the most bytes of weights, KV and ledger at any instant of the leg.
    """

    layout: Layout
    joining: tuple[Seat, ...]
    leaving: tuple[Seat, ...]
    copies: tuple[RecordCopy, ...]
    kv_handles: dict[str, int]
    kv_handles_after: dict[str, int]
    bytes_copied: int
    peak_bytes: dict[str, int]


class Plan(msgspec.Struct, frozen=True):
    """A whole operation: its legs in order (none when there is nothing to do), with what they cost.

    `experts_moved`: expert records copied. `peak_bytes`: of weights, KV and ledgers, summed over all devices at the
    worst instant; `bytes_before` and `bytes_after`: the same sum before the first leg and after the last release.
    `seconds` (from the command to the last release) and `pause_ms` (longest gap in a stream) are predictions by Rates.
    """

    kind: Literal["scale_up", "scale_down", "replace", "none"]
    before: Layout
    legs: tuple[Leg, ...]
    experts_moved: int
    bytes_copied: int
    peak_bytes: int
    bytes_before: int
    bytes_after: int
    seconds: float
    pause_ms: float

    @property
    def after(self) -> Layout:
        """The layout that the operation ends with."""
        return self.legs[-1].layout if self.legs else self.before
