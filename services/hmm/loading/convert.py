"""Conversion between stored and served dtypes, on numpy views; numpy has no bfloat16, so that is handled as uint16."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from elasticmoe.common.checkpoint import Scales
from elasticmoe.common.model_spec import DTYPE_BYTES, Dtype
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.native.convert import dequantize_e4m3

SAME: Final = {("F32", "float32"), ("BF16", "bfloat16")}  # (stored, served) that need no conversion
# The greatest scale whose product with the greatest weight, 448, is finite in bfloat16.
_SCALE_MAX: Final = 2.0**127 / 256


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


def decode_scales(raw: memoryview, scales: Scales) -> NDArray[np.float32]:
    """The scales in `raw` as float32, exactly. Raises CheckpointError for one that is not finite, or so great that
    weights would not be."""
    if scales.part.dtype == "F8_E8M0":  # the exponent alone; 255 is NaN
        exponents = np.frombuffer(raw, np.uint8)
        values = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127, dtype=np.float32)
        values[exponents == 255] = np.nan
    else:
        values = np.empty(scales.part.nbytes // (4 if scales.part.dtype == "F32" else 2), np.float32)
        convert(raw, scales.part.dtype, "float32", values.data.cast("B"))
    bad = ~(np.abs(values) <= _SCALE_MAX)
    if bad.any():
        raise CheckpointError(
            f"{scales.part.file.name}: tensor {scales.name!r:.200} has the scale {values[bad][0]:g}; scales must be "
            f"finite, and at most {_SCALE_MAX:g}"
        )
    return values


def dequantize(
    raw: memoryview, first: int, scales: Scales, values: NDArray[np.float32], served: Dtype, out: memoryview
) -> bool:
    """Multiply the E4M3 elements in `raw`, of which the first is the matrix's element `first`, with their blocks'
    scales, `values`, into `out` (dtype `served`). The product is float32's; to bfloat16 it is rounded once, as in
    `convert`.

    False where an element is not a number.
    """
    source, target = np.frombuffer(raw, np.uint8), np.frombuffer(out, np.uint8)
    return dequantize_e4m3(
        source.ctypes.data,
        first,
        len(source),
        scales.rows,
        scales.columns,
        scales.block.rows,
        scales.block.columns,
        values.ctypes.data,
        DTYPE_BYTES[served],
        target.ctypes.data,
    )


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
