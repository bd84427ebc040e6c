"""The choice of experts: one program for each row, over its scores as [groups, experts of a group]."""

from __future__ import annotations

import triton
import triton.language as tl

from elasticmoe.services.worker.backends.accelerator.triton_kernels.products import sigmoid


@triton.jit
def route_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    scaling: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Ids [N, K] and weights [N, K] of the best experts of the best groups, best first, of equals the lower id first.
    NaN is less than all, so that ids are distinct all the same. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group, member = tl.arange(0, BLOCK_GROUPS)[:, None], tl.arange(0, BLOCK_SIZE)[None, :]
    expert = group * size + member
    may_come = (group < NUM_GROUPS) & (member < size)
    logit = tl.load(logits + row * NUM_EXPERTS + expert, mask=may_come, other=float("-inf"))
    if IS_SOFTMAX:
        greatest = tl.max(tl.where(logit == logit, logit, float("-inf")))
        score = tl.exp(logit - tl.where(greatest == float("-inf"), 0.0, greatest))
        all_scores = tl.sum(score)
        choice = score / all_scores if HAS_BIAS else score
    else:
        score = tl.where(may_come, sigmoid(logit), 0.0)
        choice = score
    if IS_SOFTMAX and HAS_BIAS:
        score = choice  # divided, as the choice is
        all_scores = tl.sum(tl.where(may_come, score, 0.0))
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=may_come, other=0.0)
    choice = tl.where(choice == choice, choice, float("-inf"))
    if NUM_GROUPS > 1:
        choice_of_all = tl.where(may_come, choice, float("-inf"))
        best = tl.max(choice_of_all, 1)
        if not IS_SOFTMAX:  # the two best together
            first = tl.min(tl.where(choice_of_all == best[:, None], expert, NUM_EXPERTS), 1)
            best += tl.max(tl.where(expert == first[:, None], float("-inf"), choice_of_all), 1)
        groups = tl.arange(0, BLOCK_GROUPS)
        is_left, is_taken = groups < NUM_GROUPS, groups < 0
        for _ in range(TOP_GROUPS):
            top = tl.max(tl.where(is_left, best, float("-inf")))
            taken = tl.min(tl.where(is_left & (best == top), groups, BLOCK_GROUPS))
            is_taken, is_left = is_taken | (groups == taken), is_left & (groups != taken)
        may_come = may_come & is_taken[:, None]
    number = tl.arange(0, BLOCK_K)
    ids_K, weights_K = tl.zeros((BLOCK_K,), dtype=tl.int32), tl.zeros((BLOCK_K,), dtype=tl.float32)
    total = 0.0
    for k in range(TOP_K):
        top = tl.max(tl.where(may_come, choice, float("-inf")))
        best_id = tl.min(tl.where(may_come & (choice == top), expert, NUM_EXPERTS))
        weight = tl.sum(tl.where(expert == best_id, score, 0.0))
        ids_K, weights_K = tl.where(number == k, best_id, ids_K), tl.where(number == k, weight, weights_K)
        total += weight
        may_come = may_come & (expert != best_id)
    if NORMALIZES:
        weights_K = weights_K / (total if IS_SOFTMAX else total + 1e-20)
    elif IS_SOFTMAX:
        weights_K = weights_K / all_scores
    tl.store(ids + row * TOP_K + number, ids_K, mask=number < TOP_K)
    tl.store(weights + row * TOP_K + number, weights_K * scaling, mask=number < TOP_K)
