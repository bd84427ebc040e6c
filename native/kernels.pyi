"""CPU kernels: a decoder with experts on one thread. Activations are float32; weights and KV float32 or bfloat16.

Addresses are plain integers of this process, of contiguous row-major memory that the caller owns and keeps mapped during the
call; outputs may not overlap inputs unless said otherwise. Sizes are in elements. The GIL is released. Bad arguments raise
``ValueError`` before anything is written; scratch memory that cannot be had raises ``MemoryError``.

**Reproducible.** A row's result depends on its own input and weights alone, bit by bit: not on how many rows are computed with
it, nor on how a prompt was cut into chunks. It does depend on the instruction set.

Shape suffixes: N rows of a step, H hidden, Q query heads, G kv heads, D head_dim, E experts, K experts per token, R rows for
experts, I expert width, V vocabulary.
"""

from typing import Final

FLOAT32: Final[int]
BFLOAT16: Final[int]

def instruction_sets() -> list[str]:
    """Names of the kernel sets that this machine can run, the best first. The best is used unless another is chosen."""

def use_instruction_set(name: str) -> None:
    """Use another of ``instruction_sets()`` from now on, in the whole process: machines that must agree bit by bit use the same.

    ``ValueError`` for any other name."""

class KvView:
    """The mapped blocks of a KV cache: block b at ``base_addr + b × block_stride`` bytes is [layers, 2 (k, v), G, block_size, D].

    Only describes memory; the caller keeps it mapped while it is used."""

    def __init__(
        self,
        base_addr: int,
        num_blocks: int,
        block_stride: int,
        num_layers: int,
        num_heads: int,
        block_size: int,
        head_dim: int,
        dtype: int,
    ) -> None: ...

class Parts:
    """The parts of one batch over a cache (``services/worker/model/batch.py``), checked here once for all layers.

    int32: ``row_starts`` [S + 1], ``kv_lens`` [S] (this step's tokens included), ``block_starts`` [S + 1], ``blocks``. The arrays must
    stay as they are as long as this object is used. ``ValueError`` for a block outside of the cache, for a part without rows or
    with too few blocks."""

    def __init__(
        self,
        cache: KvView,
        num_rows: int,
        num_parts: int,
        row_starts_addr: int,
        kv_lens_addr: int,
        block_starts_addr: int,
        blocks_addr: int,
    ) -> None: ...

def linear(
    x_addr: int, num_rows: int, w_addr: int, dtype: int, num_cols: int, depth: int, out_addr: int, accumulate: bool
) -> None:
    """``out[n, c] = x[n] · w[c]``, added to ``out`` if ``accumulate``. x [N, depth], w [num_cols, depth] in ``dtype``, out [N, num_cols]."""

def rms_norm(
    x_addr: int,
    delta_addr: int,
    rows_addr: int,
    num_rows: int,
    hidden: int,
    weight_addr: int,
    eps: float,
    out_addr: int,
) -> None:
    """``out = (x + delta) / rms(x + delta) × weight``, by rows. weight float32 [H].

    ``delta_addr`` 0: nothing is added; else x keeps the sum. ``rows_addr`` not 0: int32 [num_rows] indices of the rows to take
    (in range: not checked); out has ``num_rows`` rows and x stays."""

def embed(ids_addr: int, num_rows: int, table_addr: int, dtype: int, vocab: int, hidden: int, out_addr: int) -> None:
    """``out[n] = table[ids[n]]``. ids int32 [N]; ``ValueError`` for one that is not below ``vocab``."""

def rope_table(parts: Parts, inv_freq_addr: int, out_addr: int) -> None:
    """Cosines and sines of each row's position × inv_freq: out [N, 2, D/2]. inv_freq float32 [D/2]."""

def store_kv(
    parts: Parts,
    layer: int,
    qkv_addr: int,
    q_heads: int,
    rope_addr: int,
    q_norm_addr: int,
    k_norm_addr: int,
    eps: float,
) -> None:
    """Norm (weights [D]; address 0: none) and rotate q and k of qkv [N, (Q + 2 G) × D] in place; write k and v to the cache."""

def attention(parts: Parts, layer: int, qkv_addr: int, q_heads: int, scale: float, out_addr: int) -> None:
    """Causal attention of the q of qkv [N, (Q + 2 G) × D] to positions 0 .. own of the cache. out [N, Q × D]."""

def route(
    x_addr: int,
    num_rows: int,
    hidden: int,
    gate_addr: int,
    num_experts: int,
    top_k: int,
    renormalize: bool,
    ids_addr: int,
    weights_addr: int,
) -> None:
    """Softmax over ``x · gate`` and the K greatest, best first; of equals the lower expert first.

    gate float32 [E, H], ids int32 [N, K], weights float32 [N, K], divided by their sum if ``renormalize``. A row with NaN gets
    distinct experts all the same."""

def experts(
    rows_addr: int,
    num_rows: int,
    counts_addr: int,
    num_experts: int,
    w13_addr: int,
    w13_stride: int,
    w2_addr: int,
    w2_stride: int,
    dtype: int,
    hidden: int,
    width: int,
    out_addr: int,
) -> None:
    """``out[r] = w2 · (silu(gate) × up)`` with (gate, up) the halves of ``w13 · rows[r]``, each row by its own expert.

    rows [R, H] sorted by expert, counts int32 [E] rows of each (sum R). Expert e's w13 [2 I, H] lies at ``w13_addr + e × w13_stride``
    bytes, w2 [H, I] likewise; those of experts without rows are not touched. out [R, H]; may be ``rows`` itself."""

def oracle_mix(parts: Parts, layer: int, kv_addr: int, modulus: int, base: int, out_addr: int) -> None:
    """The oracle model's attention: write kv [N, 2, D] to the cache, then, from what the cache holds,
    ``out[n] = sum of kv[j] × base^(position of n - j)`` over positions j up to the own one, modulo ``modulus`` (< 2**16).

    All numbers are whole, ≥ 0 and < modulus, in float32. The cache is float32 with one head."""

def greatest(logits_addr: int, num_rows: int, vocab: int) -> list[int]:
    """Index of the greatest of each row of logits [N, V], the first of equals; -1 where one is not finite."""

def draw(
    logits_addr: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> int:
    """The token of one row [V] that ``uniform`` in [0, 1) falls on, or -1 if a logit is not finite.

    Of softmax(logits / temperature): tokens with at least ``min_p`` times the greatest probability; of these the ``top_k`` greatest
    (0: all); of these the fewest that make up ``top_p`` of them (1: all), one at least. Temperatures from 1e-6 to 1e6, shares from 0
    to 1: ``ValueError`` beyond, and for NaN."""

def log_total(logits_addr: int, vocab: int) -> float:
    """log of the sum of e^logit of one row [V]; NaN if a logit is not finite."""

def top_tokens(logits_addr: int, vocab: int, count: int) -> list[int]:
    """The ``count`` greatest of one row [V] without NaN, best first; of equals the lower id first."""
