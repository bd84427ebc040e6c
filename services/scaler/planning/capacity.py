"""What each device holds before, during and after a leg, its KV handles, and whether that fits. Pure; all in bytes.

KV takes what the footprint leaves beside weights, at least what a device had at the load, and never more than the
budget leaves. During a leg a device holds the weights of both layouts, and no more KV than before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import DoesNotFit, NotFound
from elasticmoe.common.protocol.hmm import RecordCopy
from elasticmoe.common.wording import size
from elasticmoe.services.scaler.planning.plan import MemoryForecast, Sizes

_WAY_OUT = "more replicas leave each device fewer experts; a start with more --device-memory has larger budgets"
_FIRST_SHARE = 8  # a joiner that gets its experts in the next leg starts with this part of its final KV


class Instants(NamedTuple):
    """One leg by device: bytes at its start, while it is staged, after its release; the most of these (`peak`, and
    `peak_total` summed over devices); KV handles until and from the release. `vacates`: KV has to be cleared first."""

    start: dict[str, int]
    staged: dict[str, int]
    released: dict[str, int]
    peak: dict[str, int]
    peak_total: int
    kv_handles: dict[str, int]
    kv_handles_after: dict[str, int]
    vacates: bool


class _Weights(NamedTuple):
    """Weights of a leg by device: of the layout before, of both together, of the layout after."""

    before: dict[str, int]
    both: dict[str, int]
    after: dict[str, int]


def weights_on(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """Bytes of weights by device of `layout`."""
    by_slot = {seat.slot: sizes.common for seat in layout.seats}
    for experts, nbytes in zip(layout.homes, sizes.experts, strict=True):
        for homes in experts:
            for slot in homes:
                by_slot[slot] += nbytes
    return {seat.device: by_slot[seat.slot] for seat in layout.seats}


class Capacity:
    """Arithmetic over one model's sizes and one host's memory."""

    def __init__(self, sizes: Sizes, memory: MemoryForecast) -> None:
        self._sizes = sizes
        self._memory = memory

    def held(self, layout: Layout, kv_handles: Mapping[str, int]) -> dict[str, int]:
        """Bytes of weights, KV and ledger by device of `layout`."""
        return self._sum(weights_on(layout, self._sizes), kv_handles)

    def instants(self, layout: Layout, steps: Sequence[tuple[Layout, Sequence[RecordCopy]]]) -> list[Instants]:
        """The figures of each leg; `steps` are the layouts that follow on `layout`, with the copies to each.

        Raises DoesNotFit (`does_not_fit`) for the first device that could not keep `kv_handles_min`, or whose bytes
        would exceed its budget; NotFound (`unknown_device`) for one without a budget.
        """
        now = {seat.device: self._memory.kv_handles.get(seat.device, 0) for seat in layout.seats}
        weights = self._weights(layout, steps)
        result = []
        for number, leg in enumerate(weights):
            following = weights[number + 1] if number + 1 < len(weights) else None
            instants = self._leg(leg, now, following)
            result.append(instants)
            now = instants.kv_handles_after
        return result

    def _weights(self, layout: Layout, steps: Sequence[tuple[Layout, Sequence[RecordCopy]]]) -> list[_Weights]:
        result = []
        before = weights_on(layout, self._sizes)
        for step, copies in steps:
            after = weights_on(step, self._sizes)
            both = dict(before)
            for copy in copies:
                both[copy.target] = both.get(copy.target, 0) + self._sizes.of(copy.key)
            result.append(_Weights(before, both, after))
            before = after
        return result

    def _leg(self, leg: _Weights, now: dict[str, int], following: _Weights | None) -> Instants:
        after = {device: self._fit(device, weights, "after the release") for device, weights in leg.after.items()}
        during = {}
        for device, weights in leg.both.items():
            if device not in leg.after:
                during[device] = max(0, min(now[device], self._room(device, weights)))
            elif device in now:
                during[device] = min(now[device], self._fit(device, weights, "while both layouts are in memory"))
            else:
                if following is not None:
                    after[device] = self._first(device, after[device], following)
                during[device] = after[device]
        start, staged = self._sum(leg.before, now), self._sum(leg.both, during)
        released = self._sum(leg.after, after)
        ends = {device: max(nbytes, released.get(device, 0)) for device, nbytes in staged.items()}
        peak = {device: max(nbytes, start.get(device, 0)) for device, nbytes in ends.items()}
        for device, nbytes in peak.items():
            if nbytes > self._budget(device):
                budget = self._budget(device)
                excess = f"{size(nbytes)} would exceed the budget of {size(budget)} by {size(nbytes - budget)}"
                raise DoesNotFit(f"{device}: {excess}; {_WAY_OUT}")
        vacates = any(during[device] < handles for device, handles in now.items())
        total = max(sum(start.values()), sum(ends.values()))
        return Instants(start, staged, released, peak, total, during, after, vacates)

    def _first(self, device: str, most: int, following: _Weights) -> int:
        """KV handles of a joiner that gets its experts in the following leg."""
        final = self._fit(device, following.after[device], "with its experts")
        fits = self._fit(device, following.both[device], "while its experts arrive")
        return min(max(self._memory.kv_handles_min, final // _FIRST_SHARE), fits, most)

    def _fit(self, device: str, weights: int, when: str) -> int:
        """KV handles beside `weights`. Raises DoesNotFit below the fewest that a rank can work with."""
        handles = self._room(device, weights)
        memory = self._memory
        if handles < memory.kv_handles_min:
            raise DoesNotFit(
                f"{device} {when}: of the budget of {size(self._budget(device))}, weights take {size(weights)} and the "
                f"ledger {size(memory.ledger)}; {max(0, handles)} KV handles of {size(memory.kv_handle_bytes)} are "
                f"left, and one sequence of full length needs {memory.kv_handles_min}; {_WAY_OUT}"
            )
        return handles

    def _room(self, device: str, weights: int) -> int:
        memory = self._memory
        wanted = max((memory.footprint - weights) // memory.kv_handle_bytes, memory.kv_handles_load)
        return min(wanted, (self._budget(device) - memory.ledger - weights) // memory.kv_handle_bytes)

    def _budget(self, device: str) -> int:
        budget = self._memory.budgets.get(device)
        if budget is None:
            raise NotFound(f"{device} is not one of the {len(self._memory.budgets)} devices", code="unknown_device")
        return budget

    def _sum(self, weights: Mapping[str, int], kv_handles: Mapping[str, int]) -> dict[str, int]:
        memory = self._memory
        return {
            device: nbytes + memory.ledger + kv_handles.get(device, 0) * memory.kv_handle_bytes
            for device, nbytes in weights.items()
        }
