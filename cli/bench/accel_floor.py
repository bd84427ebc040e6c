"""The least that a step of decoding can take: the bytes that it has to read, at the device's bandwidth. Pure."""

from __future__ import annotations

from typing import NamedTuple

from elasticmoe.common.families import record
from elasticmoe.common.model_spec import DTYPE_BYTES, ModelSpec, RecordKey


class StepBytes(NamedTuple):
    """What a step reads. `dense`: weights that every token takes; `experts`: those of the experts that are chosen;
    `kv`: of the tokens before."""

    dense: float
    experts: float
    kv: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.dense + self.experts + self.kv


def chosen_experts(num_experts: int, top_k: int, batch: int) -> float:
    """How many experts of a layer `batch` tokens choose between them, as is to be expected where each token's choice is
    any `top_k` of them, as likely as any other."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** batch)


def step_bytes(spec: ModelSpec, batch: int, context: float) -> StepBytes:
    """Of a step of one rank that has the whole model, with `batch` sequences of `context` tokens each."""
    base = record(spec, RecordKey("base"))
    embed = base.tensor("embed")
    dense = float(sum(tensor.nbytes for tensor in base.tensors))
    if not spec.tie_embeddings:  # of the embedding, a row for each token; a tied one is read whole, as the head
        dense -= embed.nbytes - min(batch, spec.vocab) * embed.nbytes / spec.vocab
    experts = 0.0
    for layer, num_experts in enumerate(spec.num_experts_by_layer):
        dense += sum(tensor.nbytes for tensor in record(spec, RecordKey("layer", layer)).tensors)
        if num_experts:
            one = sum(tensor.nbytes for tensor in record(spec, RecordKey("expert", layer, 0)).tensors)
            experts += one * chosen_experts(num_experts, spec.moe.top_k, batch)
    return StepBytes(dense, experts, batch * context * kv_token_bytes(spec))


def kv_token_bytes(spec: ModelSpec) -> int:
    """What a token leaves in the KV cache of all layers."""
    return spec.num_layers * spec.rank_attention.kv.elements * DTYPE_BYTES[spec.dtype]


def copied_sizes(spec: ModelSpec, num_experts: int) -> list[int]:
    """Bytes of the records that a device gets with its first replica and so many experts."""
    keys = [RecordKey("base"), *(RecordKey("layer", layer) for layer in range(spec.num_layers))]
    first = next((layer for layer, count in enumerate(spec.num_experts_by_layer) if count), None)
    expert = [] if first is None else [record(spec, RecordKey("expert", first, 0)).nbytes] * num_experts
    return [record(spec, key).nbytes for key in keys] + expert
