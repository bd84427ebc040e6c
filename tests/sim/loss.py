"""Devices whose memory is gone, and the operator who says so: an order, again and again until the journal has it.

What the journal has must not be forgotten by any scaler: it is not said twice unless the store has lost it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from elasticmoe.services.scaler.control.losses import lost_devices
from elasticmoe.services.scaler.planning.plan import Target

if TYPE_CHECKING:
    from tests.sim.world import World

LOOK_S = 0.4


class Losses:
    """`gone`: devices without memory; no rank lives there. `told[device]`: the store's losses when its journal was seen
    to know. A device that has left the layout untold is repaired, and so is one that an order names."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = random.Random(f"losses of {world.sim.seed}")  # what else happens in a seed stays as it was
        self.patience_s = self._rng.choice((0.3, 2.0, 15.0))  # of the operator's client
        self.gone: set[str] = set()
        self.told: dict[str, int] = {}
        self.num_lost = self._num_orders = 0
        self._said_at = -100.0

    def draw(self, span_s: float) -> None:
        """Maybe one or two in this seed."""
        if self._rng.random() < 0.3:
            for _ in range(self._rng.choice((1, 1, 2))):
                at = self._world.sim.now + span_s * self._rng.random()
                self._world.sim.push(at, None, 0, self._lose, ())

    def _lose(self) -> None:
        world, hmm = self._world, self._world.hmm
        assert hmm.loaded is not None
        seats = hmm.loaded.layout.seats
        healthy = sorted({seat.device for seat in seats} - self.gone)
        replicas = {seat.rank.replica for seat in seats}
        if len(replicas - {seat.rank.replica for seat in seats if seat.device in self.gone}) < 2 or world.is_healed:
            return
        device = self._rng.choice(healthy)
        world.sim.note(f"device {device} is lost")
        self.gone.add(device)
        self.num_lost += 1
        real = hmm.memories[device].real
        real.values[:] = real.poison
        for rank in [rank for rank in world.ranks.values() if rank.seat.device == device]:
            rank.exit("its device is lost")
        if self.num_lost == 1:
            world.sim.push(world.sim.now + self._rng.uniform(0.05, 3.0), None, 0, self._look, ())

    def _look(self) -> None:
        """What the operator does."""
        world, hmm = self._world, self._world.hmm
        assert hmm.loaded is not None
        replicas = {seat.device: seat.rank.replica for seat in hmm.loaded.layout.seats}
        self._note_journal()
        for device in sorted(self.gone - set(replicas)):
            if device not in self.told:
                self.repair(device)
        untold = [device for device in self.gone if device in replicas and device not in self.told]
        if untold and world.sim.now - self._said_at > self.patience_s:
            self._said_at = world.sim.now
            self._num_orders += 1
            remove = tuple(sorted(replicas[device] for device in self.gone if device in replicas))
            world.orders.append((f"lost{self._num_orders}", Target(remove=remove, is_lost=True)))
        world.sim.push(world.sim.now + LOOK_S, None, 0, self._look, ())

    def _note_journal(self) -> None:
        store = self._world.store
        known = lost_devices(store.data.get("operation"), store.data.get("ended", []))
        for device, num_losses in list(self.told.items()):
            if num_losses != store.num_losses:
                del self.told[device]
            else:
                self._world.expect(device in known, f"the journal has forgotten that {device} is lost")
        for device in sorted((self.gone & known) - set(self.told)):
            self._world.sim.note(f"the journal knows that {device} is lost")
            self.told[device] = store.num_losses

    def repair(self, device: str) -> None:
        """It is another device from now on, under the same name."""
        self._world.sim.note(f"device {device} is repaired")
        self.gone.discard(device)
        self.told.pop(device, None)
        self._world.hmm.memories[device].real.format()

    def admits(self, target: Target) -> bool:
        """Whether an operator would give this order: not where it names a device that is gone and still has a seat.
        Others that are gone and that it names are repaired before."""
        layout = self._world.hmm.loaded and self._world.hmm.loaded.layout
        named = self.gone & set(target.devices or ())
        if layout and any(seat.device in named for seat in layout.seats):
            return False
        for device in sorted(named):
            self.repair(device)
        return True

    def check_start(self, device: str) -> None:
        """A scaler that acts starts a rank there."""
        is_known = self.told.get(device) == self._world.store.num_losses
        self._world.expect(not is_known, f"a rank is started on {device}, which is lost")

    def unrest(self) -> str:
        """Says which lost device still has a seat; empty when none has."""
        hmm = self._world.hmm
        assert hmm.loaded is not None
        left = self.gone & {seat.device for seat in hmm.loaded.layout.seats}
        return f"{min(left)} is lost and has a seat" if left else ""
