"""Causal attention on NPUs by `npu_fused_infer_attention_score`, over copies of the blocks that a step names.

A sequence with one row in the step is decoded: all such rows in one call, with a table of blocks for each. One with
more rows has calls of its own, with the vendor's triangular mask, which lies at the last key of the last query. Of
latents a call takes at most LATENT_ROWS rows. All lengths stay on the host, where the operator wants them.

Shape suffixes: S sequences, X heads, Y elements of a head, B blocks, N rows.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch
from elasticmoe.services.worker.backends.accelerator.kernels import PagedAttention
from elasticmoe.services.worker.backends.accelerator.npu_kernels.cache import Read, read_layer
from elasticmoe.services.worker.backends.sent_fields import SentFields

LATENT_HEADS: Final = (32, 64, 128)
LATENT_ROWS: Final = 16
MASK: Final = 2048  # rows and columns of the triangle that the vendor asks for with CAUSAL
CAUSAL, NO_MASK = 3, 0  # sparse_mode


class _Decoded(NamedTuple):
    """The sequences with one row: `table` int32 [S, most blocks of one] into all blocks that the step names, `rows`
    int32 [S], or None where these are all rows; `lengths` of their keys."""

    table: torch.Tensor
    rows: torch.Tensor | None
    lengths: list[int]


class _Chunk(NamedTuple):
    """Consecutive rows of one sequence, the number of keys up to the last of them, and its blocks."""

    first: int
    end: int
    length: int
    blocks: slice


class _Calls(NamedTuple):
    decoded: _Decoded | None
    chunks: list[_Chunk]


class FusedAttention:
    """Owns the mask."""

    def __init__(self, device: torch.device) -> None:
        self._mask = torch.ones((MASK, MASK), dtype=torch.bool, device=device).triu_(1)

    def attend(self, attention: PagedAttention, step: AcceleratorBatch) -> None:
        """See Kernels."""
        if not step.num_rows:
            return
        read, is_latent = read_layer(step, attention.layer), step.kv.shape[2] == 1
        calls = _calls_of(step, LATENT_ROWS if is_latent else step.num_rows)
        call = self._latent if is_latent else self._grouped
        q_NXY = attention.q[: step.num_rows].to(step.kv.dtype)
        if calls.decoded is not None:
            rows = calls.decoded.rows
            q_SXY = q_NXY if rows is None else q_NXY.index_select(0, rows)
            out_SXY = call(attention, q_SXY[:, :, None], read, calls.decoded.lengths, calls.decoded.table)
            if rows is None:
                attention.out[: step.num_rows] = out_SXY[:, :, 0]
            else:
                attention.out.index_copy_(0, rows.long(), out_SXY[:, :, 0].float())
        for first, end, length, blocks in calls.chunks:
            q_1XNY = q_NXY[first:end].transpose(0, 1)[None].contiguous()
            keys = Read(read.keys[blocks], read.values[blocks])
            attention.out[first:end] = call(attention, q_1XNY, keys, [length], None)[0].transpose(0, 1)

    def _grouped(
        self, attention: PagedAttention, q: torch.Tensor, read: Read, lengths: list[int], table: torch.Tensor | None
    ) -> torch.Tensor:
        """q [S, X, rows, Y]; without a table all blocks are those of the only sequence."""
        heads, kv_heads, block_size = q.shape[1], read.keys.shape[1], read.keys.shape[2]
        options: dict[str, Any] = {"num_heads": heads, "num_key_value_heads": kv_heads, "scale": attention.scale}
        if table is None:
            # One after another: pages would have to have 128 tokens here.
            keys, values = (part.transpose(0, 1).reshape(1, kv_heads, -1, part.shape[3]) for part in read)
            options |= {"atten_mask": self._mask, "sparse_mode": CAUSAL, "actual_seq_lengths": [q.shape[2]]}
        else:
            keys, values = read
            options |= {"block_table": table, "block_size": block_size, "sparse_mode": NO_MASK}
        return _fused(q, keys, values, actual_seq_lengths_kv=lengths, **options)

    def _latent(
        self, attention: PagedAttention, q: torch.Tensor, read: Read, lengths: list[int], table: torch.Tensor | None
    ) -> torch.Tensor:
        """As `_grouped`, of latents, which are keys and values, and the shared keys behind them."""
        heads, rank = q.shape[1], attention.value_width
        padded = next(count for count in LATENT_HEADS if count >= heads)
        q = pad(q, (0, 0, 0, 0, 0, padded - heads))
        latents, shared = read.keys[..., :rank].contiguous(), read.keys[..., rank:].contiguous()
        options: dict[str, Any] = {"num_heads": padded, "num_key_value_heads": 1, "scale": attention.scale}
        if table is None:
            table = torch.arange(len(latents), dtype=torch.int32, device=q.device)[None]
            options["actual_seq_lengths"] = [q.shape[2]]
        options |= {"sparse_mode": CAUSAL, "atten_mask": self._mask} if q.shape[2] > 1 else {"sparse_mode": NO_MASK}
        out = _fused(
            q[..., :rank].contiguous(),
            latents,
            latents,
            query_rope=q[..., rank:].contiguous(),
            key_rope=shared,
            actual_seq_lengths_kv=lengths,
            block_table=table,
            block_size=latents.shape[2],
            **options,
        )
        return out[:, :heads]


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(query, key, value, input_layout="BNSD", **options)
    taken: torch.Tensor = out
    return taken


def _calls_of(step: AcceleratorBatch, rows_max: int) -> _Calls:
    """How the step's sequences are called, with at most `rows_max` rows of one."""

    def make(fields: SentFields) -> _Calls:
        counts = np.diff(step.row_starts)
        singles = np.flatnonzero(counts == 1)
        chunks = [
            _Chunk(first, min(first + rows_max, end), length - (end - min(first + rows_max, end)), slice(begin, until))
            for end, count, length, begin, until in zip(
                step.row_starts[1:].tolist(),
                counts.tolist(),
                step.kv_lens.tolist(),
                step.block_starts[:-1].tolist(),
                step.block_starts[1:].tolist(),
                strict=True,
            )
            if count > 1
            for first in range(end - count, end, rows_max)
        ]
        if not len(singles):
            return _Calls(None, chunks)
        num_blocks = np.diff(step.block_starts)[singles]
        table = step.block_starts[:-1][singles][:, None] + np.minimum(
            np.arange(num_blocks.max())[None, :], num_blocks[:, None] - 1
        )
        rows = step.row_starts[:-1][singles]
        sent = fields.send({"table": table.reshape(-1).astype(np.int32), "rows": rows})
        lengths = step.kv_lens[singles].tolist()
        are_all = len(singles) == step.num_rows
        return _Calls(_Decoded(sent["table"].view(table.shape), None if are_all else sent["rows"], lengths), chunks)

    return step.once("attention", rows_max, make)
