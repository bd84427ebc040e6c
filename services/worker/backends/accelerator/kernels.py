"""The kernels that differ by vendor, as the accelerator backend asks for them.

All are queued and none waits. N is the number of rows to compute; tensors may have more. A row's result depends on that
row, its KV and the weights alone, bit by bit (ADR 33).

Shape suffixes: as in base.py; X heads, Y elements of a head, P planes x heads of the cache, T tiles.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from elasticmoe.common.model_spec import MoeSpec


class Queries(NamedTuple):
    """What attention reads of a step: `tiles` int32 [T, 4] first row, rows, first position and where the sequence's
    blocks begin in `block_ids`; `positions` int32 [N]; `longest`: tokens of the longest sequence; `first_rows`: the
    tiles' first rows, and N, for the host."""

    tiles: torch.Tensor
    block_ids: torch.Tensor
    positions: torch.Tensor
    num_rows: int
    longest: int
    first_rows: list[int]


class Kernels(Protocol):
    """One vendor's."""

    name: str
    rows_per_tile: int
    """Of a group of rows that meet the same expert's weights."""

    def queries_per_tile(self, heads_per_kv: int, planes: int) -> int:
        """How many positions of a sequence one tile of attention holds, for a cache of so many planes."""

    def product(
        self,
        x_NH: torch.Tensor,
        w_WH: torch.Tensor,
        out_NW: torch.Tensor,
        n: int,
        *,
        bias_W: torch.Tensor | None = None,
        row_gate_N: torch.Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        """out (+)= (x · w + bias), of each row times the sigmoid of its gate, where there is one."""

    def gated_product(self, x_NH: torch.Tensor, w13: torch.Tensor, out_NI: torch.Tensor, n: int) -> None:
        """out = silu(x · w1) * (x · w3), the halves of w13."""

    def head_products(self, x_NXY: torch.Tensor, w_XWY: torch.Tensor, out_NXW: torch.Tensor, n: int) -> None:
        """out = x · w for each head by itself; `w` of any strides."""

    def expert_products(
        self, x_RH: torch.Tensor, w_EWH: torch.Tensor, out_RW: torch.Tensor, tiles_T3: torch.Tensor, *, gated: bool
    ) -> None:
        """out = x · w of each row's expert, or as `gated_product`. Tiles: expert, first row, end. Slots that
        no tile names are not touched."""

    def norm(
        self,
        x_NXY: torch.Tensor,
        delta_NXY: torch.Tensor | None,
        weight_Y: torch.Tensor,
        eps: float,
        out_NXY: torch.Tensor,
        n: int,
        *,
        rows_N: torch.Tensor | None = None,
        keeps_sum: bool = False,
    ) -> None:
        """out = x / rms(x) * weight over the last dimension, x + delta for x where there is one, which x becomes where
        `keeps_sum`. Row `i` is of row `rows[i]` of x."""

    def rope_table(
        self, positions_N: torch.Tensor, frequencies: torch.Tensor, amplitude: float, out_ND: torch.Tensor, n: int
    ) -> None:
        """out = cosines, then sines of each row's position."""

    def rotate(self, x_NXD: torch.Tensor, table_ND: torch.Tensor, n: int, *, interleaved: bool) -> None:
        """Rotate pairs in place."""

    def store(
        self, x_NPW: torch.Tensor, cache: torch.Tensor, blocks_N: torch.Tensor, places_N: torch.Tensor, n: int
    ) -> None:
        """Write each row to its place in its block of `cache` [blocks, planes, heads, block_size, width]."""

    def attend(
        self,
        q_NXY: torch.Tensor,
        cache: torch.Tensor,
        value_width: int,
        scale: float,
        queries: Queries,
        out: torch.Tensor,
    ) -> None:
        """out [N, X, value_width] = causal attention of the queries to the cache. Keys are in plane 0; values in plane
        1, or the first `value_width` elements of the keys where there is one plane."""

    def route(
        self,
        logits_NE: torch.Tensor,
        bias_E: torch.Tensor | None,
        moe: MoeSpec,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        n: int,
    ) -> None:
        """See ComputeBackend.route; from logits."""
