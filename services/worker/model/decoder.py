"""The decoder that all families are: norm, attention, norm, feed-forward, with the residual kept in float32.

Its parts are chosen by the spec, so that a family is a choice of parts. Per layer there are ten calls of the compute
backend and of the exchange that do something on a host.

Granite multiplies what each part adds to the residual. That costs nothing here: the residual is kept divided by that
factor, from the embedding on, and a norm, which asks for proportions alone, has its epsilon divided by its square.
Shape suffixes: N rows of a step, H hidden, M rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from elasticmoe.services.worker.backends.base import ComputeBackend, Operation
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.model.attention import AttentionLayer, ResidualStream, attention_of
from elasticmoe.services.worker.model.base import StepTimes
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.moe import DenseFeedForward, RoutedExperts
from elasticmoe.services.worker.model.weights import RankWeights


class _DecoderLayer(NamedTuple):
    input_norm: Operation
    attention: AttentionLayer
    post_norm: Operation
    feed_forward: RoutedExperts | DenseFeedForward


class Decoder:
    """One model over one rank's memory (see Model). Owns its buffers, sized for `max_tokens` rows."""

    def __init__(self, backend: ComputeBackend, weights: RankWeights, max_tokens: int) -> None:
        spec = weights.spec
        backend.check_model(spec, weights.kv.geometry.block_size)
        self.backend = backend
        self.times = StepTimes(0, 0, 0)
        self._weights = weights
        self._max_tokens = max_tokens
        self._residual_NH = backend.empty(max_tokens, spec.hidden)
        self._x_NH, self._delta_NH = (backend.mirror(max_tokens, spec.hidden) for _ in range(2))
        self._head_VH = weights.base["embed" if spec.tie_embeddings else "head"]
        self._logits_MV = backend.empty(0, spec.vocab)
        self._head = backend.linear(self._x_NH.device, self._head_VH, self._logits_MV)
        self._attention = attention_of(backend, spec, max_tokens)
        self._norm_eps = spec.norm_eps / spec.residual_factor**2
        self._embed = backend.embed(
            weights.base["embed"], spec.embedding_factor / spec.residual_factor, self._residual_NH
        )
        self._layers = [self._make_layer(layer) for layer in range(spec.num_layers)]
        # Kept here: operations look at tensors' memory, and nobody else owns a product.
        self._final_weight_H = weights.base["final_norm"]
        if spec.logits_factor != 1:
            self._final_weight_H = self._final_weight_H * spec.logits_factor
        self._final_norm = backend.final_norm(
            self._residual_NH, self._delta_NH.device, self._final_weight_H, self._norm_eps, self._x_NH.device
        )

    def forward(self, batch: Batch, exchange: Exchange) -> torch.Tensor:
        """See Model."""
        if batch.num_rows > self._max_tokens:
            raise ValueError(f"a step of {batch.num_rows} rows; the limit is {self._max_tokens}")
        started = time.perf_counter_ns()
        exchange.take_times()
        n = batch.num_rows
        step = self.backend.check_batch(batch, self._weights.kv)
        self._embed(step)
        self._attention.prepare(step)
        for input_norm, attention, post_norm, feed_forward in self._layers:
            input_norm(n)
            attention(step, n)
            post_norm(n)
            feed_forward(exchange, n)
        self._final_norm(step)
        logits_MV = self._compute_logits(batch.num_logits)
        self.backend.fence()
        self.times = StepTimes(time.perf_counter_ns() - started, *exchange.take_times())
        return logits_MV

    def _make_layer(self, layer: int) -> _DecoderLayer:
        backend, spec, tensors, eps = self.backend, self._weights.spec, self._weights.layers[layer], self._norm_eps
        x_NH, residual_NH, delta_NH = self._x_NH, self._residual_NH, self._delta_NH
        before = None if layer == 0 else delta_NH.device  # what the feed-forward before it left to be added
        return _DecoderLayer(
            backend.rms_norm(residual_NH, before, tensors["input_norm"], eps, x_NH.device),
            self._attention.layer(layer, tensors, ResidualStream(x_NH.device, residual_NH), spec.norm_eps),
            backend.rms_norm(residual_NH, None, tensors["post_norm"], eps, x_NH.device),
            DenseFeedForward(backend, spec, tensors, x_NH, delta_NH)
            if layer in spec.dense_layers
            else RoutedExperts(backend, spec, layer, tensors, self._weights.experts[layer], x_NH, delta_NH),
        )

    def _compute_logits(self, num_logits: int) -> torch.Tensor:
        if num_logits > self._logits_MV.shape[0]:
            # Grows to the largest number seen: few rows while decoding, a whole chunk's for prompt log probabilities.
            larger_MV = self.backend.empty(num_logits, self._logits_MV.shape[1])
            self._head = self.backend.linear(self._x_NH.device, self._head_VH, larger_MV)
            self._logits_MV = larger_MV  # last: where there is no memory for it, the step is repeated
        logits_MV = self._logits_MV[:num_logits]
        if num_logits:
            self._head(num_logits)
        return logits_MV
