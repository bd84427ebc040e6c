"""The bytes of KV blocks in this rank's mapped memory. Nobody else may be writing the blocks meanwhile."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from elasticmoe.services.worker.model.weights import KvCache


def copy_block(kv: KvCache, source: int, target: int) -> None:
    """Copy one block to another place."""
    kv.device.copy(_address(kv, target), _address(kv, source), kv.geometry.block_bytes)


def read_blocks(kv: KvCache, blocks: Seq[int]) -> bytes:
    """The blocks' bytes one after the other, `block_bytes` each."""
    return b"".join(kv.device.read_bytes(_address(kv, block), kv.geometry.block_bytes) for block in blocks)


def write_blocks(kv: KvCache, blocks: Seq[int], data: bytes) -> None:
    """Undo `read_blocks`. Raises ValueError unless `data` has just the bytes of the blocks."""
    size = kv.geometry.block_bytes
    if len(data) != len(blocks) * size:
        raise ValueError(f"{len(data)} bytes for {len(blocks)} blocks of {size}")
    whole = memoryview(data)
    for index, block in enumerate(blocks):
        kv.device.write_bytes(_address(kv, block), whole[index * size : (index + 1) * size])


def _address(kv: KvCache, block: int) -> int:
    return kv.address + block * kv.geometry.block_stride
