"""What tests of the native kernels share: tensors, paged caches, and memory that ends where nothing may be touched.

Shape suffixes: N rows, H hidden, W width, D head_dim.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence

import pytest
import torch

from elasticmoe.native import kernels
from elasticmoe.native.host import Reservation

DTYPES = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PAGE = 4096


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def exact(x_NH: torch.Tensor, w_WH: torch.Tensor) -> torch.Tensor:
    return (x_NH.double() @ w_WH.double().T).float()


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert torch.isfinite(got).all()
    scale = float(want.abs().max()) + 1e-9
    assert float((got - want).abs().max()) <= tolerance * scale


class Guarded:
    """Memory that ends where a page ends that must not be touched."""

    def __init__(self, content: torch.Tensor) -> None:
        data = bytes(content.contiguous().view(torch.uint8).flatten().tolist())
        pages = -(-len(data) // PAGE) * PAGE
        self.fd = os.memfd_create("guarded")
        os.ftruncate(self.fd, pages)
        os.pwrite(self.fd, data, pages - len(data))
        self.range = Reservation(pages + PAGE)
        self.range.map(0, self.fd, 0, pages, True)
        self.addr = self.range.base + pages - len(data)
        self.nbytes = len(data)

    def floats(self) -> torch.Tensor:
        return torch.frombuffer(
            bytearray(os.pread(self.fd, self.nbytes, self.addr - self.range.base)), dtype=torch.float32
        )

    def close(self) -> None:
        self.range.close()
        os.close(self.fd)


class Paged:
    """A KV cache full of NaN, and sequences on shuffled blocks of it."""

    def __init__(
        self,
        dtype: torch.dtype,
        heads: int,
        dim: int,
        size: int,
        layers: int = 2,
        num_blocks: int = 40,
        planes: int = 2,
    ) -> None:
        self.heads, self.dim, self.size, self.planes = heads, dim, size, planes
        block = layers * planes * heads * size * dim
        self.stride = block + 64  # elements: some padding between blocks
        self.memory = torch.full((num_blocks * self.stride,), float("nan"), dtype=dtype)
        bytes_ = self.stride * self.memory.element_size()
        self.view = kernels.KvView(
            self.memory.data_ptr(), num_blocks, bytes_, layers, planes, heads, size, dim, DTYPES[dtype]
        )
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).tolist()

    def take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // self.size))]

    def parts(self, chunks: Sequence[tuple[int, int, list[int]]]) -> kernels.Parts:
        """Of (start, count, blocks) each."""
        row_starts, kv_lens, block_starts, blocks = array("i", [0]), array("i"), array("i", [0]), array("i")
        for start, count, table in chunks:
            row_starts.append(row_starts[-1] + count)
            kv_lens.append(start + count)
            blocks.extend(table)
            block_starts.append(len(blocks))
        self.arrays = (row_starts, kv_lens, block_starts, blocks)
        addresses = [values.buffer_info()[0] for values in self.arrays]
        return kernels.Parts(self.view, row_starts[-1], len(chunks), *addresses)

    def stored(self, layer: int, plane: int, table: list[int], count: int) -> torch.Tensor:
        """What a plane holds of positions 0 .. count: [count, heads, dim]."""
        rows = []
        for block in table:
            flat = self.memory[block * self.stride :]
            start = (layer * self.planes + plane) * self.heads * self.size * self.dim
            rows.append(flat[start : start + self.heads * self.size * self.dim].view(self.heads, self.size, self.dim))
        return torch.cat(rows, dim=1).transpose(0, 1)[:count].float()


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of x [N, heads, D]."""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() / (1e4 ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
