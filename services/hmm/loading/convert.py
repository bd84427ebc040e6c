"""Conversion between stored and served dtypes, on numpy views; numpy has no bfloat16, so that is handled as uint16."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from elasticmoe.common.model_spec import Dtype

SAME: Final = {("F32", "float32"), ("BF16", "bfloat16")}  # (stored, served) that need no conversion


def convert(raw: memoryview, stored: str, served: Dtype, out: memoryview) -> None:
    """Convert the elements in `raw` (dtype `stored`: F32, F16 or BF16) into `out` (dtype `served`), of equal count.

    To bfloat16 rounds to nearest, ties to even; NaN stays NaN. The other way is exact.
    """
    if (stored, served) in SAME:
        np.frombuffer(out, np.uint8)[:] = np.frombuffer(raw, np.uint8)
    elif served == "float32":
        target = np.frombuffer(out, np.float32)
        if stored == "BF16":
            np.left_shift(np.frombuffer(raw, np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
        else:
            target[:] = np.frombuffer(raw, np.float16)
    else:
        kind = np.float32 if stored == "F32" else np.float16
        _round(np.frombuffer(raw, kind).astype(np.float32, copy=False), np.frombuffer(out, np.uint16))


def _round(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    bits = values.view(np.uint32)
    # Half of the last kept bit, less one where that bit is even: adding it carries exactly when rounding goes up.
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():  # a carry would turn some NaNs into infinities or zeros
        rounded[nan] = (bits[nan] >> 16) | 0x40
    out[:] = rounded
