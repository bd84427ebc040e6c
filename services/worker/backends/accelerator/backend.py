"""The compute backend of accelerators: batched operations over a vendor's kernels.

Activations are float32, weights and KV as they are stored. Nothing waits but what the exchange needs: an operation
allocates its buffers when it is made, looks at host memory alone, and is queued. What has no kernel here is exact in
any order (rows copied, numbers cut, whole numbers added).

Shape suffixes: as in base.py; X heads, Y elements of a head, U elements of a latent, P planes x heads of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, ModelSpec, MoeSpec, RopeSpec
from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch
from elasticmoe.services.worker.backends.accelerator.experts import ExpertRooms, Experts
from elasticmoe.services.worker.backends.accelerator.graphs import Graphs, Recorder
from elasticmoe.services.worker.backends.accelerator.kernels import (
    Kernels,
    Norm,
    PagedAttention,
    Product,
    RopeTable,
    Rotation,
    Route,
)
from elasticmoe.services.worker.backends.accelerator.whole_numbers import WholeNumbers
from elasticmoe.services.worker.backends.answers import WeightedSum
from elasticmoe.services.worker.backends.base import BatchOp, Mirror, Op
from elasticmoe.services.worker.backends.sent_fields import SentFields
from elasticmoe.services.worker.backends.tensors import STORED, TensorBackend, looked_up
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.rope import inverse_frequencies
from elasticmoe.services.worker.model.weights import KvCache

BLOCK_IDS: Final = 8_192  # of a step's sequences that there is room for from the beginning, where steps are captured


class AcceleratorBackend(TensorBackend):
    """See ComputeBackend. `kernels`: of the device's vendor. `recorder`: of what they queue, for kernels that can be
    captured."""

    def __init__(
        self,
        kernels: Kernels,
        tell_waiting: Callable[[bool], None] | None,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(tell_waiting, device)
        self.name = kernels.name
        self._kernels: Final = kernels
        self._rooms: Final = ExpertRooms(device)
        self._transfers: Final = {name: SentFields(device) for name in ("batch", "attention", "stored", "read")}
        self.graphs: Final = Graphs(recorder, self._count_moves)

    def _count_moves(self) -> int:
        return self._kernels.num_moves + sum(fields.num_moves for fields in self._transfers.values())

    def check_model(self, spec: ModelSpec, block_size: int) -> None:
        """See ComputeBackend."""
        self._kernels.check_model(spec, block_size)

    def mirror(self, *shape: int, dtype: torch.dtype = torch.float32) -> Mirror:
        """See ComputeBackend. The host's side is pinned, so that copies run beside the host."""
        device = self.empty(*shape, dtype=dtype)
        return Mirror(device, device if self.is_synchronous else torch.empty(shape, dtype=dtype, pin_memory=True))

    def check_batch(self, batch: Batch, cache: KvCache) -> AcceleratorBatch:
        """See ComputeBackend."""
        step = AcceleratorBatch(batch, cache, self._transfers, self.graphs.form_of(batch))
        if step.form:
            self._kernels.prepare(step)
        return step

    @contextmanager
    def warming_up(self, rows_max: int) -> Iterator[tuple[int, ...]]:
        """See ComputeBackend."""
        with self.graphs.warming_up(rows_max) as rows:
            yield rows

    def section(self, run: BatchOp, rows_max: int) -> BatchOp:
        """See ComputeBackend. Fields have room for the largest step: where they move, all is captured anew."""
        if self.graphs.is_capturing:
            by_row = dict.fromkeys(("token_ids", "positions", "blocks", "places", "logit_rows"), rows_max)
            self._transfers["batch"].reserve(block_ids=BLOCK_IDS, **by_row)
            self._transfers["attention"].reserve(tiles=4 * rows_max)
        return self.graphs.section(run, rows_max)

    # ---- a decoder's

    def embed(
        self, table_VH: torch.Tensor, factor: float, out_NH: torch.Tensor, *, first: int = 0, vocab: int = 0
    ) -> BatchOp:
        """See ComputeBackend."""
        self._check(table_VH, (table_VH.shape[0], out_NH.shape[1]), *STORED)
        self._check_rows(out_NH, out_NH.shape[1])
        end = vocab or first + table_VH.shape[0]

        def run(step: AcceleratorBatch) -> None:
            tokens = step.batch.token_ids
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < end:
                    raise ValueError(f"token {token} is not below the vocabulary's {end}")
            rows_NH = looked_up(table_VH, step.token_ids, first, end)
            torch.mul(rows_NH.float(), factor, out=out_NH[: step.num_rows])

        return run

    def linear(
        self,
        x_NH: torch.Tensor,
        w_WH: torch.Tensor,
        out_NW: torch.Tensor,
        *,
        bias_W: torch.Tensor | None = None,
        accumulate: bool = False,
    ) -> Op:
        """See ComputeBackend."""
        self._check_linear(x_NH, w_WH, out_NW, bias_W)
        return self._product(x_NH, w_WH, out_NW, bias=bias_W, accumulate=accumulate)

    def _product(
        self,
        x_NH: torch.Tensor,
        w_WH: torch.Tensor,
        out_NW: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        row_gate: torch.Tensor | None = None,
        is_gated: bool = False,
        accumulate: bool = False,
    ) -> Op:
        """Of one head."""
        product = Product(x_NH[:, None], w_WH[None], out_NW[:, None], bias, row_gate, is_gated, accumulate)
        return lambda n: self._kernels.product(product, n)

    def rms_norm(
        self,
        x_NH: torch.Tensor,
        delta_NH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        out_NH: torch.Tensor,
    ) -> Op:
        """See ComputeBackend."""
        self._check_norm(weight_H, x_NH, out_NH, *([] if delta_NH is None else [delta_NH]))
        delta_N1H = None if delta_NH is None else delta_NH[:, None]
        norm = Norm(x_NH[:, None], delta_N1H, weight_H, eps, out_NH[:, None], keeps_sum=delta_NH is not None)
        return lambda n: self._kernels.norm(norm, n)

    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        self._check_norm(weight_H, x_NH, delta_NH, out_MH)
        norm = Norm(x_NH[:, None], delta_NH[:, None], weight_H, eps, out_MH[:, None])
        return lambda step: self._kernels.norm(norm, step.num_logits, step.logit_rows)

    def rope_table(self, rope: RopeSpec, out_ND: torch.Tensor) -> BatchOp:
        """See ComputeBackend."""
        self._check_rows(out_ND, rope.dims)
        table = RopeTable(inverse_frequencies(rope).to(self.device), rope.amplitude, out_ND)
        return lambda step: self._kernels.rope_table(table, step)

    def store_kv(
        self,
        spec: AttentionSpec,
        layer: int,
        qkv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> BatchOp:
        """See ComputeBackend."""
        self._check_store_kv(spec, qkv_NC, rope_ND, norms)
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        qkv_NXY = qkv_NC.view(-1, heads + 2 * kv_heads, dim)
        rotation = self._rotation(qkv_NXY[:, : heads + kv_heads, : spec.rope.dims], rope_ND, spec.rope)
        parts = qkv_NC[:, : heads * dim], qkv_NC[:, heads * dim : (heads + kv_heads) * dim]
        normed = [
            self._norm_in_place(part.view(len(part), -1, len(norm)), norm, eps)
            for part, norm in zip(parts, norms or (), strict=False)
        ]
        kv_NPY = qkv_NXY[:, heads:]

        def run(step: AcceleratorBatch) -> None:
            n = step.num_rows
            for norm in normed:
                self._kernels.norm(norm, n)
            if spec.clip:
                qkv_NC[:n].clamp_(-spec.clip, spec.clip)
            self._kernels.rotate(rotation, n)
            self._kernels.store(kv_NPY, layer, step)

        return run

    def _norm_in_place(self, x_NXY: torch.Tensor, weight_Y: torch.Tensor, eps: float) -> Norm:
        return Norm(x_NXY, None, weight_Y, eps, x_NXY)

    def _rotation(self, turned_NXD: torch.Tensor, rope_ND: torch.Tensor, rope: RopeSpec) -> Rotation:
        return Rotation(turned_NXD, rope_ND, rope.amplitude, rope.interleaved)

    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NO: torch.Tensor) -> BatchOp:
        """See ComputeBackend."""
        self._check_attention(spec, qkv_NC, out_NO)
        dim, heads = spec.head_dim, spec.num_heads
        q_NXY, out_NXY = qkv_NC[:, : heads * dim].view(-1, heads, dim), out_NO.view(-1, heads, dim)
        attention = PagedAttention(q_NXY, layer, dim, spec.scale, out_NXY)
        return lambda step: self._kernels.attend(attention, step)

    def store_latent(
        self,
        spec: LatentAttentionSpec,
        layer: int,
        q_NQ: torch.Tensor,
        kv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
    ) -> BatchOp:
        """See ComputeBackend."""
        self._check_store_latent(spec, q_NQ, kv_NC, rope_ND, norm)
        turned = q_NQ.view(len(q_NQ), spec.num_heads, -1)[..., spec.nope_dim :], kv_NC[:, None, spec.kv_rank :]
        rotations = [self._rotation(turned_NXD, rope_ND, spec.rope) for turned_NXD in turned]
        kv_N1C, normed = kv_NC[:, None], self._norm_in_place(kv_NC[:, None, : spec.kv_rank], norm, eps)

        def run(step: AcceleratorBatch) -> None:
            for rotation in rotations:
                self._kernels.rotate(rotation, step.num_rows)
            self._kernels.norm(normed, step.num_rows)
            self._kernels.store(kv_N1C, layer, step)

        return run

    def latent_attention(
        self, spec: LatentAttentionSpec, layer: int, q_NQ: torch.Tensor, kv_b: torch.Tensor, out_NO: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        self._check_latent_attention(spec, q_NQ, kv_b, out_NO)
        heads, rank, nope = spec.num_heads, spec.kv_rank, spec.nope_dim
        q_NXY, out_NXY = q_NQ.view(len(q_NQ), heads, -1), out_NO.view(-1, heads, spec.v_dim)
        turned_NXW = self.empty(len(q_NQ), heads, spec.kv.width)
        taken_NXU = self.empty(len(q_NQ), heads, rank)
        kv_b_XYU = kv_b.view(heads, -1, rank)
        to_keys = Product(q_NXY[..., :nope], kv_b_XYU[:, :nope].transpose(1, 2), turned_NXW[..., :rank])
        to_values = Product(taken_NXU, kv_b_XYU[:, nope:], out_NXY)
        attention = PagedAttention(turned_NXW, layer, rank, spec.scale, taken_NXU)

        def run(step: AcceleratorBatch) -> None:
            n = step.num_rows
            self._kernels.product(to_keys, n)
            turned_NXW[:n, :, rank:] = q_NXY[:n, :, nope:]
            self._kernels.attend(attention, step)
            self._kernels.product(to_values, n)

        return run

    def route(
        self,
        x_NH: torch.Tensor,
        gate_EH: torch.Tensor,
        bias_E: torch.Tensor | None,
        moe: MoeSpec,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> Op:
        """See ComputeBackend."""
        self._check_route(x_NH, gate_EH, bias_E, moe, ids_NK, weights_NK)
        logits_NE = self.empty(len(x_NH), moe.num_experts)
        product, route = self._product(x_NH, gate_EH, logits_NE), Route(logits_NE, bias_E, moe, ids_NK, weights_NK)

        def run(n: int) -> None:
            product(n)
            self._kernels.route(route, n)

        return run

    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """See ComputeBackend."""
        self._check_experts(w13_E, w2_E, moe, hidden)
        experts = Experts(self._kernels, w13_E, w2_E, self._rooms)

        def run(rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
            experts.compute(rows_RH, counts_E[: moe.num_experts], num_rows)
            if rows_RH.device != self.device:
                self.fence()

        return run

    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Op:
        """See ComputeBackend."""
        self._check_feed_forward(x_NH, w13, w2, width, out_NH)
        middle_NI = self.empty(len(x_NH), width)
        products = self._product(x_NH, w13, middle_NI, is_gated=True), self._product(middle_NI, w2, out_NH)
        return _one_after_another(*products)

    def shared_experts(
        self,
        x_NH: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        gate_1H: torch.Tensor | None,
        width: int,
        out_NH: torch.Tensor,
    ) -> Op:
        """See ComputeBackend."""
        self._check_feed_forward(x_NH, w13, w2, width, out_NH)
        if gate_1H is not None:
            self._check(gate_1H, (1, x_NH.shape[1]), torch.float32)
        middle_NI = self.empty(len(x_NH), width)
        gate_N1 = None if gate_1H is None else self.empty(len(x_NH), 1)
        gates = [] if gate_1H is None or gate_N1 is None else [self._product(x_NH, gate_1H, gate_N1)]
        return _one_after_another(
            *gates,
            self._product(x_NH, w13, middle_NI, is_gated=True),
            self._product(middle_NI, w2, out_NH, row_gate=gate_N1, accumulate=True),
        )

    def weighted_sum(self, total: WeightedSum, n: int) -> None:
        """See ComputeBackend."""
        self._kernels.weighted_sum(total, n)

    # ---- other models'

    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        width = kv_NE.shape[1]
        self._check_rows(kv_NE, width)
        self._check_rows(out_NE, width)
        mix = WholeNumbers(modulus, base, self.device)

        def run(step: AcceleratorBatch) -> None:
            planes = step.kv.shape[2]
            self._kernels.store(kv_NE.view(-1, planes, width // planes), layer, step)
            mix.run(step, layer, out_NE)

        return run


def _one_after_another(*operations: Op) -> Op:
    def run(n: int) -> None:
        for operation in operations:
            operation(n)

    return run
