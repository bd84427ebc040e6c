"""The exchange by torch.distributed: comparison and fallback, where memory of devices cannot be shared.

Rows travel in collectives of a group for each generation (groups.py): gloo between CPUs, nccl and hccl on their
devices. Ids, counts and arrivals stay on the bus, which knows who lives: while a collective is under way, the rank
looks whether the generation is over, as when a peer has died, and gives the group up then. No wait is without a
deadline.

The rows, and what a group's library has on the device, are working memory as activations are: no budget has them
(common/capacity.py), as the HMM hands out none of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import torch

from elasticmoe.native.bus import Bus
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.exchange.base import StepAborted, StepTimedOut
from elasticmoe.services.worker.exchange.bus import WAIT_MS
from elasticmoe.services.worker.exchange.groups import Groups
from elasticmoe.services.worker.exchange.planned import PlannedExchange

LOOK_S: Final = 50e-6  # between two looks at what is waited for

T = TypeVar("T")


class TorchDistExchange(PlannedExchange):
    """See PlannedExchange. `groups` is the exchange's."""

    def __init__(
        self,
        bus: Bus,
        num_experts: Sequence[int],
        backend: ComputeBackend,
        groups: Groups,
        replica: Sequence[int] = (),
    ) -> None:
        super().__init__(bus, num_experts, backend, replica)
        self._groups = groups
        self._members: list[int] = []
        self._own_PH = self._rows(bus.max_tokens * bus.top_k)
        self._owners: list[torch.Tensor] = []
        self._num_sent: list[int] = []  # own rows that each member answers
        self._until = 0.0  # when the present call is to end at the latest

    def prepare(self, generation: int) -> bool:
        """See Exchange."""
        staged, members, _ = self._bus.staged()
        if staged != generation:
            return False
        slots = _slots(members)
        return self._bus.slot not in slots or self._groups.prepare(generation, slots)

    def set_routing(self, generation: int, owners: Sequence[Sequence[int]]) -> None:
        """See Exchange. Where nobody could prepare the group, as after a death, the next step waits for it."""
        super().set_routing(generation, owners)
        self._owners = [torch.tensor(slots, dtype=torch.int64) for slots in owners]
        current, members, _, _ = self._bus.membership()
        self._members = _slots(members) if current == generation else []
        if self._bus.slot in self._members:
            self._groups.prepare(generation, self._members)
        self._groups.keep(generation)

    def close(self) -> None:
        """See Exchange."""
        self._groups.close()

    def dispatch(self, layer: int, x_NH: Mirror, ids_NK: Mirror, weights_NK: Mirror, n: int, *, first: int = 0) -> int:
        """See PlannedExchange."""
        self._until = time.monotonic() + self._deadline_ms / 1e3
        return super().dispatch(layer, x_NH, ids_NK, weights_NK, n, first=first)

    def combine(self, layer: int, y_RH: torch.Tensor, out_NH: Mirror, n: int, *, first: int = 0) -> None:
        """See PlannedExchange."""
        self._until = time.monotonic() + self._deadline_ms / 1e3
        super().combine(layer, y_RH, out_NH, n, first=first)

    def _announce(self, x_NH: Mirror, ids_NK: Mirror, n: int) -> None:
        """See PlannedExchange. The rows are sent when all have met."""
        del x_NH
        self._backend.download(ids_NK)(n)

    def _fetch(self, layer: int, x_NH: Mirror, n: int) -> None:
        """See PlannedExchange. Each member that has a row to compute gets all tokens."""
        assert self._chosen is not None
        ids_P = self._chosen[0].host[:n].reshape(-1).long()
        by_slot = torch.bincount(self._owners[layer][ids_P[ids_P >= 0]], minlength=self._bus.max_ranks).tolist()
        self._num_sent = [by_slot[share.slot] for share in self._shares]
        sizes = [n if count else 0 for count in self._num_sent]
        sent_TH = x_NH.device[:n].repeat(sum(count > 0 for count in self._num_sent), 1)
        wanted = [share.num_tokens if share.num_rows else 0 for share in self._shares]
        came_TH = self._rows(sum(wanted))
        self._exchange(came_TH, sent_TH, wanted, sizes)
        at = come = 0
        for share, count in zip(self._shares, wanted, strict=True):
            self._tokens_TH[at : at + count].copy_(came_TH[come : come + count])
            at, come = at + share.num_tokens, come + count

    def _answer(self, answers_RH: torch.Tensor, n: int) -> None:
        """See PlannedExchange. Answers of one owner lie together, by its slot, as its answers come."""
        del n
        self._exchange(
            self._own_PH[: sum(self._num_sent)], answers_RH, self._num_sent, [share.num_rows for share in self._shares]
        )

    @property
    def _returned_PH(self) -> torch.Tensor:
        """See PlannedExchange."""
        return self._own_PH

    def _exchange(self, came: torch.Tensor, sent: torch.Tensor, came_sizes: list[int], sent_sizes: list[int]) -> None:
        """One collective of all members; blocks until it is done. Raises StepAborted, StepTimedOut."""
        if len(self._shares) == 1:
            came.copy_(sent)
            return
        group = self._wait(lambda: self._groups.get(self._generation))
        is_done = False
        try:
            group.start(came, sent, came_sizes, sent_sizes, self._until - time.monotonic())
            self._wait(lambda: group.is_done() or None)
            group.finish()
            is_done = True
        except RuntimeError as error:
            self._give_up(str(error))
        finally:
            if not is_done:  # what a peer sends late is still written where it was to come
                self._own_PH = torch.empty_like(self._own_PH)

    def _wait(self, look: Callable[[], T | None]) -> T:
        """What `look` gives at last. Others see meanwhile that this rank lives."""
        told_at = 0.0
        while True:
            try:
                found = look()
            except (RuntimeError, TimeoutError) as error:  # a group that could not be made
                self._give_up(str(error))
                raise
            if found is not None:
                return found
            now = time.monotonic()
            if now - told_at > WAIT_MS / 1e3:
                self._bus.bump_progress()
                self._hear()
                told_at = now
            self._look_around(now, "the other ranks do not answer")
            time.sleep(LOOK_S)

    def _look_around(self, now: float, text: str) -> None:
        generation, _, is_running, _ = self._bus.membership()
        if generation != self._generation or not is_running:
            raise StepAborted(generation)
        if now > self._until:
            raise StepTimedOut(f"{text} in generation {self._generation}")

    def _give_up(self, text: str) -> None:
        """The group failed, as it does when a peer dies: wait for the bus to say so, and raise StepAborted, or
        StepTimedOut."""
        while True:
            self._look_around(time.monotonic(), text)
            self._bus.bump_progress()
            self._hear()
            time.sleep(0.01)


def _slots(members: int) -> list[int]:
    return [slot for slot in range(members.bit_length()) if members >> slot & 1]
