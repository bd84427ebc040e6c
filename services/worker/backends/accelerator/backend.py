"""The compute backend of accelerators: batched operations over a vendor's kernels.

Activations are float32, weights and KV as they are stored. Nothing waits but what the exchange needs: an operation
allocates its buffers when it is made, looks at host memory alone, and is queued. What has no kernel here is exact in
any order (rows copied, numbers cut, whole numbers added).

Shape suffixes: as in base.py; X heads, Y elements of a head, U elements of a latent, L positions, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, MoeSpec, RopeSpec
from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch, SentFields
from elasticmoe.services.worker.backends.accelerator.experts import Experts
from elasticmoe.services.worker.backends.accelerator.kernels import Kernels
from elasticmoe.services.worker.backends.accelerator.whole_numbers import WholeNumbers
from elasticmoe.services.worker.backends.base import BatchOperation, Mirror, Operation
from elasticmoe.services.worker.backends.tensors import STORED, TensorBackend
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.rope import inverse_frequencies
from elasticmoe.services.worker.model.weights import KvCache


class AcceleratorBackend(TensorBackend):
    """See ComputeBackend. `kernels`: of the device's vendor."""

    def __init__(self, kernels: Kernels, tell_waiting: Callable[[bool], None] | None, device: torch.device) -> None:
        super().__init__(tell_waiting, device)
        self.name = kernels.name
        self._kernels: Final = kernels
        self._transfers: Final = {name: SentFields(device) for name in ("batch", "tiles")}

    def mirror(self, *shape: int, dtype: torch.dtype = torch.float32) -> Mirror:
        """See ComputeBackend. The host's side is pinned, so that copies run beside the host."""
        device = self.empty(*shape, dtype=dtype)
        return Mirror(device, device if self.is_synchronous else torch.empty(shape, dtype=dtype, pin_memory=True))

    def check_batch(self, batch: Batch, cache: KvCache) -> AcceleratorBatch:
        """See ComputeBackend."""
        return AcceleratorBatch(batch, cache, self._transfers)

    # ---- a decoder's

    def embed(self, table_VH: torch.Tensor, factor: float, out_NH: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        vocab, hidden = table_VH.shape
        self._check(table_VH, (vocab, hidden), *STORED)
        self._check_rows(out_NH, hidden)

        def run(step: AcceleratorBatch) -> None:
            tokens = step.batch.token_ids
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < vocab:
                    raise ValueError(f"token {token} is not below the vocabulary's {vocab}")
            torch.mul(table_VH.index_select(0, step.token_ids).float(), factor, out=out_NH[: step.num_rows])

        return run

    def linear(
        self,
        x_NH: torch.Tensor,
        w_WH: torch.Tensor,
        out_NW: torch.Tensor,
        *,
        bias_W: torch.Tensor | None = None,
        accumulate: bool = False,
    ) -> Operation:
        """See ComputeBackend."""
        self._check_linear(x_NH, w_WH, out_NW, bias_W)

        def run(n: int) -> None:
            self._kernels.product(x_NH, w_WH, out_NW, n, bias_W=bias_W, accumulate=accumulate)

        return run

    def rms_norm(
        self,
        x_NH: torch.Tensor,
        delta_NH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        out_NH: torch.Tensor,
    ) -> Operation:
        """See ComputeBackend."""
        self._check_norm(weight_H, x_NH, out_NH, *([] if delta_NH is None else [delta_NH]))
        x_N1H, out_N1H = x_NH[:, None], out_NH[:, None]
        delta_N1H = None if delta_NH is None else delta_NH[:, None]

        def run(n: int) -> None:
            self._kernels.norm(x_N1H, delta_N1H, weight_H, eps, out_N1H, n, keeps_sum=delta_N1H is not None)

        return run

    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOperation:
        """See ComputeBackend."""
        self._check_norm(weight_H, x_NH, delta_NH, out_MH)
        x_N1H, delta_N1H, out_M1H = x_NH[:, None], delta_NH[:, None], out_MH[:, None]

        def run(step: AcceleratorBatch) -> None:
            self._kernels.norm(x_N1H, delta_N1H, weight_H, eps, out_M1H, step.num_logits, rows_N=step.logit_rows)

        return run

    def rope_table(self, rope: RopeSpec, out_ND: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        frequencies = inverse_frequencies(rope).to(self.device)
        self._check_rows(out_ND, rope.dims)

        def run(step: AcceleratorBatch) -> None:
            self._kernels.rope_table(step.positions, frequencies, rope.amplitude, out_ND, step.num_rows)

        return run

    def store_kv(
        self,
        spec: AttentionSpec,
        layer: int,
        qkv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> BatchOperation:
        """See ComputeBackend."""
        self._check_store_kv(spec, qkv_NC, rope_ND, norms)
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        qkv_NXY = qkv_NC.view(-1, heads + 2 * kv_heads, dim)
        turned_NXD = qkv_NXY[:, : heads + kv_heads, : spec.rope.dims]
        parts = qkv_NC[:, : heads * dim], qkv_NC[:, heads * dim : (heads + kv_heads) * dim]
        normed = [part.view(len(part), -1, len(norm)) for part, norm in zip(parts, norms or (), strict=False)]

        def run(step: AcceleratorBatch) -> None:
            n = step.num_rows
            for part_NXY, norm in zip(normed, norms or (), strict=True):
                self._kernels.norm(part_NXY, None, norm, eps, part_NXY, n)
            if spec.clip:
                qkv_NC[:n].clamp_(-spec.clip, spec.clip)
            self._kernels.rotate(turned_NXD, rope_ND, n, interleaved=spec.rope.interleaved)
            self._kernels.store(qkv_NXY[:, heads:], step.kv[:, layer], step.blocks, step.places, n)

        return run

    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NO: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        self._check_attention(spec, qkv_NC, out_NO)
        dim, heads = spec.head_dim, spec.num_heads
        each = self._kernels.queries_per_tile(heads // spec.num_kv_heads, spec.kv.planes)
        q_NXY, out_NXY = qkv_NC[:, : heads * dim].view(-1, heads, dim), out_NO.view(-1, heads, dim)

        def run(step: AcceleratorBatch) -> None:
            self._kernels.attend(q_NXY, step.kv[:, layer], dim, spec.scale, step.queries(each), out_NXY)

        return run

    def store_latent(
        self,
        spec: LatentAttentionSpec,
        layer: int,
        q_NQ: torch.Tensor,
        kv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
    ) -> BatchOperation:
        """See ComputeBackend."""
        self._check_store_latent(spec, q_NQ, kv_NC, rope_ND, norm)
        turned = q_NQ.view(len(q_NQ), spec.num_heads, -1)[..., spec.nope_dim :], kv_NC[:, None, spec.kv_rank :]
        kv_N1C, latent_N1U = kv_NC[:, None], kv_NC[:, None, : spec.kv_rank]

        def run(step: AcceleratorBatch) -> None:
            n = step.num_rows
            for turned_NXD in turned:
                self._kernels.rotate(turned_NXD, rope_ND, n, interleaved=spec.rope.interleaved)
            self._kernels.norm(latent_N1U, None, norm, eps, latent_N1U, n)
            self._kernels.store(kv_N1C, step.kv[:, layer], step.blocks, step.places, n)

        return run

    def latent_attention(
        self, spec: LatentAttentionSpec, layer: int, q_NQ: torch.Tensor, kv_b: torch.Tensor, out_NO: torch.Tensor
    ) -> BatchOperation:
        """See ComputeBackend."""
        self._check_latent_attention(spec, q_NQ, kv_b, out_NO)
        heads, rank, nope = spec.num_heads, spec.kv_rank, spec.nope_dim
        each = self._kernels.queries_per_tile(heads, spec.kv.planes)
        q_NXY, out_NXY = q_NQ.view(len(q_NQ), heads, -1), out_NO.view(-1, heads, spec.v_dim)
        turned_NXW = self.empty(len(q_NQ), heads, spec.kv.width)
        taken_NXU = self.empty(len(q_NQ), heads, rank)
        to_keys_XUY = kv_b.view(heads, -1, rank)[:, :nope].transpose(1, 2)
        to_values_XYU = kv_b.view(heads, -1, rank)[:, nope:]

        def run(step: AcceleratorBatch) -> None:
            n = step.num_rows
            self._kernels.head_products(q_NXY[..., :nope], to_keys_XUY, turned_NXW[..., :rank], n)
            turned_NXW[:n, :, rank:] = q_NXY[:n, :, nope:]
            self._kernels.attend(turned_NXW, step.kv[:, layer], rank, spec.scale, step.queries(each), taken_NXU)
            self._kernels.head_products(taken_NXU, to_values_XYU, out_NXY, n)

        return run

    def route(
        self,
        x_NH: torch.Tensor,
        gate_EH: torch.Tensor,
        bias_E: torch.Tensor | None,
        moe: MoeSpec,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> Operation:
        """See ComputeBackend."""
        self._check_route(x_NH, gate_EH, bias_E, moe, ids_NK, weights_NK)
        logits_NE = self.empty(len(x_NH), moe.num_experts)

        def run(n: int) -> None:
            self._kernels.product(x_NH, gate_EH, logits_NE, n)
            self._kernels.route(logits_NE, bias_E, moe, ids_NK, weights_NK, n)

        return run

    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """See ComputeBackend."""
        self._check_experts(w13_E, w2_E, moe, hidden)
        experts = Experts(self._kernels, w13_E, w2_E)

        def run(rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
            experts.compute(rows_RH[:num_rows], counts_E[: moe.num_experts])
            if rows_RH.device != self.device:
                self.fence()

        return run

    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Operation:
        """See ComputeBackend."""
        self._check_feed_forward(x_NH, w13, w2, width, out_NH)
        middle_NI = self.empty(len(x_NH), width)

        def run(n: int) -> None:
            self._kernels.gated_product(x_NH, w13, middle_NI, n)
            self._kernels.product(middle_NI, w2, out_NH, n)

        return run

    def shared_experts(
        self,
        x_NH: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        gate_1H: torch.Tensor | None,
        width: int,
        out_NH: torch.Tensor,
    ) -> Operation:
        """See ComputeBackend."""
        self._check_feed_forward(x_NH, w13, w2, width, out_NH)
        if gate_1H is not None:
            self._check(gate_1H, (1, x_NH.shape[1]), torch.float32)
        middle_NI = self.empty(len(x_NH), width)
        gate_N1 = None if gate_1H is None else self.empty(len(x_NH), 1)

        def run(n: int) -> None:
            if gate_1H is not None and gate_N1 is not None:
                self._kernels.product(x_NH, gate_1H, gate_N1, n)
            self._kernels.gated_product(x_NH, w13, middle_NI, n)
            self._kernels.product(middle_NI, w2, out_NH, n, row_gate_N=gate_N1, accumulate=True)

        return run

    # ---- other models'

    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOperation:
        """See ComputeBackend."""
        width = kv_NE.shape[1]
        self._check_rows(kv_NE, width)
        self._check_rows(out_NE, width)
        mix = WholeNumbers(modulus, base, self.device)

        def run(step: AcceleratorBatch) -> None:
            n, planes = step.num_rows, step.kv.shape[2]
            kv_NPW = kv_NE.view(-1, planes, width // planes)
            self._kernels.store(kv_NPW, step.kv[:, layer], step.blocks, step.places, n)
            mix.run(step, layer, out_NE)

        return run
