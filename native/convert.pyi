"""From the dtypes that checkpoints are quantized in to those that are served.

Addresses are plain integers of this process, of memory that the caller owns and keeps mapped during the call; outputs may not
overlap inputs. The GIL is released. Bad arguments raise ``ValueError`` before anything is written.
"""

def instruction_sets() -> list[str]:
    """Names of the sets that this machine can run, the best first. All give the same bits."""

def dequantize_e4m3(
    src_addr: int,
    first: int,
    count: int,
    num_rows: int,
    depth: int,
    block_rows: int,
    block_cols: int,
    scales_addr: int,
    itemsize: int,
    out_addr: int,
    instruction_set: str = "",
) -> bool:
    """Multiply elements of a matrix in E4M3 (FP8 without infinities) with their blocks' scales.

    The matrix is row-major [num_rows, depth]; ``src`` holds its ``count`` elements from ``first`` on. ``scales``: finite float32
    [ceil(num_rows / block_rows), ceil(depth / block_cols)]; the last block of a row or column may be cut off. ``out`` gets the
    float32 product where ``itemsize`` is 4; where it is 2, that product as bfloat16, rounded to nearest, ties to even.

    False where an element is not a number; it stays one in ``out``. ``instruction_set``: empty, the best.
    """
