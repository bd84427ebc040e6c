"""CPU kernels: a decoder with experts. Activations are float32; weights and KV float32 or bfloat16.

Addresses are plain integers of this process, of contiguous row-major memory that the caller owns and keeps mapped during the
call; outputs may not overlap inputs unless said otherwise. Sizes are in elements. The GIL is released. Bad arguments raise
``ValueError`` before anything is written; scratch memory that cannot be had raises ``MemoryError``.

**Reproducible.** A row's result depends on its own input and weights alone, bit by bit: not on how many rows are computed with
it, nor on how a prompt was cut into chunks, nor on how many threads compute. It does depend on the instruction set.

**Threads.** Products, experts and attention that are large enough are shared among ``threads()`` threads: the calling one, and
helpers that look for work for 50 µs after the last they found and sleep then. Another thread that calls meanwhile computes
alone. A child of a fork has no helpers. After ``MemoryError`` an output may be written in part.

Shape suffixes: N rows of a step, H hidden, Q query heads, G kv heads, D head_dim, E experts, K experts per token, R rows for
experts, I expert width, V vocabulary; P planes and W width of the KV cache (W is D, or a latent's rank and the shared key's
elements together).
"""

from typing import Final

FLOAT32: Final[int]
BFLOAT16: Final[int]
ROUNDED: Final[int]
"""``dtype`` of the weights of ``linear``, ``experts`` and ``shared_experts``: bfloat16, and what they are multiplied by is rounded to
bfloat16, too (to nearest, ties to even). Sums stay float32. Twice as many products an instruction where the set is ``avx512bf16``,
three times as many where it is ``amx``; as many elsewhere."""
SOFTMAX: Final[int]
SIGMOID: Final[int]

def instruction_sets() -> list[str]:
    """Names of the kernel sets that this machine can run, the best first. The best is used unless another is chosen."""

def use_instruction_set(name: str) -> None:
    """Use another of ``instruction_sets()`` from now on, in the whole process: machines that must agree bit by bit use the same.

    ``ValueError`` for any other name."""

def threads() -> int:
    """How many threads compute; 1 at first."""

def use_threads(count: int) -> None:
    """Let so many threads compute from now on, in the whole process: 1 to 64. Waits for what is computed now.

    ``ValueError`` for another number, ``RuntimeError`` where a thread cannot be started; then nothing has changed."""

class KvView:
    """The mapped blocks of a KV cache: block b at ``base_addr + b × block_stride`` bytes is [layers, P, G, block_size, W].
    P is 2 (keys, values) for grouped-query attention, 1 for latent attention.

    Only describes memory; the caller keeps it mapped while it is used."""

    def __init__(
        self,
        base_addr: int,
        num_blocks: int,
        block_stride: int,
        num_layers: int,
        num_planes: int,
        num_heads: int,
        block_size: int,
        width: int,
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
    x_addr: int,
    num_rows: int,
    w_addr: int,
    dtype: int,
    num_cols: int,
    depth: int,
    out_addr: int,
    accumulate: bool,
    bias_addr: int,
) -> None:
    """``out[n, c] = x[n] · w[c] + bias[c]``, added to ``out`` if ``accumulate``.

    x [N, depth], w [num_cols, depth] in ``dtype``, out [N, num_cols], bias float32 [num_cols] (address 0: none)."""

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

def embed(
    ids_addr: int,
    num_rows: int,
    table_addr: int,
    dtype: int,
    vocab: int,
    hidden: int,
    factor: float,
    out_addr: int,
    first: int = 0,
    num_held: int = -1,
) -> None:
    """``out[n] = table[ids[n] - first] × factor``. ids int32 [N]; ``ValueError`` for one that is not below ``vocab``. The table
    has ``num_held`` tokens, -1: all from ``first`` on; other tokens' rows are zeros."""

def rope_table(parts: Parts, inv_freq_addr: int, dims: int, amplitude: float, out_addr: int) -> None:
    """Cosines and sines of each row's position × inv_freq, times ``amplitude``: out [N, 2, dims/2]. inv_freq float32 [dims/2]."""

def store_kv(
    parts: Parts,
    layer: int,
    qkv_addr: int,
    q_heads: int,
    rope_addr: int,
    rope_dims: int,
    interleaved: bool,
    q_norm_addr: int,
    k_norm_addr: int,
    norms_token: bool,
    eps: float,
    clip: float,
) -> None:
    """In place, of qkv [N, (Q + 2 G) × D]: norm q and k, cut q, k and v to ``clip`` (0: not), rotate q and k; then write k and v to
    the cache, which has two planes.

    Norm weights [D], or [Q × D] and [G × D] of one norm over all heads of a token if ``norms_token``; address 0: none. The first
    ``rope_dims`` elements of each head rotate by rope [N, 2, rope_dims/2]: element 2 i with 2 i + 1 if ``interleaved``, else i
    with i + rope_dims/2."""

def attention(parts: Parts, layer: int, qkv_addr: int, q_heads: int, scale: float, out_addr: int) -> None:
    """Causal attention of the q of qkv [N, (Q + 2 G) × D] to positions 0 .. own of the cache. out [N, Q × D]."""

def store_latent(
    parts: Parts,
    layer: int,
    q_addr: int,
    q_heads: int,
    nope_dim: int,
    kv_addr: int,
    rope_addr: int,
    rope_dims: int,
    interleaved: bool,
    norm_addr: int,
    eps: float,
) -> None:
    """In place: rotate the last ``rope_dims`` elements of each query of q [N, Q, nope_dim + rope_dims]; of kv [N, W] norm the latent,
    its first W - rope_dims elements (weights float32, as many), and rotate the rest. Then write kv to the cache, which has one
    plane with one head."""

def latent_attention(
    parts: Parts,
    layer: int,
    q_addr: int,
    q_heads: int,
    nope_dim: int,
    v_dim: int,
    rope_dims: int,
    kv_b_addr: int,
    dtype: int,
    scale: float,
    out_addr: int,
) -> None:
    """Causal attention of q [N, Q, nope_dim + rope_dims] to the latents and shared keys of positions 0 .. own. out [N, Q × v_dim].

    kv_b [Q, nope_dim + v_dim, W - rope_dims], in the cache's dtype, is absorbed: a head's first rows bring its query to the latents,
    its last ones what it takes from them to a value."""

def route(
    x_addr: int,
    num_rows: int,
    hidden: int,
    gate_addr: int,
    bias_addr: int,
    num_experts: int,
    top_k: int,
    scoring: int,
    num_groups: int,
    top_groups: int,
    renormalize: bool,
    scaling: float,
    ids_addr: int,
    weights_addr: int,
) -> None:
    """The K experts with the greatest scores of ``x · gate``, best first; of equals the lower expert first.

    ``scoring``: ``SOFTMAX`` over all experts, or ``SIGMOID`` of each. gate float32 [E, H]; bias float32 [E] is added for the choice
    alone (address 0: none). Of ``num_groups`` groups the ``top_groups`` with the greatest expert (softmax) or sum of two experts
    (sigmoid) are chosen from; of equals the lower one. ids int32 [N, K], weights float32 [N, K]: scores, divided by their sum if
    ``renormalize``, times ``scaling``. A row with NaN gets distinct experts all the same."""

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

def shared_experts(
    x_addr: int,
    num_rows: int,
    w13_addr: int,
    w2_addr: int,
    dtype: int,
    hidden: int,
    width: int,
    gate_addr: int,
    out_addr: int,
) -> None:
    """``out[n] += w2 · (silu(gate) × up)``, as of ``experts``, times ``sigmoid(x[n] · gate)`` (float32 [H]; address 0: times 1)."""

def oracle_mix(parts: Parts, layer: int, kv_addr: int, modulus: int, base: int, out_addr: int) -> None:
    """The oracle model's attention: write kv [N, P, W] to the cache; then, from what the cache holds,
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
