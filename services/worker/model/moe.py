"""Feed-forward parts of the decoder: routed experts, and the ordinary kind for dense layers.

Shape suffixes: N own rows, H hidden, E experts, K experts per token, R rows received for own experts.
"""

from __future__ import annotations

import torch

from common.model_spec import ModelSpec
from services.worker.exchange.base import Exchange
from services.worker.model import ops


class RoutedExperts:
    """One layer of softmax top-k experts: x is read, the experts' weighted sum is written to `delta`."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        tensors: dict[str, torch.Tensor],
        experts: dict[str, torch.Tensor],
        x_NH: torch.Tensor,
        delta_NH: torch.Tensor,
    ) -> None:
        shape = (x_NH.shape[0], spec.moe.top_k)
        self._layer = layer
        self._x_NH = x_NH
        self._delta_NH = delta_NH
        self._ids_NK = torch.empty(shape, dtype=torch.int32)
        self._weights_NK = torch.empty(shape, dtype=torch.float32)
        self._route = ops.route(x_NH, tensors["gate"], spec.moe, self._ids_NK, self._weights_NK)
        self._compute = ops.experts(experts["w13"], experts["w2"], spec.moe, spec.hidden)

    def __call__(self, exchange: Exchange, n: int) -> None:
        """Compute the layer; takes part in the exchange also with no rows."""
        self._route(n)
        num_rows = exchange.dispatch(self._layer, self._x_NH, self._ids_NK, self._weights_NK, n)
        self._compute(exchange.rows_RH, exchange.counts_E, num_rows)
        exchange.combine(self._layer, exchange.rows_RH, self._delta_NH, n)


class DenseFeedForward:
    """One layer without experts: x is read, the result is written to `delta`."""

    def __init__(
        self, spec: ModelSpec, tensors: dict[str, torch.Tensor], x_NH: torch.Tensor, delta_NH: torch.Tensor
    ) -> None:
        self._compute = ops.feed_forward(x_NH, tensors["w13"], tensors["w2"], spec.dense_width, delta_NH)

    def __call__(self, exchange: Exchange, n: int) -> None:
        """Compute the layer; nothing is exchanged."""
        del exchange
        self._compute(n)
