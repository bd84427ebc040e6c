"""What a rank computes on: tensors over mapped records, and the KV cache. Made by `services/worker/hmm/memory.py`.

Shape suffixes: E experts (all of the model's, present or not). Everything here is memory of the HMM that this process
has mapped; nothing is copied, and nothing may be written but the KV blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elasticmoe.common.devices.base import Device
from elasticmoe.common.model_spec import KvGeometry, ModelSpec
from elasticmoe.common.sharding import WHOLE, Shard


@dataclass(slots=True)
class KvCache:
    """The KV blocks. `blocks`: [most blocks, layers, planes, heads, block_size, width] (see KvShape) in the model's
    dtype, contiguous but for the first dimension: block b lies at `base_addr + b * geometry.block_stride` for what
    computes on it, and at `address + b * geometry.block_stride` of `device`, which copies, reads and writes the bytes
    of blocks.

    The first `num_blocks` are mapped; touching another is a fault. The number may change between steps, as blocks are
    mapped or unmapped at the end; a batch is checked against it.
    """

    blocks: torch.Tensor
    num_blocks: int
    geometry: KvGeometry
    device: Device
    address: int

    @property
    def base_addr(self) -> int:
        """Where the first block begins."""
        return self.blocks.data_ptr()


@dataclass(frozen=True, slots=True)
class RankWeights:
    """Tensors by the names of `common/families`.

    `shard`: which of a replica's shards of base and layers these are.
    `base`: of the base record. `layers[layer]`: of the layer's record. `experts[layer][name]`: one strided tensor
    [E, *shape] over the layer's reserved range, `stride(0)` elements from slot to slot; the slots of experts that this
    rank does not hold are not mapped, and touching one is a fault. Dense layers have no entries. The mappings must stay
    as they are while a step runs, and the ranges for as long as a model built on them lives.
    """

    spec: ModelSpec
    base: dict[str, torch.Tensor]
    layers: list[dict[str, torch.Tensor]]
    experts: list[dict[str, torch.Tensor]]
    kv: KvCache
    shard: Shard = WHOLE
