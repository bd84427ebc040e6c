"""The exchange through memory of the host: rows travel in the shared-memory bus itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elasticmoe.common.failpoint import failpoint
from elasticmoe.native.bus import Bus
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.exchange.bus import BusExchange, rows_from


class ShmExchange(BusExchange):
    """See BusExchange. Rows are received in host memory; a backend that computes elsewhere has them copied there and
    back."""

    def __init__(
        self, bus: Bus, num_experts: Sequence[int], backend: ComputeBackend, replica: Sequence[int] = ()
    ) -> None:
        super().__init__(bus, num_experts, backend, torch.device("cpu"), replica)

    def dispatch(self, layer: int, x_NH: Mirror, ids_NK: Mirror, weights_NK: Mirror, n: int, *, first: int = 0) -> int:
        """See Exchange. Raises ValueError for an id without a home."""
        routing = self._routing(layer)
        x_NH, ids_NK, weights_NK = (rows_from(mirror, first) for mirror in (x_NH, ids_NK, weights_NK))
        self._backend.download(x_NH, ids_NK, weights_NK)(n)
        num_rows = self._patiently(
            lambda wait_ms: self._bus.dispatch(
                routing,
                self._generation,
                x_NH.host.data_ptr(),
                ids_NK.host.data_ptr(),
                weights_NK.host.data_ptr(),
                n,
                self.rows_RH.data_ptr(),
                self.rows_RH.shape[0],
                self._counts_addr,
                wait_ms,
            )
        )
        self._expert_rows.count(layer, self.counts_E)
        return num_rows

    def combine(self, layer: int, y_RH: torch.Tensor, out_NH: Mirror, n: int, *, first: int = 0) -> None:
        """See Exchange."""
        out_NH = rows_from(out_NH, first)
        routing, out = self._routing(layer), out_NH.host.data_ptr()
        failpoint("rank.combine")
        self._patiently(lambda wait_ms: self._bus.combine(routing, self._generation, y_RH.data_ptr(), out, n, wait_ms))
        self._num_left -= 1
        self._backend.upload(out_NH)(n)
