"""An exchange without other ranks, for warming up: each held expert gets a row, whatever the tokens chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elasticmoe.services.worker.backends.base import Mirror
from elasticmoe.services.worker.exchange.base import Exchange, ExchangeTimes


class Alone(Exchange):
    """`held[layer]`: the experts that are mapped; `num_experts`: the most that a layer has; `device`: where the rows of
    the exchange lie that it stands for. Combines to zeros."""

    def __init__(self, held: Sequence[Sequence[int]], num_experts: int, hidden: int, device: torch.device) -> None:
        self._held = held
        num_rows = max((len(experts) for experts in held), default=0)
        self.rows_RH = torch.zeros((num_rows, hidden), dtype=torch.float32, device=device)
        self.counts_E = torch.zeros(num_experts, dtype=torch.int32)

    def set_routing(self, generation: int, owners: Sequence[Sequence[int]]) -> None:
        """See Exchange. There is nobody to send to."""

    @property
    def is_awaited(self) -> bool:
        """See Exchange. Nobody waits."""
        return False

    def begin_step(self, total_tokens: int, deadline_ms: float) -> None:
        """See Exchange. Nothing to prepare."""

    def dispatch(self, layer: int, x_NH: Mirror, ids_NK: Mirror, weights_NK: Mirror, n: int, *, first: int = 0) -> int:
        """See Exchange. One row of zeros for each held expert."""
        del x_NH, ids_NK, weights_NK, n, first
        self.counts_E.zero_()
        self.counts_E[list(self._held[layer])] = 1
        self.rows_RH.zero_()
        return len(self._held[layer])

    def combine(self, layer: int, y_RH: torch.Tensor, out_NH: Mirror, n: int, *, first: int = 0) -> None:
        """See Exchange. Zeros."""
        del layer, y_RH
        out_NH.device[first : first + n].zero_()

    def reduce(self, x_NW: Mirror | None, rows_NW: Mirror | None, out_NW: Mirror, n: int) -> None:
        """See Exchange. Zeros."""
        del x_NW, rows_NW
        out_NW.device[:n].zero_()

    def gather(self, x_MW: Mirror, out_MV: Mirror | None, n: int, total: int) -> None:
        """See Exchange. Zeros."""
        del x_MW, total
        if out_MV is not None:
            out_MV.device[:n].zero_()

    def take_times(self) -> ExchangeTimes:
        """See Exchange. Nobody was waited for."""
        return ExchangeTimes(0, 0)
