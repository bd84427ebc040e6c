"""A compute backend of plain torch operations, on tensors of any device: slow, short, and the others' reference.

Products, sums and functions such as exp are computed row by row, each on a buffer of one shape: torch chooses its
kernels by shape and alignment and treats the end of a tensor in another way than its midst, so that a row among others
may differ from the same row alone in its last bits (ADR 26). Activations are float32, as on the host backend: weights
and KV in bfloat16 are widened as they are used.

Shape suffixes: as in base.py; L positions of a sequence up to a row's own, G kv heads, P queries that share a kv head,
S blocks of a cache, T tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import silu

from elasticmoe.common.model_spec import AttentionSpec, MoeSpec
from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.services.worker.backends import torch_sampling
from elasticmoe.services.worker.backends.base import BatchOperation, ComputeBackend, Operation, inverse_frequencies
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

_STORED = (torch.float32, torch.bfloat16)


class _TorchBatch(NamedTuple):
    """A batch as tensors: `token_ids`, `positions` and the cache's `blocks` and `places` in them, where each row's k
    and v belong, [N]; `tables[row]` [ceil(L / T)] block ids of the row's sequence up to its position; `logit_rows` [M].
    """

    num_rows: int
    token_ids: torch.Tensor
    positions: list[int]
    blocks: torch.Tensor
    places: torch.Tensor
    tables: list[torch.Tensor]
    logit_rows: list[int]
    kv: torch.Tensor


class TorchBackend(ComputeBackend):
    """See ComputeBackend. `device`: any that torch computes on."""

    name = "torch"

    def __init__(self, tell_waiting: Callable[[bool], None] | None = None, device: torch.device | None = None) -> None:
        super().__init__(tell_waiting)
        self.device = torch.device("cpu") if device is None else device
        self.is_synchronous = self.device.type == "cpu"

    def _synchronize(self) -> None:
        """See ComputeBackend."""
        torch.accelerator.synchronize(self.device)

    def check_batch(self, batch: Batch, cache: KvCache) -> _TorchBatch:
        """See ComputeBackend."""
        size, num_blocks = cache.geometry.block_size, cache.num_blocks
        for block in batch.blocks:
            if not 0 <= block < num_blocks:
                raise ValueError(f"block {block} is not one of the {num_blocks} blocks")
        positions: list[int] = []
        tables: list[torch.Tensor] = []
        all_blocks = self._ids(batch.blocks.tolist())
        for part, kv_len in enumerate(batch.kv_lens):
            table = all_blocks[batch.block_starts[part] : batch.block_starts[part + 1]]
            for position in range(kv_len - (batch.row_starts[part + 1] - batch.row_starts[part]), kv_len):
                positions.append(position)
                tables.append(table[: position // size + 1])
        last = [int(table[-1]) for table in tables]
        return _TorchBatch(
            batch.num_rows,
            self._ids(batch.token_ids.tolist()),
            positions,
            self._ids(last),
            self._ids([position % size for position in positions]),
            tables,
            batch.logit_rows.tolist(),
            cache.blocks,
        )

    def _ids(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    # ---- a decoder's

    def embed(self, table_VH: torch.Tensor, out_NH: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        vocab, hidden = table_VH.shape
        self._check(table_VH, (vocab, hidden), *_STORED)
        self._check_rows(out_NH, hidden)

        def run(step: _TorchBatch) -> None:
            for token in step.token_ids.tolist():
                if not 0 <= token < vocab:
                    raise ValueError(f"token {token} is not below the vocabulary's {vocab}")
            out_NH[: step.num_rows] = table_VH[step.token_ids].float()

        return run

    def linear(
        self, x_NH: torch.Tensor, w_WH: torch.Tensor, out_NW: torch.Tensor, *, accumulate: bool = False
    ) -> Operation:
        """See ComputeBackend."""
        width, depth = w_WH.shape
        self._check(w_WH, (width, depth), *_STORED)
        self._check_rows(x_NH, depth)
        self._check_rows(out_NW, width)
        row_H = self.empty(depth)

        def run(n: int) -> None:
            w = w_WH.float()
            for x_H, out_W in _rows(n, x_NH, out_NW):
                product_W = torch.mv(w, row_H.copy_(x_H))
                out_W.copy_(out_W + product_W if accumulate else product_W)

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
        hidden = x_NH.shape[1]
        self._check(weight_H, (hidden,), torch.float32)
        for tensor_NH in (x_NH, out_NH, *([] if delta_NH is None else [delta_NH])):
            self._check_rows(tensor_NH, hidden)
        row_H = self.empty(hidden)

        def run(n: int) -> None:
            if delta_NH is not None:
                x_NH[:n] += delta_NH[:n]
            for x_H, out_H in _rows(n, x_NH, out_NH):
                out_H.copy_(_normed(row_H.copy_(x_H), weight_H, eps))

        return run

    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOperation:
        """See ComputeBackend."""
        hidden = x_NH.shape[1]
        self._check(weight_H, (hidden,), torch.float32)
        for tensor_NH in (x_NH, delta_NH, out_MH):
            self._check_rows(tensor_NH, hidden)
        row_H = self.empty(hidden)

        def run(step: _TorchBatch) -> None:
            for at, row in enumerate(step.logit_rows):
                torch.add(x_NH[row], delta_NH[row], out=row_H)
                out_MH[at].copy_(_normed(row_H, weight_H, eps))

        return run

    def rope_table(self, spec: AttentionSpec, out_ND: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        inv_freq = inverse_frequencies(spec).to(self.device)
        half = spec.head_dim // 2
        self._check_rows(out_ND, spec.head_dim)

        def run(step: _TorchBatch) -> None:
            for row, position in enumerate(step.positions):
                angles = inv_freq * position
                out_ND[row, :half], out_ND[row, half:] = angles.cos(), angles.sin()

        return run

    def store_kv(
        self,
        spec: AttentionSpec,
        layer: int,
        qkv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norms_D: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> BatchOperation:
        """See ComputeBackend."""
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        self._check_rows(qkv_NC, (heads + 2 * kv_heads) * dim)
        self._check_rows(rope_ND, dim)
        for norm_D in norms_D or ():
            self._check(norm_D, (dim,), torch.float32)
        row_D = self.empty(dim)

        def run(step: _TorchBatch) -> None:
            n, half = step.num_rows, dim // 2
            heads_NXD = qkv_NC[:n].view(n, heads + 2 * kv_heads, dim)
            turned_NXD = heads_NXD[:, : heads + kv_heads]
            if norms_D is not None:
                for turned_XD in turned_NXD:
                    for head, turned_D in enumerate(turned_XD):
                        turned_D.copy_(_normed(row_D.copy_(turned_D), norms_D[head >= heads], eps))
            cosine, sine = rope_ND[:n, None, :half], rope_ND[:n, None, half:]
            a, b = turned_NXD[..., :half].clone(), turned_NXD[..., half:].clone()
            turned_NXD[..., :half] = a * cosine - b * sine
            turned_NXD[..., half:] = b * cosine + a * sine
            kv_N2GD = heads_NXD[:, heads:].reshape(n, 2, kv_heads, dim)
            step.kv[step.blocks, layer, :, :, step.places] = kv_N2GD.to(step.kv.dtype)

        return run

    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NQ: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
        self._check_rows(qkv_NC, (heads + 2 * kv_heads) * dim)
        self._check_rows(out_NQ, heads * dim)
        row_GPD = self.empty(kv_heads, heads // kv_heads, dim)

        def run(step: _TorchBatch) -> None:
            for row, position in enumerate(step.positions):
                row_GPD.copy_(qkv_NC[row, : heads * dim].view_as(row_GPD))
                k_GLD, v_GLD = _cached(step, layer, row, position + 1)
                scores_GPL = torch.bmm(row_GPD, k_GLD.transpose(1, 2)) * spec.scale
                out_NQ[row] = torch.bmm(torch.softmax(scores_GPL, -1), v_GLD).view(heads * dim)

        return run

    def route(
        self, x_NH: torch.Tensor, gate_EH: torch.Tensor, moe: MoeSpec, ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> Operation:
        """See ComputeBackend."""
        hidden, top_k = x_NH.shape[1], moe.top_k
        self._check_rows(x_NH, hidden)
        self._check(gate_EH, (moe.num_experts, hidden), torch.float32)
        self._check_rows(weights_NK, top_k)
        self._check(ids_NK, (ids_NK.shape[0], top_k), torch.int32)
        row_H = self.empty(hidden)

        def run(n: int) -> None:
            for row, x_H in enumerate(x_NH[:n]):
                logits_E = torch.mv(gate_EH, row_H.copy_(x_H))
                p_E = (logits_E - logits_E.max()).exp()
                best_E, order_E = torch.sort(p_E, descending=True, stable=True)
                chosen_K = best_E[:top_k]
                ids_NK[row] = order_E[:top_k]
                weights_NK[row] = chosen_K / (chosen_K.sum() if moe.norm_topk else p_E.sum())

        return run

    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """See ComputeBackend."""
        width, num_experts = moe.expert_width, moe.num_experts
        for tensor_E, shape in ((w13_E, (2 * width, hidden)), (w2_E, (hidden, width))):
            if tensor_E.shape[0] != num_experts:
                raise ValueError(f"tensor has slots for {tensor_E.shape[0]} experts; must have {num_experts}")
            self._check(tensor_E[0], shape, *_STORED)
        row_H = self.empty(hidden)

        def run(rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
            computed_RH = rows_RH[:num_rows].to(self.device)
            rows = iter(computed_RH)
            for expert, count in enumerate(counts_E[:num_experts].tolist()):
                if count:
                    w13, w2 = w13_E[expert].float(), w2_E[expert].float()
                for _ in range(count):
                    x_H = next(rows)
                    x_H.copy_(_expert(row_H.copy_(x_H), w13, w2))
            self.fence()
            rows_RH[:num_rows].copy_(computed_RH)

        return run

    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Operation:
        """See ComputeBackend."""
        hidden = x_NH.shape[1]
        self._check_rows(x_NH, hidden)
        self._check_rows(out_NH, hidden)
        self._check(w13, (2 * width, hidden), *_STORED)
        self._check(w2, (hidden, width), *_STORED)
        row_H = self.empty(hidden)

        def run(n: int) -> None:
            wide, narrow = w13.float(), w2.float()
            for x_H, out_H in _rows(n, x_NH, out_NH):
                out_H.copy_(_expert(row_H.copy_(x_H), wide, narrow))

        return run

    # ---- other models'

    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOperation:
        """See ComputeBackend."""
        width = kv_NE.shape[1]
        self._check_rows(kv_NE, width)
        self._check_rows(out_NE, width)
        powers = [1]  # by distance

        def run(step: _TorchBatch) -> None:
            kv_N21D = kv_NE[: step.num_rows].view(step.num_rows, 2, 1, width // 2)
            step.kv[step.blocks, layer, :, :, step.places] = kv_N21D
            while len(powers) <= max(step.positions, default=0):
                powers.append(powers[-1] * base % modulus)
            for row, position in enumerate(step.positions):
                factors_L = self._ids(powers[position::-1])
                for at, cached_1LD in enumerate(_cached(step, layer, row, position + 1)):
                    mixed_D = (cached_1LD[0].long() * factors_L[:, None]).sum(0) % modulus
                    out_NE[row, at * width // 2 : (at + 1) * width // 2] = mixed_D

        return run

    # ---- the choice of tokens

    def greatest(self, logits_BV: torch.Tensor) -> list[int]:
        """See ComputeBackend."""
        return torch_sampling.greatest(logits_BV)

    def draw(self, logits_BV: torch.Tensor, row: int, sampling: Sampling, uniform: float) -> int:
        """See ComputeBackend."""
        return torch_sampling.draw(logits_BV[row], sampling, uniform)

    def log_total(self, row_V: torch.Tensor) -> float:
        """See ComputeBackend."""
        return torch_sampling.log_total(row_V)

    def top_tokens(self, row_V: torch.Tensor, count: int) -> list[int]:
        """See ComputeBackend."""
        return torch_sampling.top_tokens(row_V, count)

    # ---- checks

    def _check(self, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Raises ValueError for another shape, dtype or device, or for gaps. Touches no memory."""
        is_here = tensor.device.type == self.device.type
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not is_here or not tensor.is_contiguous():
            raise ValueError(
                f"tensor is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
                f"must be {shape} of {dtypes}, contiguous, on {self.device}"
            )

    def _check_rows(self, tensor_NX: torch.Tensor, width: int) -> None:
        self._check(tensor_NX, (tensor_NX.shape[0], width), torch.float32)


def _rows(n: int, *tensors_NX: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The first n rows of each, side by side."""
    return zip(*(tensor_NX[:n] for tensor_NX in tensors_NX), strict=True)


def _normed(x_H: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    return x_H * torch.rsqrt(x_H.square().mean() + eps) * weight_H


def _expert(x_H: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate_I, up_I = torch.mv(w13, x_H).chunk(2)
    return torch.mv(w2, silu(gate_I.clone()) * up_I)


def _cached(step: _TorchBatch, layer: int, row: int, length: int) -> torch.Tensor:
    """k and v of the row's sequence at its first `length` positions, [2, G, L, D] in float32."""
    read_S2GTD = step.kv[step.tables[row], layer]
    blocks, _, heads, size, dim = read_S2GTD.shape
    read_2GLD = read_S2GTD.permute(1, 2, 0, 3, 4).reshape(2, heads, blocks * size, dim)
    return read_2GLD[:, :, :length].float().contiguous()
