"""The KV cache as NPU operators may see it.

The vendor's operators want tensors without gaps: they copy any other one whole, which would read blocks that are not
mapped. A block of the cache holds all layers, so a layer's part of it has gaps. So a layer is seen as one flat array
of pieces, each as long as what divides both the way from block to block and a plane; pieces are named by numbers.
Reading the whole cache as one tensor of pages is not allowed either: such a tensor may have 2^31 elements at most.

Shape suffixes: N rows, P planes x heads, W a plane's width, B blocks that a step names, G elements of a piece.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch
from elasticmoe.services.worker.backends.sent_fields import Int32s, SentFields


class Pieces(NamedTuple):
    """Numbers of the pieces [n] on the device, for any layer, and the elements of one."""

    numbers: torch.Tensor
    elements: int


def flat(kv: torch.Tensor, layer: int, elements: int) -> torch.Tensor:
    """[pieces, G] from the layer's first plane in the first block on, to the last block's end."""
    begin = kv.storage_offset() + layer * kv.stride(1)
    count = ((kv.shape[0] - 1) * kv.stride(0) + (kv.shape[1] - layer) * kv.stride(1)) // elements
    return kv.as_strided((count, elements), (elements, 1), begin)


def stored_pieces(step: AcceleratorBatch) -> Pieces:
    """Where the rows' k and v belong: for each row its P x W elements, one plane after another."""

    def make(fields: SentFields) -> Pieces:
        block_stride, _, plane, head, place, _ = step.kv.stride()
        _, _, planes, heads, _, width = step.kv.shape
        elements = math.gcd(block_stride, width)
        starts_P = (np.arange(planes)[:, None] * plane + np.arange(heads)[None, :] * head).reshape(-1)
        starts_N = step.row_blocks.astype(np.int64) * block_stride + step.row_places * place
        numbers = _numbered(starts_N[:, None] + starts_P[None, :], width, elements)
        return Pieces(fields.send({"numbers": numbers})["numbers"], elements)

    return step.once("stored", None, make)


class Read(NamedTuple):
    """A layer's keys and values of all blocks that a step names, in the order in which it names them, without gaps:
    [B, heads, block_size, width]. Of latents they are one tensor."""

    keys: torch.Tensor
    values: torch.Tensor


def read_layer(step: AcceleratorBatch, layer: int) -> Read:
    """Copy what the step attends to."""

    def make(fields: SentFields) -> list[Pieces]:
        block_stride, plane = step.kv.stride(0), step.kv.stride(2)
        elements = math.gcd(block_stride, plane)
        starts_B = step.block_list.astype(np.int64) * block_stride
        numbers = {str(at): _numbered(starts_B + at * plane, plane, elements) for at in range(step.kv.shape[2])}
        return [Pieces(sent, elements) for sent in fields.send(numbers).values()]

    pieces = step.once("read", None, make)
    _, _, _, heads, block_size, width = step.kv.shape
    planes = [
        torch.index_select(flat(step.kv, layer, each.elements), 0, each.numbers).view(-1, heads, block_size, width)
        for each in pieces
    ]
    return Read(planes[0], planes[-1])


def _numbered(starts: np.ndarray[tuple[int, ...], np.dtype[np.int64]], length: int, elements: int) -> Int32s:
    """Numbers of the pieces of stretches of `length` elements."""
    numbers = starts.reshape(-1, 1) // elements + np.arange(length // elements)[None, :]
    return numbers.reshape(-1).astype(np.int32)
