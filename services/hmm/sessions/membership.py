"""Who takes part in the lockstep: the HMM's writes to the bus, and what it reads there."""

from __future__ import annotations

from elasticmoe.common.layout import Layout
from elasticmoe.common.telemetry import Logger
from elasticmoe.native.bus import Bus
from elasticmoe.services.hmm.memory.holdings import Holdings


class Membership:
    """The bus's membership. The HMM is its only writer but for `flip`, by which a rank makes a staged one current; so
    every write here may find that it has been overtaken, and looks again. Belongs to the service's loop."""

    def __init__(self, holdings: Holdings, log: Logger) -> None:
        self._holdings = holdings
        self._log = log

    @property
    def _bus(self) -> Bus | None:
        segment = self._holdings.segment
        return segment.bus if segment is not None and self._holdings.loaded is not None else None

    @property
    def max_ranks(self) -> int:
        """Slots of the bus."""
        return self._bus.max_ranks if self._bus is not None else 0

    def current(self) -> tuple[int, int, bool, int]:
        """(generation, mask of members, running, epoch); zeros without a model."""
        return self._bus.membership() if self._bus is not None else (0, 0, False, 0)

    def progress(self, slot: int) -> int:
        """How often the rank of `slot` has counted up its progress; 0 without a model."""
        return self._bus.progress(slot) if self._bus is not None else 0

    def is_waiting_for_device(self, slot: int) -> bool:
        """Whether the rank of `slot` says so; not without a model."""
        return self._bus is not None and self._bus.is_waiting_for_device(slot)

    def publish(self, slots: tuple[int, ...], is_running: bool) -> None:
        """Make `slots` the members, by the layout in force, and wake everybody. A staged membership is void then."""
        while not self._try(sum(1 << slot for slot in set(slots)), is_running):
            pass  # a rank flipped in between

    def park(self, slot: int) -> None:
        """Stop the running generation if `slot` takes part in it, or would in the one that is staged."""
        bus = self._bus
        while bus is not None:
            _, staged, _ = bus.staged()  # first: what is flipped to in between is seen as a member below
            _, members, is_running, _ = bus.membership()
            if not is_running or not (members | staged) >> slot & 1 or self._try(members, False):
                return

    def _try(self, members: int, is_running: bool) -> bool:
        bus, loaded = self._bus, self._holdings.loaded
        assert bus is not None, "a loaded model's bus is open"
        assert loaded is not None, "who publishes has looked"
        # Above the staged one too, so that nobody can take this one for that.
        generation = max(bus.membership()[0], bus.staged()[0]) + 1
        try:
            bus.set_membership(generation, members, is_running, loaded.layout.epoch)
        except ValueError:
            return False
        self._holdings.ring()
        self._log.info(
            "membership",
            generation=generation,
            members=slots_of_mask(members),
            running=is_running,
            layout_epoch=loaded.layout.epoch,
        )
        return True

    def stage(self, layout: Layout) -> None:
        """Let the running ranks flip to `layout`, unless they have, or may already. Where nobody runs there is nothing
        to flip: the next `publish` brings the layout up."""
        bus = self._bus
        if bus is None:
            return
        if bus.staged()[0]:
            return
        generation, _, is_running, epoch = bus.membership()
        if not is_running or epoch == layout.epoch:
            return
        members = sum(1 << slot for slot in layout.slots)
        bus.stage_membership(generation + 1, members, layout.epoch)
        self._holdings.ring()
        self._log.info("membership staged", generation=generation + 1, members=layout.slots, layout_epoch=layout.epoch)

    def has_flipped(self, layout: Layout) -> bool:
        """Whether everything that computes does it by `layout`."""
        return self.current()[3] == layout.epoch


def slots_of_mask(mask: int) -> tuple[int, ...]:
    """The slots of a bit mask."""
    return tuple(slot for slot in range(mask.bit_length()) if mask >> slot & 1)
