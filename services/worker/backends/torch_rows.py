"""What the torch backend computes for one row, and rows of tensors.

Shape suffixes: as in torch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import silu

from elasticmoe.common.model_spec import MoeSpec, RopeSpec


def first_rows(n: int, *tensors_NX: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The first n rows of each, side by side."""
    return zip(*(tensor_NX[:n] for tensor_NX in tensors_NX), strict=True)


def normed(x_H: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight."""
    return x_H * torch.rsqrt(x_H.square().mean() + eps) * weight_H


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """What is multiplied by weights, where nothing is rounded."""
    return tensor


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """To bfloat16 and back: to nearest, ties to even."""
    return tensor.bfloat16().float()


def feed_forward_row(
    x_H: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, taken: Callable[[torch.Tensor], torch.Tensor] = as_it_is
) -> torch.Tensor:
    """w2 · (silu(gate) * up), gate and up the halves of w13 · x, each side of a product as it is `taken`."""
    gate_I, up_I = torch.mv(w13, taken(x_H)).chunk(2)
    return torch.mv(w2, taken(silu(gate_I.clone()) * up_I))


def rotate(turned_NXD: torch.Tensor, rope_N1D: torch.Tensor, rope: RopeSpec) -> None:
    """Rotate pairs of elements in place."""
    half = rope.dims // 2
    cosine, sine = rope_N1D[..., :half], rope_N1D[..., half:]
    if rope.interleaved:
        first, second = turned_NXD[..., 0::2], turned_NXD[..., 1::2]
    else:
        first, second = turned_NXD[..., :half], turned_NXD[..., half:]
    a, b = first.clone(), second.clone()
    first.copy_(a * cosine - b * sine)
    second.copy_(b * cosine + a * sine)


def routed(logits_E: torch.Tensor, bias_E: torch.Tensor | None, moe: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's experts, best first, and their weights."""
    is_softmax = moe.scoring == "softmax"
    # A softmax is divided by its sum only where that matters.
    scores_E = (logits_E - logits_E.max()).exp() if is_softmax else logits_E.sigmoid()
    if is_softmax and bias_E is not None:
        scores_E = scores_E / scores_E.sum()
    choice_E = scores_E if bias_E is None else scores_E + bias_E
    order_E = torch.sort(choice_E, descending=True, stable=True).indices
    if moe.num_groups > 1:
        best_of_G = choice_E.view(moe.num_groups, -1).topk(1 if is_softmax else 2).values.sum(1)
        groups = torch.sort(best_of_G, descending=True, stable=True).indices[: moe.top_groups]
        order_E = order_E[torch.isin(order_E // (moe.num_experts // moe.num_groups), groups)]
    ids_K = order_E[: moe.top_k]
    weights_K = scores_E[ids_K]
    if moe.norm_topk:
        weights_K = weights_K / (weights_K.sum() if is_softmax else weights_K.sum() + 1e-20)
    elif is_softmax:
        weights_K = weights_K / scores_E.sum()
    return ids_K, weights_K * moe.scaling
