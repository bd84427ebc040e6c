"""A new rank's step alone, before it steps with the others."""

from __future__ import annotations

import torch

from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.services.worker.backends.answers import WeightedSum
from elasticmoe.services.worker.engine.kv_bytes import read_blocks, write_blocks
from elasticmoe.services.worker.exchange.alone import Alone
from elasticmoe.services.worker.hmm.memory import RankMemory
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from elasticmoe.services.worker.model.registry import Model

WARM_UP_TOKENS = 4


def warm_up(model: Model, memory: RankMemory, device: torch.device, rows_max: int) -> None:
    """Compute one step alone, so that the first one with the others finds page tables, buffers and code in place. Who
    is waited for does without it: its first step maps what that step needs.

    Every held expert gets a row. Tokens of its own only where no sequence of a predecessor may have its KV in the block
    that they use, and what was there comes back: a follower cannot tell. `device`: where the exchange has its rows;
    `rows_max`: of a step that only decodes.
    """
    block_size, spec = memory.kv.geometry.block_size, memory.spec
    alone = Alone(memory.held, max(spec.num_experts_by_layer), spec.hidden, device)
    _sum_answers(model, spec, device)
    if memory.ledger.rows() or not memory.kv.num_blocks or memory.weights.shard.index:
        model.forward(Batch([], block_size), alone)
        return
    before = read_blocks(memory.kv, [0])
    tokens = [0] * min(WARM_UP_TOKENS, block_size)
    model.forward(Batch([BatchPart(tokens, 0, [0], 1)], block_size), alone)
    alone = Alone([()] * spec.num_layers, max(spec.num_experts_by_layer), spec.hidden, device)
    with model.backend.warming_up(rows_max) as rows:
        for count in rows:
            for _ in range(2):
                model.forward(Batch([BatchPart([0], 0, [0], 1)] * count, block_size), alone)
    write_blocks(memory.kv, [0], before)


def _sum_answers(model: Model, spec: ModelSpec, device: torch.device) -> None:
    """What an exchange does with answers that come to where the backend computes; `Alone` has none."""
    top_k, backend = spec.moe.top_k, model.backend
    if device != backend.device:
        return
    answers_RH, out_NH = (torch.zeros((1, spec.hidden), device=device) for _ in range(2))
    at_P, weights_NK = (torch.zeros(top_k, dtype=torch.int32, device=device), torch.zeros((1, top_k), device=device))
    backend.weighted_sum(WeightedSum(answers_RH, at_P, weights_NK, out_NH, True), 1)
