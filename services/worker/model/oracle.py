"""The oracle model: exact integer arithmetic over what is really in memory (docs/oracle.md).

Its next token depends on every value of the sequence's KV cache and on the weights of the experts that were routed to,
and a few lines of plain Python compute it independently (tests/oracle.py). It uses the same batch, exchange, KV
blocks and sampler as real models. All values are whole numbers below the modulus p < 2^16, so float32 keeps them.

The backend keeps and reads the cache; all other arithmetic is numpy's, on the host, whatever the device.

Shape suffixes: N rows of a step, H hidden, D numbers of a key or of a value, E experts, K experts per token, R rows
received, M logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import EllipsisType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror, StepBatch
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.model.base import StepTimes
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import RankWeights

BASE = 17  # of the positions' powers; a primitive root of 65521, so that all distances up to 65520 differ
FIRST_PRINTABLE, NUM_PRINTABLE = 32, 95  # bytes; a byte-level tokenizer's ids 0..255 are the bytes
CHOSEN_LOGIT = 30.0  # all others are 0

Ints = npt.NDArray[np.int64]
TensorReader = Callable[[Ints | EllipsisType], npt.NDArray[np.float32]]


class StepPace(NamedTuple):
    """What a step takes at the least: of one rank `step_us`, for each of its own tokens `token_us`, for each sequence
    `sequence_us`, for each token whose KV they read `kv_ns`; and for each row that an expert of this rank computes,
    whosever it is, `row_us`: so the layout divides it. All 0: as long as it takes."""

    step_us: int = 0
    token_us: int = 0
    sequence_us: int = 0
    kv_ns: int = 0
    row_us: int = 0

    def own_ns(self, batch: Batch) -> int:
        """For the rank's own tokens."""
        us = self.step_us + self.token_us * batch.num_rows + self.sequence_us * len(batch.kv_lens)
        return 1_000 * us + self.kv_ns * sum(batch.kv_lens)

    def rows_ns(self, num_rows: int) -> int:
        """For what its experts compute in one layer."""
        return 1_000 * self.row_us * num_rows


class OracleModel:
    """One rank's oracle model (see Model). Owns its buffers, sized for `max_tokens` rows."""

    def __init__(self, backend: ComputeBackend, weights: RankWeights, max_tokens: int) -> None:
        spec = weights.spec
        hidden, dim, top_k = spec.hidden, spec.attention.kv.elements // 2, spec.moe.top_k
        self.backend = backend
        self.times = StepTimes(0, 0, 0)
        self._weights = weights
        self._spec, self._shard = spec, weights.shard
        constants = dict(spec.constants)
        self._modulus, self._dim = constants["modulus"], dim
        self._pace = StepPace(**{name: value for name, value in constants.items() if name != "modulus"})
        self._max_tokens = max_tokens
        # Each step reads what is in memory then.
        self._embed_VH, self._head_H = (_reader(backend, weights.base[name]) for name in ("embed", "head"))
        self._salt_LH = [_reader(backend, layer["salt"]) for layer in weights.layers]
        self._experts = [(_reader(backend, layer["mul"]), _reader(backend, layer["add"])) for layer in weights.experts]
        self._key_at_D, self._value_at_D = np.arange(dim) % hidden, np.arange(dim, 2 * dim) % hidden
        self._dim_of_H = np.arange(hidden) % dim
        self._router_H = np.arange(1, hidden + 1)
        experts_E = np.arange(spec.moe.num_experts)
        self._scale_E, self._shift_E = 2 * experts_E + 1, (experts_E + 1) ** 2 * 7919
        # Tensors for backend and exchange, and numpy's view of the same memory.
        self._kv_ND, self._mixed_ND = (backend.mirror(max_tokens, 2 * dim) for _ in range(2))
        self._upload, self._download = backend.upload(self._kv_ND), backend.download(self._mixed_ND)
        self._mix = [
            backend.whole_number_attention(layer, self._modulus, BASE, self._kv_ND.device, self._mixed_ND.device)
            for layer in range(spec.num_layers)
        ]
        self._x_NH, self._sum_NH = (backend.mirror(max_tokens, hidden) for _ in range(2))
        self._ids_NK, self._ones_NK = (
            backend.mirror(max_tokens, top_k, dtype=torch.int32),
            backend.mirror(max_tokens, top_k),
        )
        self._upload_tokens = [backend.upload(mirror) for mirror in (self._x_NH, self._ids_NK, self._ones_NK)]
        self._download_sum = backend.download(self._sum_NH)
        self._mixed_at_host = Mirror(self._mixed_ND.host, self._mixed_ND.host)
        self._kv, self._mixed, self._x, self._sum, self._ids = (
            mirror.host.numpy() for mirror in (self._kv_ND, self._mixed_ND, self._x_NH, self._sum_NH, self._ids_NK)
        )
        self._ones_NK.host.fill_(1.0)
        self._due_ns = 0

    def forward(self, batch: Batch, exchange: Exchange) -> torch.Tensor:
        """See Model."""
        if batch.num_rows > self._max_tokens:
            raise ValueError(f"a step of {batch.num_rows} rows; the limit is {self._max_tokens}")
        started = time.perf_counter_ns()
        exchange.take_times()
        step = self.backend.check_batch(batch, self._weights.kv)
        token_ids = np.array(batch.token_ids, dtype=np.int64)
        if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < self._spec.vocab:
            raise ValueError(f"a token is not below the vocabulary's {self._spec.vocab}")
        positions_N1 = _positions(batch)[:, None]
        self._due_ns = started + self._pace.own_ns(batch)
        x_NH = self._embed_VH(token_ids).astype(np.int64)
        for layer in range(self._spec.num_layers):
            x_NH = self._attend(step, layer, x_NH, positions_N1, exchange)
            x_NH = self._route_and_compute(layer, x_NH, exchange, is_last=layer + 1 == self._spec.num_layers)
        logits_MV = self._logits(x_NH[np.array(batch.logit_rows, dtype=np.int64)], exchange)
        self.times = StepTimes(time.perf_counter_ns() - started, *exchange.take_times())
        return logits_MV

    def _attend(self, step: StepBatch, layer: int, x_NH: Ints, positions_N1: Ints, exchange: Exchange) -> Ints:
        """Write k and v, mix what the cache holds up to each row's position into x. Ranks of a replica have all of the
        cache; of what is read from it each gives its part of the numbers, so that the cache of each counts."""
        p, dim, n = self._modulus, self._dim, len(x_NH)
        salt_H = self._salt_LH[layer](...).astype(np.int64)
        key_at_D, value_at_D = self._key_at_D, self._value_at_D
        self._kv[:n, :dim] = (x_NH[:, key_at_D] * salt_H[key_at_D] + positions_N1 + 1) % p
        self._kv[:n, dim:] = (x_NH[:, value_at_D] + salt_H[value_at_D] * (positions_N1 + 1)) % p
        self._upload(n)
        self._mix[layer](step)
        self._download(n)
        if self._shard.of > 1:
            first, end = self._shard.span(dim)
            for begin in (0, dim):
                self._mixed[:n, begin : begin + first] = self._mixed[:n, begin + end : begin + dim] = 0
            exchange.reduce(self._mixed_at_host, None, self._mixed_at_host, n)
        mixed_ND = self._mixed[:n].astype(np.int64)
        keys_NH, values_NH = mixed_ND[:, self._dim_of_H], mixed_ND[:, dim + self._dim_of_H]
        mixed_NH: Ints = (x_NH + keys_NH + values_NH * salt_H) % p
        return mixed_NH

    def _route_and_compute(self, layer: int, x_NH: Ints, exchange: Exchange, *, is_last: bool) -> Ints:
        """Add the results of the top k experts, each with weight 1. In the last layer the step's time is brought up to
        what the config says, while the others wait for the rows, as for those of a slower device."""
        p, top_k, n = self._modulus, self._spec.moe.top_k, len(x_NH)
        hash_N1 = (x_NH @ self._router_H % p)[:, None]
        scores_NE = (hash_N1 * self._scale_E + self._shift_E) % p
        self._ids[:n] = np.argsort(-scores_NE, axis=1, kind="stable")[:, :top_k]
        self._x[:n] = x_NH
        for upload in self._upload_tokens:
            upload(n)
        first, end = self._shard.span(n)
        num_rows = exchange.dispatch(layer, self._x_NH, self._ids_NK, self._ones_NK, end - first, first=first)
        if num_rows:
            mul_EH, add_EH = self._experts[layer]
            experts_R = np.repeat(np.arange(self._spec.moe.num_experts), exchange.counts_E.numpy())
            rows = exchange.rows_RH[:num_rows]
            rows_RH = rows.cpu().numpy()
            # The slots of experts without rows are not touched: they may be unmapped.
            mul_RH, add_RH = mul_EH(experts_R).astype(np.int64), add_EH(experts_R).astype(np.int64)
            rows_RH[:] = (rows_RH.astype(np.int64) * mul_RH + add_RH) % p
            if rows.device.type != "cpu":
                rows.copy_(torch.from_numpy(rows_RH))
            self._due_ns += self._pace.rows_ns(num_rows)
        if is_last and (left_ns := self._due_ns - time.perf_counter_ns()) > 0:
            time.sleep(left_ns / 1e9)
        exchange.combine(layer, exchange.rows_RH, self._sum_NH, end - first, first=first)
        if self._shard.of > 1:
            exchange.reduce(None, self._sum_NH, self._sum_NH, n)
        self._download_sum(n)
        summed_NH: Ints = (x_NH + self._sum[:n].astype(np.int64)) % p
        return summed_NH

    def _logits(self, x_MH: Ints, exchange: Exchange) -> torch.Tensor:
        vocab = self._spec.vocab
        hash_M = x_MH @ self._head_H(...).astype(np.int64) % self._modulus
        has_printable = vocab >= FIRST_PRINTABLE + NUM_PRINTABLE
        tokens_M = FIRST_PRINTABLE + hash_M % NUM_PRINTABLE if has_printable else hash_M % vocab
        logits_MV = torch.zeros((len(x_MH), vocab), dtype=torch.float32)
        logits_MV.numpy()[np.arange(len(x_MH)), tokens_M] = CHOSEN_LOGIT
        if self._shard.of > 1:
            logits_MV = self._gathered(logits_MV, exchange)
        return logits_MV.to(self.backend.device)

    def _gathered(self, logits_MV: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """Each rank's part of the columns, at the leader of the replica; nothing at others."""
        num_logits, vocab = logits_MV.shape
        begin, end = self._shard.span(vocab)
        part_MW = logits_MV[:, begin:end].contiguous()
        whole_MV = torch.empty(num_logits if self._shard.index == 0 else 0, vocab)
        out_MV = Mirror(whole_MV, whole_MV) if self._shard.index == 0 else None
        exchange.gather(Mirror(part_MW, part_MW), out_MV, num_logits, vocab)
        return whole_MV


def _reader(backend: ComputeBackend, tensor: torch.Tensor) -> TensorReader:
    """What lies in `tensor` when it is called, at the indices of the first dimension or all of it, in host memory."""
    if backend.is_synchronous:
        return tensor.numpy().__getitem__

    def read(at: Ints | EllipsisType) -> npt.NDArray[np.float32]:
        index = at if isinstance(at, EllipsisType) else torch.from_numpy(at).to(tensor.device)
        read_X: npt.NDArray[np.float32] = tensor[index].cpu().numpy()
        return read_X

    return read


def _positions(batch: Batch) -> Ints:
    """Position of each row."""
    starts_S1 = np.array(batch.row_starts, dtype=np.int64)
    counts_S = np.diff(starts_S1)
    first_S = np.array(batch.kv_lens, dtype=np.int64) - counts_S
    return np.arange(batch.num_rows) + np.repeat(first_S - starts_S1[:-1], counts_S)
