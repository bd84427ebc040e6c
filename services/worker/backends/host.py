"""The compute backend of host devices: the native kernels, which take addresses (native/kernels.pyi).

Addresses are taken when an operation is made; a step passes them on. Token and block ids are checked in the kernels.
Shape suffixes: as in base.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, MoeSpec, RopeSpec
from elasticmoe.native import kernels
from elasticmoe.services.worker.backends.addresses import (
    CODES,
    activations,
    checked,
    float32,
    slot_stride,
    stored,
    stored_pair,
)
from elasticmoe.services.worker.backends.base import BatchOp, ComputeBackend, Op, check_norms
from elasticmoe.services.worker.backends.choice import Chosen, Judged, TokenChoice, apply_edits, edit_fields, mask_row
from elasticmoe.services.worker.backends.kernel_threads import KernelThreads
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.rope import inverse_frequencies
from elasticmoe.services.worker.model.weights import KvCache

_SCORING = {"softmax": kernels.SOFTMAX, "sigmoid": kernels.SIGMOID}


class _HostBatch(NamedTuple):
    """A batch over the mapped blocks, and the addresses of what kernels read of it. Keeps both alive."""

    parts: kernels.Parts
    num_rows: int
    num_logits: int
    token_ids_addr: int
    logit_rows_addr: int
    batch: Batch


class HostBackend(ComputeBackend):
    """See ComputeBackend. Everything is computed at once, and is done when a call returns; its device is the CPU."""

    name = "host"
    _seen: tuple[torch.Tensor, int, kernels.KvView] | None = None  # blocks, number of those that are mapped, their view

    def __init__(
        self,
        tell_waiting: Callable[[bool], None] | None = None,
        device: torch.device = torch.device("cpu"),
        threads: int = 1,
        *,
        rounds: bool = False,
        shares_cores: bool = False,
    ) -> None:
        """See ComputeBackend. `threads`: that compute in this process; what cannot be started is done without.
        `rounds`: what is multiplied by bfloat16 weights is rounded to bfloat16, too. `shares_cores`: the threads become
        more and fewer (`use_threads`), which `computes_by` says instead of their number."""
        super().__init__(tell_waiting, device)
        self._rounds = rounds
        self._threads = KernelThreads(threads, are_shared=shares_cores)

    @property
    def computes_by(self) -> str:
        """See ComputeBackend: the instruction set of the process's kernels, and how many threads it has."""
        return f"{self.name} {self._threads.words}"

    def use_threads(self, count: int) -> None:
        """See ComputeBackend."""
        self._threads.use(count)

    def _synchronize(self) -> None:
        """See ComputeBackend. Nothing is ever in flight."""

    def check_batch(self, batch: Batch, cache: KvCache) -> _HostBatch:
        """See ComputeBackend."""
        parts = kernels.Parts(
            self._view_of(cache),
            batch.num_rows,
            batch.num_parts,
            batch.row_starts.buffer_info()[0],
            batch.kv_lens.buffer_info()[0],
            batch.block_starts.buffer_info()[0],
            batch.blocks.buffer_info()[0],
        )
        token_ids_addr, logit_rows_addr = batch.token_ids.buffer_info()[0], batch.logit_rows.buffer_info()[0]
        return _HostBatch(parts, batch.num_rows, batch.num_logits, token_ids_addr, logit_rows_addr, batch)

    def _view_of(self, cache: KvCache) -> kernels.KvView:
        """The cache as kernels see it. Made where blocks came or went, and kept: asking a tensor takes microseconds."""
        seen = self._seen
        if seen is None or seen[0] is not cache.blocks or seen[1] != cache.num_blocks:
            _, layers, planes, heads, size, width = cache.blocks.shape
            stride, code = cache.geometry.block_stride, CODES[cache.blocks.dtype]
            view = kernels.KvView(cache.base_addr, cache.num_blocks, stride, layers, planes, heads, size, width, code)
            seen = self._seen = (cache.blocks, cache.num_blocks, view)
        return seen[2]

    def _product(self, code: int) -> int:
        """The code of a product with weights of `code`."""
        return kernels.ROUNDED if self._rounds and code == kernels.BFLOAT16 else code

    def _pair(self, w13: torch.Tensor, w2: torch.Tensor, width: int, hidden: int) -> tuple[int, int, int]:
        """Addresses of an expert's weights, and the code of products with them."""
        w13_addr, w2_addr, code = stored_pair(w13, (2 * width, hidden), w2, (hidden, width))
        return w13_addr, w2_addr, self._product(code)

    # ---- a decoder's

    def embed(
        self, table_VH: torch.Tensor, factor: float, out_NH: torch.Tensor, *, first: int = 0, vocab: int = 0
    ) -> BatchOp:
        """See ComputeBackend."""
        held, hidden = table_VH.shape
        table, code = stored(table_VH, held, hidden)
        out, end = activations(out_NH, hidden), vocab or first + held

        def run(step: _HostBatch) -> None:
            kernels.embed(step.token_ids_addr, step.num_rows, table, code, end, hidden, factor, out, first, held)

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
        width, depth = w_WH.shape
        bias = float32(bias_W, width)
        x, out = activations(x_NH, depth), activations(out_NW, width)
        w, code = stored(w_WH, width, depth)
        code = self._product(code)

        def run(n: int) -> None:
            kernels.linear(x, n, w, code, width, depth, out, accumulate, bias)

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
        hidden = x_NH.shape[1]
        x, out, weight = activations(x_NH, hidden), activations(out_NH, hidden), float32(weight_H, hidden)
        delta = 0 if delta_NH is None else activations(delta_NH, hidden)

        def run(n: int) -> None:
            kernels.rms_norm(x, delta, 0, n, hidden, weight, eps, out)

        return run

    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        hidden = x_NH.shape[1]
        x, delta, out = (activations(tensor, hidden) for tensor in (x_NH, delta_NH, out_MH))
        weight = float32(weight_H, hidden)

        def run(step: _HostBatch) -> None:
            if step.num_logits:
                kernels.rms_norm(x, delta, step.logit_rows_addr, step.num_logits, hidden, weight, eps, out)

        return run

    def rope_table(self, rope: RopeSpec, out_ND: torch.Tensor) -> BatchOp:
        """See ComputeBackend."""
        inv_freq, out = inverse_frequencies(rope), activations(out_ND, rope.dims)
        dims, amplitude = rope.dims, rope.amplitude

        def run(step: _HostBatch) -> None:
            kernels.rope_table(step.parts, inv_freq.data_ptr(), dims, amplitude, out)

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
        dim, heads, kv_heads, turned = spec.head_dim, spec.num_heads, spec.num_kv_heads, spec.rope
        qkv, rope = activations(qkv_NC, (heads + 2 * kv_heads) * dim), activations(rope_ND, turned.dims)
        check_norms(spec, norms)
        is_token = spec.qk_norm == "token"
        widths = (heads * dim, kv_heads * dim) if is_token else (dim, dim)
        q_norm, k_norm = (float32(norm, width) for norm, width in zip(norms or (None, None), widths, strict=True))

        def run(step: _HostBatch) -> None:
            kernels.store_kv(
                step.parts,
                layer,
                qkv,
                heads,
                rope,
                turned.dims,
                turned.interleaved,
                q_norm,
                k_norm,
                is_token,
                eps,
                spec.clip,
            )

        return run

    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NO: torch.Tensor) -> BatchOp:
        """See ComputeBackend."""
        dim, heads, scale = spec.head_dim, spec.num_heads, spec.scale
        qkv = activations(qkv_NC, (heads + 2 * spec.num_kv_heads) * dim)
        out = activations(out_NO, heads * dim)

        def run(step: _HostBatch) -> None:
            kernels.attention(step.parts, layer, qkv, heads, scale, out)

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
        heads, nope_dim, turned = spec.num_heads, spec.nope_dim, spec.rope
        q, kv = activations(q_NQ, spec.query_width), activations(kv_NC, spec.kv.width)
        rope, weight = activations(rope_ND, turned.dims), float32(norm, spec.kv_rank)

        def run(step: _HostBatch) -> None:
            kernels.store_latent(
                step.parts, layer, q, heads, nope_dim, kv, rope, turned.dims, turned.interleaved, weight, eps
            )

        return run

    def latent_attention(
        self, spec: LatentAttentionSpec, layer: int, q_NQ: torch.Tensor, kv_b: torch.Tensor, out_NO: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        heads, nope_dim, v_dim, dims, scale = spec.num_heads, spec.nope_dim, spec.v_dim, spec.rope.dims, spec.scale
        q, out = activations(q_NQ, spec.query_width), activations(out_NO, spec.out_width)
        w, code = stored(kv_b, heads * (nope_dim + v_dim), spec.kv_rank)

        def run(step: _HostBatch) -> None:
            kernels.latent_attention(step.parts, layer, q, heads, nope_dim, v_dim, dims, w, code, scale, out)

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
        hidden, num_experts, top_k = x_NH.shape[1], moe.num_experts, moe.top_k
        x, gate = activations(x_NH, hidden), float32(gate_EH, num_experts, hidden)
        bias, weights = float32(bias_E, num_experts), activations(weights_NK, top_k)
        ids = checked(ids_NK, (ids_NK.shape[0], top_k), torch.int32)
        how = (_SCORING[moe.scoring], moe.num_groups, moe.top_groups, moe.norm_topk, moe.scaling)

        def run(n: int) -> None:
            kernels.route(x, n, hidden, gate, bias, num_experts, top_k, *how, ids, weights)

        return run

    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """See ComputeBackend."""
        width, num_experts = moe.expert_width, moe.num_experts
        w13_stride, w2_stride = (slot_stride(tensor_E, num_experts) for tensor_E in (w13_E, w2_E))
        w13, w2, code = self._pair(w13_E[0], w2_E[0], width, hidden)

        def run(rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
            rows, counts = rows_RH.data_ptr(), counts_E.data_ptr()
            kernels.experts(
                rows, num_rows, counts, num_experts, w13, w13_stride, w2, w2_stride, code, hidden, width, rows
            )

        return run

    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Op:
        """See ComputeBackend."""
        hidden = x_NH.shape[1]
        x, out = activations(x_NH, hidden), activations(out_NH, hidden)
        w13_addr, w2_addr, code = self._pair(w13, w2, width, hidden)
        counts = array("i", [0])
        counts_addr = counts.buffer_info()[0]

        def run(n: int) -> None:
            counts[0] = n
            kernels.experts(x, n, counts_addr, 1, w13_addr, 0, w2_addr, 0, code, hidden, width, out)

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
        hidden = x_NH.shape[1]
        x, out, gate = activations(x_NH, hidden), activations(out_NH, hidden), float32(gate_1H, 1, hidden)
        w13_addr, w2_addr, code = self._pair(w13, w2, width, hidden)

        def run(n: int) -> None:
            kernels.shared_experts(x, n, w13_addr, w2_addr, code, hidden, width, gate, out)

        return run

    # ---- other models'

    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOp:
        """See ComputeBackend."""
        kv, out = activations(kv_NE, kv_NE.shape[1]), activations(out_NE, kv_NE.shape[1])

        def run(step: _HostBatch) -> None:
            kernels.oracle_mix(step.parts, layer, kv, modulus, base, out)

        return run

    # ---- the choice of tokens

    def choose(self, logits_BV: torch.Tensor, choices: Sequence[TokenChoice]) -> list[Chosen]:
        """See ComputeBackend. Row by row."""
        vocab = logits_BV.shape[1]
        tokens = kernels.greatest(logits_BV.data_ptr(), *logits_BV.shape)
        for row, choice in enumerate(choices):
            if choice.allowed is not None:
                mask_row(logits_BV[row], choice.allowed)
        judged_V = [logits_BV[row].clone() if choice.num_top >= 0 else None for row, choice in enumerate(choices)]
        fields = {name: torch.from_numpy(values) for name, values in edit_fields(choices, vocab).items()}
        apply_edits(logits_BV, fields)
        chosen = []
        for row, (token, choice, raw_V) in enumerate(zip(tokens, choices, judged_V, strict=True)):
            try:
                is_as_it_was = choice.uniform is None and choice.edits is None and choice.allowed is None
                if token >= 0 and not is_as_it_was:
                    token = _choose(logits_BV[row], choice)
                judged = None if raw_V is None or token < 0 else _judge(raw_V, token, choice.num_top)
                chosen.append(Chosen(token, judged))
            except Exception as error:
                chosen.append(Chosen(-1, None, error))
        return chosen

    def judge(self, logits_NV: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[Judged]:
        """See ComputeBackend."""
        return [_judge(row_V, token, num_top) for row_V, token in zip(logits_NV, tokens, strict=True)]


def _choose(row_V: torch.Tensor, choice: TokenChoice) -> int:
    """The token of a finite row. Raises ValueError for what none can be drawn by."""
    if choice.uniform is None:
        return kernels.greatest(row_V.data_ptr(), 1, len(row_V))[0]
    by = choice.sampling
    return kernels.draw(row_V.data_ptr(), len(row_V), by.temperature, by.top_k, by.top_p, by.min_p, choice.uniform)


def _judge(row_V: torch.Tensor, token: int, num_top: int) -> Judged:
    address, vocab = row_V.data_ptr(), len(row_V)
    best = kernels.top_tokens(address, vocab, num_top)
    own, *others = row_V[[token, *best]].tolist()
    return Judged(kernels.log_total(address, vocab), own, list(zip(best, others, strict=True)))
