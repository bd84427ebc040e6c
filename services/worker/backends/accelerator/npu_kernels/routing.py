"""The choice of experts for all rows at once, in torch's own operations, which sort stably.

Shape suffixes: N rows, E experts, K experts per token, G groups.
"""

from __future__ import annotations

import torch

from elasticmoe.common.model_spec import MoeSpec


def route_rows(logits_NE: torch.Tensor, bias_E: torch.Tensor | None, moe: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """See ComputeBackend.route: ids [N, K], best first, and their weights."""
    is_softmax = moe.scoring == "softmax"
    # A softmax is divided by its sum only where that matters.
    scores_NE = (logits_NE - logits_NE.amax(1, keepdim=True)).exp() if is_softmax else logits_NE.sigmoid()
    if is_softmax and bias_E is not None:
        scores_NE = scores_NE / scores_NE.sum(1, keepdim=True)
    choice_NE = scores_NE if bias_E is None else scores_NE + bias_E
    choice_NE = torch.where(choice_NE.isnan(), -torch.inf, choice_NE)
    order_NE = torch.sort(choice_NE, dim=1, descending=True, stable=True).indices
    if moe.num_groups > 1:
        size = moe.num_experts // moe.num_groups
        best_NG = choice_NE.view(len(logits_NE), moe.num_groups, size).topk(1 if is_softmax else 2, 2).values.sum(2)
        groups = torch.sort(best_NG, dim=1, descending=True, stable=True).indices[:, : moe.top_groups]
        may_come_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter_(1, groups, value=True)
        comes_NE = may_come_NG.gather(1, order_NE // size)
        # Those of the groups first, in their order.
        order_NE = order_NE.gather(1, torch.sort(~comes_NE, dim=1, stable=True).indices)
    ids_NK = order_NE[:, : moe.top_k]
    weights_NK = scores_NE.gather(1, ids_NK)
    if moe.norm_topk:
        weights_NK = weights_NK / (weights_NK.sum(1, keepdim=True) + (0.0 if is_softmax else 1e-20))
    elif is_softmax:
        weights_NK = weights_NK / scores_NE.sum(1, keepdim=True)
    return ids_NK.int(), weights_NK * moe.scaling
