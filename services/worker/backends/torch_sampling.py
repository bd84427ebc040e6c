"""The choice of tokens of the torch backend, with the native kernels' rules (native/src/kernels/sampling.cpp).

A row is copied before it is summed or exponentiated, so that its place among others changes no bit. Shape suffixes: as
in base.py.
"""

from __future__ import annotations

import torch

from elasticmoe.common.protocol.rank import Sampling

_TEMPERATURES = (1e-6, 1e6)


def greatest(logits_BV: torch.Tensor) -> list[int]:
    """See ComputeBackend."""
    vocab = logits_BV.shape[1]
    finite_B = torch.isfinite(logits_BV).all(1)
    ids_V = torch.arange(vocab, device=logits_BV.device)
    # argmax may take any of equals.
    best_B = torch.where(logits_BV == logits_BV.amax(1, keepdim=True), ids_V, vocab).amin(1)
    return torch.where(finite_B, best_B, -1).tolist()


def draw(row_V: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """See ComputeBackend."""
    low, high = _TEMPERATURES
    if not low <= sampling.temperature <= high or sampling.top_k < 0:
        raise ValueError(f"temperature {sampling.temperature} must be {low:g} to {high:g}, top_k at least 0")
    if not (0 <= sampling.top_p <= 1 and 0 <= sampling.min_p <= 1 and 0 <= uniform < 1):
        raise ValueError(f"top_p {sampling.top_p}, min_p {sampling.min_p}, uniform {uniform} must be 0 to 1")
    row_V = row_V.clone()
    if not bool(torch.isfinite(row_V).all()):
        return -1
    weights_V = _exponentials(row_V, 1.0 / sampling.temperature)
    weights_V[weights_V < sampling.min_p] = 0.0
    if 0 < sampling.top_k < len(weights_V) or sampling.top_p < 1:
        weights_V = _greatest_only(weights_V, sampling.top_k or len(weights_V), sampling.top_p)
    ends_V = weights_V.double().cumsum(0)
    token = int(torch.searchsorted(ends_V, uniform * ends_V[-1], right=True))
    has_share = weights_V.nonzero()[:, 0]
    return min(token, int(has_share[-1]))  # rounding may carry it past the end


def log_total(row_V: torch.Tensor) -> float:
    """See ComputeBackend."""
    row_V = row_V.clone()
    if not bool(torch.isfinite(row_V).all()):
        return float("nan")
    return float(row_V.max().double() + _exponentials(row_V, 1.0).double().sum().log())


def top_tokens(row_V: torch.Tensor, count: int) -> list[int]:
    """See ComputeBackend."""
    order_V = torch.sort(row_V, descending=True, stable=True).indices
    return order_V[:count].tolist()


def _exponentials(row_V: torch.Tensor, factor: float) -> torch.Tensor:
    """Weights relative to the greatest logit's, which has 1."""
    shifted_V = (row_V - row_V.max()) * factor
    return torch.where(shifted_V < -87.0, 0.0, shifted_V.exp())


def _greatest_only(weights_V: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The `top_k` greatest, and of these the fewest that make up `top_p` of them, one at least; others become 0. Of
    equals the lower ids stay."""
    sorted_V, order_V = torch.sort(weights_V, descending=True, stable=True)
    sorted_V[top_k:] = 0.0
    if top_p < 1:
        sums_V = sorted_V.double().cumsum(0)
        num_kept = int(torch.searchsorted(sums_V, top_p * sums_V[-1])) + 1
        sorted_V[num_kept:] = 0.0
    return torch.zeros_like(weights_V).scatter_(0, order_V, sorted_V)
