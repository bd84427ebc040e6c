"""A compute backend of plain torch operations, on tensors of any device: slow, short, and the others' reference.

Products, sums and functions such as exp are computed row by row, each on a buffer of one shape: torch chooses its
kernels by shape and alignment and treats the end of a tensor in another way than its midst, so that a row among others
may differ from the same row alone in its last bits (ADR 26). Activations are float32, as on the host backend: weights
and KV in bfloat16 are widened as they are used.

Shape suffixes: as in base.py; X heads, Y elements of a head, L positions of a sequence up to a row's own, G kv heads, P
queries that share a kv head, S blocks of a cache, T tokens of a block, U elements of a latent, W a plane's width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, MoeSpec, RopeSpec
from elasticmoe.services.worker.backends.base import BatchOp, Op
from elasticmoe.services.worker.backends.tensors import STORED, TensorBackend, looked_up
from elasticmoe.services.worker.backends.torch_batch import TorchBatch, cached, lay_out
from elasticmoe.services.worker.backends.torch_rows import (
    as_it_is,
    feed_forward_row,
    first_rows,
    normed,
    rotate,
    rounded,
    routed,
)
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.rope import inverse_frequencies
from elasticmoe.services.worker.model.weights import KvCache


class TorchBackend(TensorBackend):
    """See TensorBackend."""

    name = "torch"

    def __init__(
        self,
        tell_waiting: Callable[[bool], None] | None = None,
        device: torch.device = torch.device("cpu"),
        *,
        rounds: bool = False,
    ) -> None:
        """See TensorBackend. `rounds`: what is multiplied by bfloat16 weights is rounded to bfloat16, too."""
        super().__init__(tell_waiting, device)
        self._rounds = rounds

    def _taken(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """How products with `weight` take their other side."""
        return rounded if self._rounds and weight.dtype == torch.bfloat16 else as_it_is

    def check_batch(self, batch: Batch, cache: KvCache) -> TorchBatch:
        """See ComputeBackend."""
        return lay_out(batch, cache, self.device)

    # ---- a decoder's

    def embed(
        self, table_VH: torch.Tensor, factor: float, out_NH: torch.Tensor, *, first: int = 0, vocab: int = 0
    ) -> BatchOp:
        """See ComputeBackend."""
        self._check(table_VH, (table_VH.shape[0], out_NH.shape[1]), *STORED)
        self._check_rows(out_NH, out_NH.shape[1])
        end = vocab or first + table_VH.shape[0]

        def run(step: TorchBatch) -> None:
            for token in step.token_ids.tolist():
                if not 0 <= token < end:
                    raise ValueError(f"token {token} is not below the vocabulary's {end}")
            out_NH[: step.num_rows] = looked_up(table_VH, step.token_ids, first, end).float() * factor

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
        row_H, taken = self.empty(x_NH.shape[1]), self._taken(w_WH)

        def run(n: int) -> None:
            w = w_WH.float()
            for x_H, out_W in first_rows(n, x_NH, out_NW):
                product_W = torch.mv(w, row_H.copy_(taken(x_H)))
                if bias_W is not None:
                    product_W += bias_W
                out_W.copy_(out_W + product_W if accumulate else product_W)

        return run

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
        row_H = self.empty(x_NH.shape[1])

        def run(n: int) -> None:
            if delta_NH is not None:
                x_NH[:n] += delta_NH[:n]
            for x_H, out_H in first_rows(n, x_NH, out_NH):
                out_H.copy_(normed(row_H.copy_(x_H), weight_H, eps))

        return run

    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        self._check_norm(weight_H, x_NH, delta_NH, out_MH)
        row_H = self.empty(x_NH.shape[1])

        def run(step: TorchBatch) -> None:
            for at, row in enumerate(step.logit_rows):
                torch.add(x_NH[row], delta_NH[row], out=row_H)
                out_MH[at].copy_(normed(row_H, weight_H, eps))

        return run

    def rope_table(self, rope: RopeSpec, out_ND: torch.Tensor) -> BatchOp:
        """See ComputeBackend."""
        inv_freq = inverse_frequencies(rope).to(self.device)
        half = rope.dims // 2
        self._check_rows(out_ND, rope.dims)

        def run(step: TorchBatch) -> None:
            for row, position in enumerate(step.positions):
                angles = inv_freq * position
                out_ND[row, :half], out_ND[row, half:] = angles.cos() * rope.amplitude, angles.sin() * rope.amplitude

        return run

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
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        self._check_store_kv(spec, qkv_NC, rope_ND, norms)
        widths = (dim, dim) if spec.qk_norm == "head" else (heads * dim, kv_heads * dim)
        buffers = [self.empty(width) for width in widths]
        ends = (0, heads * dim, (heads + kv_heads) * dim)

        def run(step: TorchBatch) -> None:
            n = step.num_rows
            for at, norm in enumerate(norms or ()):
                for normed_NW in torch.split(qkv_NC[:n, ends[at] : ends[at + 1]], widths[at], 1):
                    for normed_W in normed_NW:
                        normed_W.copy_(normed(buffers[at].copy_(normed_W), norm, eps))
            if spec.clip:
                qkv_NC[:n].clamp_(-spec.clip, spec.clip)
            heads_NXY = qkv_NC[:n].view(n, heads + 2 * kv_heads, dim)
            rotate(heads_NXY[:, : heads + kv_heads, : spec.rope.dims], rope_ND[:n, None], spec.rope)
            kv_N2GY = heads_NXY[:, heads:].reshape(n, 2, kv_heads, dim)
            step.kv[step.blocks, layer, :, :, step.places] = kv_N2GY.to(step.kv.dtype)

        return run

    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NO: torch.Tensor) -> BatchOp:
        """See ComputeBackend."""
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        self._check_attention(spec, qkv_NC, out_NO)
        row_GPY = self.empty(kv_heads, heads // kv_heads, dim)

        def run(step: TorchBatch) -> None:
            for row, position in enumerate(step.positions):
                row_GPY.copy_(qkv_NC[row, : heads * dim].view_as(row_GPY))
                k_GLY, v_GLY = cached(step, layer, row, position + 1)
                scores_GPL = torch.bmm(row_GPY, k_GLY.transpose(1, 2)) * spec.scale
                out_NO[row] = torch.bmm(torch.softmax(scores_GPL, -1), v_GLY).view(heads * dim)

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
    ) -> BatchOp:
        """See ComputeBackend."""
        heads, rank = spec.num_heads, spec.kv_rank
        self._check_store_latent(spec, q_NQ, kv_NC, rope_ND, norm)
        row_U = self.empty(rank)

        def run(step: TorchBatch) -> None:
            n = step.num_rows
            rope_N1D = rope_ND[:n, None]
            rotate(q_NQ[:n].view(n, heads, spec.query_width // heads)[..., spec.nope_dim :], rope_N1D, spec.rope)
            rotate(kv_NC[:n, None, rank:], rope_N1D, spec.rope)
            for latent_U in kv_NC[:n, :rank]:
                latent_U.copy_(normed(row_U.copy_(latent_U), norm, eps))
            step.kv[step.blocks, layer, 0, 0, step.places] = kv_NC[:n].to(step.kv.dtype)

        return run

    def latent_attention(
        self, spec: LatentAttentionSpec, layer: int, q_NQ: torch.Tensor, kv_b: torch.Tensor, out_NO: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        heads, rank, nope = spec.num_heads, spec.kv_rank, spec.nope_dim
        self._check_latent_attention(spec, q_NQ, kv_b, out_NO)
        q_XY = self.empty(heads, nope + spec.rope.dims)
        turned_XW = self.empty(heads, spec.kv.width)

        def run(step: TorchBatch) -> None:
            to_keys, to_values = torch.split(kv_b.float().view(heads, -1, rank), [nope, spec.v_dim], 1)
            for row, position in enumerate(step.positions):
                q_XY.copy_(q_NQ[row].view_as(q_XY))
                turned_XW[:, :rank] = torch.bmm(q_XY[:, None, :nope], to_keys)[:, 0]
                turned_XW[:, rank:] = q_XY[:, nope:]
                cached_LW = cached(step, layer, row, position + 1)[0, 0]
                scores_XL = torch.mm(turned_XW, cached_LW.T) * spec.scale
                taken_XU = torch.mm(torch.softmax(scores_XL, -1), cached_LW[:, :rank].contiguous())
                out_NO[row] = torch.bmm(to_values, taken_XU[..., None]).view(-1)

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
        row_H = self.empty(x_NH.shape[1])

        def run(n: int) -> None:
            for row, x_H in enumerate(x_NH[:n]):
                logits_E = torch.mv(gate_EH, row_H.copy_(x_H))
                ids_K, weights_NK[row] = routed(logits_E, bias_E, moe)
                ids_NK[row] = ids_K

        return run

    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """See ComputeBackend."""
        num_experts = moe.num_experts
        self._check_experts(w13_E, w2_E, moe, hidden)
        row_H, taken = self.empty(hidden), self._taken(w13_E)

        def run(rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
            computed_RH = rows_RH[:num_rows].to(self.device)
            rows = iter(computed_RH)
            for expert, count in enumerate(counts_E[:num_experts].tolist()):
                if count:
                    w13, w2 = w13_E[expert].float(), w2_E[expert].float()
                for _ in range(count):
                    x_H = next(rows)
                    x_H.copy_(feed_forward_row(row_H.copy_(x_H), w13, w2, taken))
            if rows_RH.device != self.device:
                self.fence()
                rows_RH[:num_rows].copy_(computed_RH)

        return run

    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Op:
        """See ComputeBackend."""
        self._check_feed_forward(x_NH, w13, w2, width, out_NH)
        row_H, taken = self.empty(x_NH.shape[1]), self._taken(w13)

        def run(n: int) -> None:
            wide, narrow = w13.float(), w2.float()
            for x_H, out_H in first_rows(n, x_NH, out_NH):
                out_H.copy_(feed_forward_row(row_H.copy_(x_H), wide, narrow, taken))

        return run

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
        row_H, taken = self.empty(x_NH.shape[1]), self._taken(w13)

        def run(n: int) -> None:
            wide, narrow = w13.float(), w2.float()
            for x_H, out_H in first_rows(n, x_NH, out_NH):
                added_H = feed_forward_row(row_H.copy_(x_H), wide, narrow, taken)
                out_H += added_H if gate_1H is None else added_H * torch.mv(gate_1H, row_H).sigmoid()

        return run

    # ---- other models'

    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        width = kv_NE.shape[1]
        self._check_rows(kv_NE, width)
        self._check_rows(out_NE, width)
        powers = [1]  # by distance

        def run(step: TorchBatch) -> None:
            n, planes = step.num_rows, step.kv.shape[2]
            step.kv[step.blocks, layer, :, :, step.places] = kv_NE[:n].view(n, planes, 1, width // planes)
            while len(powers) <= max(step.positions, default=0):
                powers.append(powers[-1] * base % modulus)
            for row, position in enumerate(step.positions):
                factors_L = torch.tensor(powers[position::-1], dtype=torch.int64, device=self.device)
                mixed = (cached(step, layer, row, position + 1).long() * factors_L[:, None]).sum(2) % modulus
                out_NE[row] = mixed.view(width)

        return run
