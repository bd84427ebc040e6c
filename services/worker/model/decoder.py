"""The decoder that all families are: norm, attention, norm, feed-forward, with the residual kept in float32.

Its parts are chosen by the spec, so that a family is a choice of parts. They write the model's program (program.py)
when it is built. Per layer there are ten calls of the compute backend and of the exchange that do something on a host.

Granite multiplies what each part adds to the residual. That costs nothing here: the residual is kept divided by that
factor, from the embedding on, and a norm, which asks for proportions alone, has its epsilon divided by its square.
Shape suffixes: N rows of a step, H hidden, M rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import time

import torch

from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.model.attention import ResidualStream, attention_of
from elasticmoe.services.worker.model.base import StepTimes
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.moe import DenseFeedForward, RoutedExperts
from elasticmoe.services.worker.model.program import Program
from elasticmoe.services.worker.model.weights import RankWeights


class Decoder:
    """One model over one rank's memory (see Model). Owns its buffers, sized for `max_tokens` rows."""

    def __init__(self, backend: ComputeBackend, weights: RankWeights, max_tokens: int) -> None:
        spec = weights.spec
        backend.check_model(spec, weights.kv.geometry.block_size)
        self.backend = backend
        self.times = StepTimes(0, 0, 0)
        self._weights = weights
        self._max_tokens = max_tokens
        self._shard = weights.shard
        self._is_part = weights.shard.of > 1  # of a replica of several ranks
        self._residual_NH = self._buffer(max_tokens, spec.hidden)
        self._x_NH, self._delta_NH = (backend.mirror(max_tokens, spec.hidden) for _ in range(2))
        self._partial_NH = backend.mirror(max_tokens, spec.hidden) if self._is_part else None  # to be added up
        self._head_VH = weights.base["embed" if spec.tie_embeddings else "head"]
        self._logits_MV = self._buffer(0, self._head_VH.shape[0])
        self._gathered_MV = self._buffer(0, spec.vocab)  # by the leader of a replica
        self._head = backend.linear(self._x_NH.device, self._head_VH, self._logits_MV.device)
        self._norm_eps = spec.norm_eps / spec.residual_factor**2
        self._embed = backend.embed(
            weights.base["embed"],
            spec.embedding_factor / spec.residual_factor,
            self._residual_NH.device,
            first=self._shard.span(spec.vocab)[0],
            vocab=spec.vocab,
        )
        # Kept here: operations look at tensors' memory, and nobody else owns a product.
        self._final_weight_H = weights.base["final_norm"]
        if spec.logits_factor != 1:
            self._final_weight_H = self._final_weight_H * spec.logits_factor
        self._attention = attention_of(backend, spec, max_tokens)
        self._program = Program(backend, max_tokens)
        self._write(self._program)

    def forward(self, batch: Batch, exchange: Exchange) -> torch.Tensor:
        """See Model."""
        if batch.num_rows > self._max_tokens:
            raise ValueError(f"a step of {batch.num_rows} rows; the limit is {self._max_tokens}")
        started = time.perf_counter_ns()
        exchange.take_times()
        n = batch.num_rows
        step = self.backend.check_batch(batch, self._weights.kv)
        self._embed(step)
        self._program.run(step, exchange, n)
        logits_MV = self._compute_logits(batch.num_logits)
        if self._is_part:
            logits_MV = self._gather_logits(exchange, batch.num_logits)
        self.backend.fence()
        self.times = StepTimes(time.perf_counter_ns() - started, *exchange.take_times())
        return logits_MV

    def _write(self, program: Program) -> None:
        """From the embedding to the norm before the head."""
        backend, spec = self.backend, self._weights.spec
        residual_NH, delta_NH = self._residual_NH, self._delta_NH.device
        if self._is_part:
            program.meet(lambda exchange, n: exchange.reduce(residual_NH, None, residual_NH, n))
        program.compute_batch(self._attention.prepare)
        for layer in range(spec.num_layers):
            self._write_layer(program, layer)
        program.compute_batch(
            backend.final_norm(residual_NH.device, delta_NH, self._final_weight_H, self._norm_eps, self._x_NH.device)
        )
        program.end()

    def _write_layer(self, program: Program, layer: int) -> None:
        backend, spec, tensors, eps = self.backend, self._weights.spec, self._weights.layers[layer], self._norm_eps
        x_NH, residual_NH, delta_NH = self._x_NH, self._residual_NH.device, self._delta_NH
        stream = ResidualStream(x_NH.device, residual_NH, self._partial_NH)
        attended = None if self._partial_NH is None else self._partial_NH.device  # what is left to be added likewise
        before = None if layer == 0 else delta_NH.device  # what the feed-forward before it left to be added
        program.compute(backend.rms_norm(residual_NH, before, tensors["input_norm"], eps, x_NH.device))
        self._attention.write(program, layer, tensors, stream, spec.norm_eps)
        program.compute(backend.rms_norm(residual_NH, attended, tensors["post_norm"], eps, x_NH.device))
        if layer in spec.dense_layers:
            DenseFeedForward(backend, spec, tensors, x_NH, delta_NH, self._shard).write(program)
            return
        parts = x_NH, delta_NH, self._shard, self._partial_NH  # post_norm has added what attention left in the last
        RoutedExperts(backend, spec, layer, tensors, self._weights.experts[layer], *parts).write(program)

    def _compute_logits(self, num_logits: int) -> torch.Tensor:
        if num_logits > self._logits_MV.host.shape[0]:
            # Grows to the largest number seen: few rows while decoding, a whole chunk's for prompt log probabilities.
            larger_MV = self._buffer(num_logits, self._head_VH.shape[0])
            self._head = self.backend.linear(self._x_NH.device, self._head_VH, larger_MV.device)
            self._logits_MV = larger_MV  # last: where there is no memory for it, the step is repeated
        logits_MV = self._logits_MV.device[:num_logits]
        if num_logits:
            self._head(num_logits)
        return logits_MV

    def _gather_logits(self, exchange: Exchange, num_logits: int) -> torch.Tensor:
        """The columns of all ranks of the replica, at its leader."""
        vocab = self._weights.spec.vocab
        is_leader = self._shard.index == 0
        if is_leader and num_logits > self._gathered_MV.host.shape[0]:
            self._gathered_MV = self._buffer(num_logits, vocab)
        exchange.gather(self._logits_MV, self._gathered_MV if is_leader else None, num_logits, vocab)
        return self._gathered_MV.device[: num_logits if is_leader else 0]

    def _buffer(self, num_rows: int, width: int) -> Mirror:
        """What ranks of a replica send each other; a rank alone needs it nowhere but on its device."""
        if self._is_part:
            return self.backend.mirror(num_rows, width)
        device = self.backend.empty(num_rows, width)
        return Mirror(device, device)
