"""The operations that models are made of, bound to their memory. The seam between models and kernels.

An operation is made once, from tensors whose shapes, dtypes and contiguity are checked then; a step calls it with the
number of rows and touches no tensor attributes. Operations keep the tensors that they use. Only host memory so far.

Shape suffixes: N rows of a step, H hidden, W width of a linear's output, Q query heads x head_dim, C qkv width, D head_dim,
E experts, K experts per token, I expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from common.model_spec import AttentionSpec, KvGeometry, ModelSpec
from native import kernels
from services.worker.exchange.base import Exchange
from services.worker.model.batch import Batch
from services.worker.model.weights import KvCache

DTYPE_CODES = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}
FLOAT = (torch.float32,)
STORED = (torch.float32, torch.bfloat16)


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> int:
    """Address of a host tensor after checking it. Raises ValueError for another shape, dtype, device or for gaps."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, must be {dtypes} {shape} on cpu"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {shape} must be contiguous, has strides {tensor.stride()}")
    return tensor.data_ptr()
