"""Addresses of host tensors, for kernels that see nothing else of them: checked here.

Shape suffixes: as in base.py; X any width.
"""

from __future__ import annotations

from typing import Final

import torch

from elasticmoe.native import kernels

CODES: Final = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}


def checked(tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> int:
    """Address of a host tensor. Raises ValueError for another shape, dtype or device, or for gaps."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device.type != "cpu":
        raise ValueError(
            f"tensor is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; must be {shape} of {dtypes} on cpu"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"tensor of {shape} has strides {tensor.stride()}; must be contiguous")
    return tensor.data_ptr()


def activations(tensor_NX: torch.Tensor, width: int) -> int:
    """Address of float32 rows of `width`."""
    return checked(tensor_NX, (tensor_NX.shape[0], width), torch.float32)


def float32(tensor: torch.Tensor | None, *shape: int) -> int:
    """Address of a float32 tensor; 0 where there is none."""
    return 0 if tensor is None else checked(tensor, shape, torch.float32)


def stored(tensor: torch.Tensor, *shape: int) -> tuple[int, int]:
    """Address of a weight, and the code of its dtype."""
    return checked(tensor, shape, *CODES), CODES[tensor.dtype]


def stored_pair(
    w13: torch.Tensor, w13_shape: tuple[int, ...], w2: torch.Tensor, w2_shape: tuple[int, ...]
) -> tuple[int, int, int]:
    """Addresses of two weights of one dtype, and its code."""
    (w13_addr, code), (w2_addr, w2_code) = stored(w13, *w13_shape), stored(w2, *w2_shape)
    if code != w2_code:
        raise ValueError(f"w13 is {w13.dtype} and w2 is {w2.dtype}")
    return w13_addr, w2_addr, code


def slot_stride(tensor_E: torch.Tensor, num_experts: int) -> int:
    """Bytes from slot to slot. Touches no memory: slots may be unmapped."""
    if tensor_E.shape[0] != num_experts:
        raise ValueError(f"tensor has slots for {tensor_E.shape[0]} experts; must have {num_experts}")
    return tensor_E.stride(0) * tensor_E.element_size()
