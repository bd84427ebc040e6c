"""The sum of what experts have answered for a token, by torch's operations.

Shape suffixes: R rows of answers, H hidden, N tokens, K experts per token, P = N x K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class WeightedSum(NamedTuple):
    """out[t] = sum over k of weights[t, k] * answers[at[t * K + k]]. `at_P` is int32, and below 0 where a token does
    not have that choice, which adds 0; `is_whole`: each token has all."""

    answers_RH: torch.Tensor
    at_P: torch.Tensor
    weights_NK: torch.Tensor
    out_NH: torch.Tensor
    is_whole: bool


def add_up(total: WeightedSum, n: int) -> None:
    """See ComputeBackend.weighted_sum."""
    answers_RH, at_P, weights_NK, out_NH, is_whole = total
    if not n:
        return
    top_k = weights_NK.shape[1]
    at_P = at_P[: n * top_k]
    rows_PH = answers_RH.index_select(0, at_P if is_whole else at_P.clamp(min=0))
    products_NKH = rows_PH.view(n, top_k, -1).mul_(weights_NK[:n, :, None])
    if not is_whole:
        products_NKH.masked_fill_((at_P < 0).view(n, top_k, 1), 0.0)
    torch.add(products_NKH[:, 0], 0.0, out=out_NH[:n])
    for k in range(1, top_k):
        out_NH[:n].add_(products_NKH[:, k])
