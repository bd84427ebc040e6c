"""What backends have in common that compute with torch's tensors: where they compute, and what they take.

Shape suffixes: as in base.py; X any width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, MoeSpec
from elasticmoe.services.worker.backends import torch_sampling
from elasticmoe.services.worker.backends.base import ComputeBackend, check_norms
from elasticmoe.services.worker.backends.choice import Chosen, Judged, Numbers, TokenChoice

STORED: Final = (torch.float32, torch.bfloat16)
_SENT: Final = {np.dtype(str(dtype).removeprefix("torch.")): dtype for dtype in torch_sampling.SENT}


class TensorBackend(ComputeBackend):
    """See ComputeBackend. `device`: any that torch computes on. `sampler`: a backend of the host's, which draws and
    judges rows of a device that has no float64; whoever opens a backend on one gives it."""

    sampler: ComputeBackend | None = None

    def __init__(
        self, tell_waiting: Callable[[bool], None] | None = None, device: torch.device = torch.device("cpu")
    ) -> None:
        """See ComputeBackend."""
        super().__init__(tell_waiting, device)
        self._host_words = torch.empty(0, dtype=torch.int32)

    def _synchronize(self) -> None:
        """See ComputeBackend. All that a rank computes is queued on this thread's stream. Others of the device are not
        waited for: there a group's members connect (exchange/groups.py), which may take until a peer has come."""
        torch.get_device_module(self.device).current_stream(self.device).synchronize()

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

    def _check_norm(self, weight_H: torch.Tensor, *rows_NH: torch.Tensor) -> None:
        self._check(weight_H, (rows_NH[0].shape[1],), torch.float32)
        for tensor_NH in rows_NH:
            self._check_rows(tensor_NH, rows_NH[0].shape[1])

    def _check_linear(
        self, x_NH: torch.Tensor, w_WH: torch.Tensor, out_NW: torch.Tensor, bias_W: torch.Tensor | None
    ) -> None:
        width, depth = w_WH.shape
        self._check(w_WH, (width, depth), *STORED)
        self._check_rows(x_NH, depth)
        self._check_rows(out_NW, width)
        if bias_W is not None:
            self._check(bias_W, (width,), torch.float32)

    def _check_feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> None:
        hidden = x_NH.shape[1]
        self._check_rows(x_NH, hidden)
        self._check_rows(out_NH, hidden)
        self._check(w13, (2 * width, hidden), *STORED)
        self._check(w2, (hidden, width), *STORED)

    def _check_store_kv(
        self,
        spec: AttentionSpec,
        qkv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self._check_rows(qkv_NC, spec.query_width + spec.kv.elements)
        self._check_rows(rope_ND, spec.rope.dims)
        check_norms(spec, norms)
        heads = (spec.num_heads, spec.num_kv_heads) if spec.qk_norm == "token" else (1, 1)
        for norm, num_heads in zip(norms or (), heads, strict=False):
            self._check(norm, (num_heads * spec.head_dim,), torch.float32)

    def _check_attention(self, spec: AttentionSpec, qkv_NC: torch.Tensor, out_NO: torch.Tensor) -> None:
        self._check_rows(qkv_NC, spec.query_width + spec.kv.elements)
        self._check_rows(out_NO, spec.out_width)

    def _check_store_latent(
        self,
        spec: LatentAttentionSpec,
        q_NQ: torch.Tensor,
        kv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norm: torch.Tensor,
    ) -> None:
        self._check_rows(q_NQ, spec.query_width)
        self._check_rows(kv_NC, spec.kv.width)
        self._check_rows(rope_ND, spec.rope.dims)
        self._check(norm, (spec.kv_rank,), torch.float32)

    def _check_latent_attention(
        self, spec: LatentAttentionSpec, q_NQ: torch.Tensor, kv_b: torch.Tensor, out_NO: torch.Tensor
    ) -> None:
        self._check_rows(q_NQ, spec.query_width)
        self._check_rows(out_NO, spec.out_width)
        self._check(kv_b, (spec.num_heads * (spec.nope_dim + spec.v_dim), spec.kv_rank), *STORED)

    def _check_route(
        self,
        x_NH: torch.Tensor,
        gate_EH: torch.Tensor,
        bias_E: torch.Tensor | None,
        moe: MoeSpec,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> None:
        hidden = x_NH.shape[1]
        self._check_rows(x_NH, hidden)
        self._check(gate_EH, (moe.num_experts, hidden), torch.float32)
        if bias_E is not None:
            self._check(bias_E, (moe.num_experts,), torch.float32)
        self._check_rows(weights_NK, moe.top_k)
        self._check(ids_NK, (ids_NK.shape[0], moe.top_k), torch.int32)

    def _check_experts(self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int) -> None:
        width = moe.expert_width
        for tensor_E, shape in ((w13_E, (2 * width, hidden)), (w2_E, (hidden, width))):
            if tensor_E.shape[0] != moe.num_experts:
                raise ValueError(f"tensor has slots for {tensor_E.shape[0]} experts; must have {moe.num_experts}")
            self._check(tensor_E[0], shape, *STORED)

    # ---- the choice of tokens

    def choose(self, logits_BV: torch.Tensor, choices: Sequence[TokenChoice]) -> list[Chosen]:
        """See ComputeBackend. One wait, whatever the number of rows is; and one transfer each way where the device has
        float64."""
        if self.has_float64:
            return torch_sampling.choose(logits_BV, choices, self._send_fields, self._fetch_words)
        return torch_sampling.choose_on_host(logits_BV, choices, self._send_fields, self._fetch, self._on_host())

    def judge(self, logits_NV: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[Judged]:
        """See ComputeBackend. One transfer each way, and one wait."""
        if self.has_float64:
            return torch_sampling.judge(logits_NV, tokens, num_top, self._send_fields, self._fetch_words)
        (rows_NV,) = self._fetch(logits_NV)
        return self._on_host().judge(rows_NV, tokens, num_top)

    def _on_host(self) -> ComputeBackend:
        if self.sampler is None:
            raise RuntimeError(f"{self.device} has no float64, and there is no sampler on the host")
        return self.sampler

    def _send_fields(self, fields: Mapping[str, Numbers]) -> dict[str, torch.Tensor]:
        """Copies on the device, once what is queued is done. Each send is followed by a fetch before the next one. The
        widest numbers lie first: all lie at multiples of their size."""
        fields = dict(sorted(fields.items(), key=lambda field: -field[1].itemsize))
        lengths = [values.nbytes // 4 for values in fields.values()]
        host = self._words(sum(lengths))
        np.concatenate([values.view(np.int32) for values in fields.values()], out=host.numpy())
        sent = torch.split(host.to(self.device, non_blocking=True), lengths)
        return {
            name: words.view(_SENT[values.dtype]) for (name, values), words in zip(fields.items(), sent, strict=True)
        }

    def _fetch_words(self, words: torch.Tensor) -> npt.NDArray[np.int32]:
        """Blocks until they are there."""
        host = self._words(len(words)).copy_(words, non_blocking=True)
        self.fence()
        return host.numpy().copy()

    def _fetch(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies in the host's memory. Blocks until they are there."""
        is_pinned = self.device.type != "cpu"
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned) for tensor in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.fence()
        return copies

    def _words(self, count: int) -> torch.Tensor:
        """Of the host's memory, 4 bytes each, which transfers need not stage. Each call's are the same: the device
        takes and gives in its order."""
        if count > len(self._host_words):
            self._host_words = torch.empty(count, dtype=torch.int32, pin_memory=self.device.type != "cpu")
        return self._host_words[:count]


def looked_up(table_VH: torch.Tensor, token_ids_N: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """The tokens' rows of a table that has those from `first` on of the `end` that there are: zeros for others."""
    held = table_VH.shape[0]
    if held == end:
        return table_VH.index_select(0, token_ids_N)
    at_N = token_ids_N - first
    is_held_N = (at_N >= 0) & (at_N < held)
    rows_NH = table_VH.index_select(0, at_N.clamp(0, held - 1))
    return torch.where(is_held_N[:, None], rows_NH, 0)
