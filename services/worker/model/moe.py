"""Feed-forward parts of the decoder: routed experts, and the ordinary kind for dense layers. Each is made once and
writes itself into the model's program.

Shape suffixes: N own rows, H hidden, E experts, K experts per token, R rows received for own experts.
"""

from __future__ import annotations

import torch

from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.sharding import Shard
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror, Op
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.model.program import Program


class RoutedExperts:
    """One layer of routed experts and, where the model has them, the shared ones, which each token's owner computes: x
    is read, the experts' weighted sum is written to `delta`.

    Of a replica's ranks each dispatches a part of the rows, and computes its part of the shared experts for all."""

    def __init__(
        self,
        backend: ComputeBackend,
        spec: ModelSpec,
        layer: int,
        tensors: dict[str, torch.Tensor],
        experts: dict[str, torch.Tensor],
        x_NH: Mirror,
        delta_NH: Mirror,
        shard: Shard,
        partial_NH: Mirror | None = None,
    ) -> None:
        """`partial_NH`: room for this rank's part of the shared experts, where the replica has several ranks; free
        between two layers."""
        max_tokens, top_k = x_NH.host.shape[0], spec.moe.top_k
        ids_NK = backend.mirror(max_tokens, top_k, dtype=torch.int32)
        weights_NK = backend.mirror(max_tokens, top_k)
        self._layer, self._shard = layer, shard
        self._x_NH, self._ids_NK, self._weights_NK, self._delta_NH = x_NH, ids_NK, weights_NK, delta_NH
        self._route = backend.route(
            x_NH.device, tensors["gate"], tensors.get("gate_bias"), spec.moe, ids_NK.device, weights_NK.device
        )
        self._compute = backend.experts(experts["w13"], experts["w2"], spec.moe, spec.hidden)
        self._add_shared: Op | None = None
        self._partial_NH: Mirror | None = None
        if spec.moe.shared_width:
            w13, w2, gate_1H = tensors["shared_w13"], tensors["shared_w2"], tensors.get("shared_gate")
            width, out_NH = shard.size(spec.moe.shared_width), delta_NH
            if shard.of > 1:
                assert partial_NH is not None, "a part is added to others"
                out_NH = self._partial_NH = partial_NH
                self._clear = backend.clear(out_NH.device)
            self._add_shared = backend.shared_experts(x_NH.device, w13, w2, gate_1H, width, out_NH.device)

    def write(self, program: Program) -> None:
        """The layer; ranks meet in it also with no rows."""
        program.compute(self._route)
        if self._shard.of > 1:
            self._write_part(program)
            return

        def meet(exchange: Exchange, n: int) -> None:
            num_rows = exchange.dispatch(self._layer, self._x_NH, self._ids_NK, self._weights_NK, n)
            self._compute(exchange.rows_RH, exchange.counts_E, num_rows)
            exchange.combine(self._layer, exchange.rows_RH, self._delta_NH, n)

        program.meet(meet)
        if self._add_shared is not None:
            program.compute(self._add_shared)

    def _write_part(self, program: Program) -> None:
        """The same, with the other ranks of the replica."""

        def dispatch(exchange: Exchange, n: int) -> None:
            first, end = self._shard.span(n)
            of_rows = self._x_NH, self._ids_NK, self._weights_NK, end - first
            self._compute(exchange.rows_RH, exchange.counts_E, exchange.dispatch(self._layer, *of_rows, first=first))

        def combine(exchange: Exchange, n: int) -> None:
            first, end = self._shard.span(n)
            exchange.combine(self._layer, exchange.rows_RH, self._delta_NH, end - first, first=first)
            exchange.reduce(self._partial_NH, self._delta_NH, self._delta_NH, n)

        program.meet(dispatch)
        if self._add_shared is not None:  # before others are waited for
            program.compute(self._clear, self._add_shared)
        program.meet(combine)


class DenseFeedForward:
    """One layer without experts: x is read, the result is written to `delta`, added up over a replica's ranks."""

    def __init__(
        self,
        backend: ComputeBackend,
        spec: ModelSpec,
        tensors: dict[str, torch.Tensor],
        x_NH: Mirror,
        delta_NH: Mirror,
        shard: Shard,
    ) -> None:
        self._delta_NH, self._is_part = delta_NH, shard.of > 1
        width = shard.size(spec.dense_width)
        self._compute = backend.feed_forward(x_NH.device, tensors["w13"], tensors["w2"], width, delta_NH.device)

    def write(self, program: Program) -> None:
        """The layer; nothing is exchanged but with the other ranks of the replica."""
        program.compute(self._compute)
        if self._is_part:
            delta_NH = self._delta_NH
            program.meet(lambda exchange, n: exchange.reduce(delta_NH, None, delta_NH, n))
