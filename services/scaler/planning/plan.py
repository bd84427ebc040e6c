"""What the planner takes and gives beside sizes and memory: the target, and the plan with its legs. Pure data."""

from __future__ import annotations

from typing import Literal

import msgspec

from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.protocol.hmm import RecordCopy


class Target(msgspec.Struct, frozen=True):
    """Where to: exactly one of the three is set. `replicas`: how many; `devices`: exactly these devices afterwards;
    `remove`: replica numbers that have to leave. `is_lost`: what their devices hold cannot be read any more."""

    replicas: int | None = None
    devices: tuple[str, ...] | None = None
    remove: tuple[int, ...] | None = None
    is_lost: bool = False


class Rates(msgspec.Struct, frozen=True):
    """What predictions are made from.

    link_bytes_per_s: of one device's link, each way
    copy_bytes_per_s: limit of all copies of a leg together, 0 for none; not where replicas join or lost devices are
        left out
    handle_s: seconds to create, export and map one page handle
    warm_up_s: seconds from a standby's attach to its first step
    step_s: seconds of one step of the engine
    """

    link_bytes_per_s: float = 4e9
    copy_bytes_per_s: float = 0.0
    handle_s: float = 20e-6
    warm_up_s: float = 0.2
    step_s: float = 0.03


class Leg(msgspec.Struct, frozen=True):
    """One change of the layout, from the epoch before to `layout.epoch`.

    layout: the one that it leads to
    joining: seats of `layout` that the layout before does not have; `leaving`: the reverse
    copies: every weight record that has to come to a device, with the device that it is read from, or none where only
        the checkpoint has it
    kv_handles: by device of both layouts, from the preparation to the release
    kv_handles_after: by device of `layout`, from the release on
    bytes_copied: bytes of all copies together
    peak_bytes: by device of both layouts, the most bytes of weights, KV, ledger and mailbox at any instant of the leg
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

    kind: `scale_up` where more replicas join than leave, `scale_down` where fewer do, `replace` where as many do or all
        devices are others afterwards, `none` where none do
    before: the layout that it starts from
    legs: in order
    experts_moved: expert records copied; `bytes_copied`: bytes of all copies
    peak_bytes: of weights, KV, ledgers and mailboxes, summed over all devices at the worst instant
    bytes_before, bytes_after: the same sum before the first leg and after the last release
    seconds: from the command to the last release, predicted by Rates
    pause_ms: longest gap in a stream in milliseconds, predicted by Rates
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
