"""Geometry of a model: layers, heads, experts, and the records that its weights are stored in.

`common/families` makes a ModelSpec from a checkpoint. From then on nothing in the system reads config.json: the HMM
sizes and fills records by it, the planner counts bytes by it, the ranks build their tensors by it.

A *record* is what one page handle holds. Weights are final in it: fused, in the served dtype, never touched again.
Shape suffixes: H hidden, I expert width, E experts, V vocabulary, Q query width (heads x head_dim), K kv width.
"""

from __future__ import annotations

from typing import Literal

import msgspec

RecordKind = Literal["expert", "layer", "base"]
Dtype = Literal["bfloat16", "float32"]

DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}
TENSOR_ALIGN_BYTES = 256  # every tensor starts on its own cache lines, and on what device kernels ask for


class RecordKey(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Names a record: `expert` (layer, expert), `layer` (layer, -1), `base` (-1, -1): embeddings, final norm, head.

    `shard`: the tp index of the ranks that have it, as of `layer` and `base` each has its part (sharding.py); experts
    are whole."""

    kind: RecordKind
    layer: int = -1
    expert: int = -1
    shard: int = 0

    def __str__(self) -> str:
        name = ".".join([self.kind, *(str(n) for n in (self.layer, self.expert) if n >= 0)])
        return f"{name}.t{self.shard}" if self.shard else name

    def range_offset(self, nbytes: int) -> int:
        """Where in its range a rank maps the record, which takes `nbytes` there as all of its kind: the experts of a
        layer share a range, one behind the other by their numbers; every other record has one to itself."""
        return self.expert * nbytes if self.kind == "expert" else 0


class Window(msgspec.Struct, frozen=True, array_like=True):
    """What a source takes of a vector or matrix of the shape `whole`: all from the index `begin` on, as far as the
    source's shape goes."""

    whole: tuple[int, ...]
    begin: tuple[int, ...]


class Source(msgspec.Struct, frozen=True):
    """One checkpoint tensor, or one of the equal parts along its first dim, or a window of either, that a tensor of
    ours is made of.

    `shape` is that of what is taken. With `parts`, the checkpoint's tensor has the shape (parts, *whole), and the one
    numbered `part` is taken; its bytes are contiguous. Sources are stacked along dim 0.
    """

    name: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 0
    window: Window | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of what the window is of; without one, of what is taken."""
        return self.window.whole if self.window is not None else self.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole checkpoint tensor."""
        return (self.parts, *self.whole) if self.parts else self.whole

    def cut(self, axis: int, begin: int, end: int) -> Source:
        """The same with only the indices [begin, end) of one axis."""
        first = list(self.window.begin if self.window is not None else (0,) * len(self.shape))
        shape = list(self.shape)
        first[axis] += begin
        shape[axis] = end - begin
        if tuple(shape) == self.shape:
            return self
        return msgspec.structs.replace(self, shape=tuple(shape), window=Window(self.whole, tuple(first)))


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor inside a record, row-major, at `offset` bytes. Checkpoints that do not have its `sources` may have those
    of one of the `alternatives`."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    offset: int
    sources: tuple[Source, ...]
    alternatives: tuple[tuple[Source, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes, without padding."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count * DTYPE_BYTES[self.dtype]


class RecordSpec(msgspec.Struct, frozen=True):
    """All tensors of one record, in order of their offsets; `nbytes` ends with the last one, aligned."""

    key: RecordKey
    tensors: tuple[TensorSpec, ...]
    nbytes: int

    def tensor(self, name: str) -> TensorSpec:
        """The tensor called `name`. Raises KeyError."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)


class RopeScaling(msgspec.Struct, frozen=True):
    """How the frequencies of a rotary embedding are stretched beyond the positions that a model was first trained on,
    as in transformers' `modeling_rope_utils`.

    `kind`: linear (all alike), yarn or llama3 (fast ones stay, slow ones are divided by `factor`, those between change
    from one to the other). `original_positions`: what the model was first trained on; not of linear. yarn's
    `beta_fast` and `beta_slow`, llama3's `high` and `low` frequency factors bound the change. `truncate`: yarn's bounds
    are whole numbers.
    """

    kind: Literal["linear", "yarn", "llama3"]
    factor: float
    original_positions: int = 0
    fast: float = 0.0
    slow: float = 0.0
    truncate: bool = True


class RopeSpec(msgspec.Struct, frozen=True):
    """Rotary embedding of `dims` elements of a head: its first, or those that a latent attention keeps for it.

    `interleaved`: element 2 i rotates with 2 i + 1; otherwise i with i + dims / 2 ("neox"). `amplitude` multiplies
    cosines and sines (yarn's attention factor).
    """

    theta: float
    dims: int
    interleaved: bool = False
    scaling: RopeScaling | None = None
    amplitude: float = 1.0


class KvShape(msgspec.Struct, frozen=True):
    """What one token leaves in the KV cache of one layer: `planes` x `heads` x `width` elements. A plane of a block is
    [heads, block_size, width], so that one head's tokens lie together."""

    planes: int
    heads: int
    width: int

    @property
    def elements(self) -> int:
        """Elements of one token and layer."""
        return self.planes * self.heads * self.width


class AttentionSpec(msgspec.Struct, frozen=True, tag="grouped"):
    """Grouped-query attention. `scale`: factor of the scores.

    `qk_norm`: what one RMS norm of queries and keys covers, before rotation: each head (Qwen3) or all heads of a token
    together (OLMoE). `qkv_bias`, `out_bias`: which projections add one. `clip`: queries, keys and values are cut to
    [-clip, clip] before rotation; 0: they are not.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    scale: float
    qk_norm: Literal["none", "head", "token"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    clip: float = 0.0

    @property
    def kv(self) -> KvShape:
        """Keys, then values."""
        return KvShape(2, self.num_kv_heads, self.head_dim)

    @property
    def query_width(self) -> int:
        """Elements of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def out_width(self) -> int:
        """Elements that the output projection takes."""
        return self.query_width

    def of_rank(self, tp: int) -> AttentionSpec:
        """What each of `tp` ranks computes: its heads, and the kv heads that these read. Where there are fewer of those
        than ranks, several ranks have the same one."""
        kv_heads = max(1, self.num_kv_heads // tp)
        return msgspec.structs.replace(self, num_heads=self.num_heads // tp, num_kv_heads=kv_heads)


class LatentAttentionSpec(msgspec.Struct, frozen=True, tag="latent"):
    """Multi-head latent attention (DeepSeek's MLA). `scale`: factor of the scores.

    The cache holds one latent of `kv_rank` elements per token, normed, and beside it one key of `rope.dims` elements,
    rotated, that all heads share. A head's query has `nope_dim` elements that meet the latent (through its part of
    kv_b) and then `rope.dims` that meet the shared key; its value has `v_dim`. `q_rank`: the rank of the queries'
    projection, 0: queries come from one matrix. `bias`: q_a, kv_a and the output projection add one.
    """

    num_heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    v_dim: int
    rope: RopeSpec
    scale: float
    norm_eps: float = 1e-6
    bias: bool = False

    @property
    def kv(self) -> KvShape:
        """The latent, then the shared key, in one plane."""
        return KvShape(1, 1, self.kv_rank + self.rope.dims)

    @property
    def query_width(self) -> int:
        """Elements of all queries of a token."""
        return self.num_heads * (self.nope_dim + self.rope.dims)

    @property
    def out_width(self) -> int:
        """Elements that the output projection takes."""
        return self.num_heads * self.v_dim

    def of_rank(self, tp: int) -> LatentAttentionSpec:
        """What each of `tp` ranks computes: its heads, over latents that each has whole."""
        return msgspec.structs.replace(self, num_heads=self.num_heads // tp)


class MoeSpec(msgspec.Struct, frozen=True):
    """Routed experts, and those that every token takes.

    `scoring`: the experts' scores are a softmax over all, or each a sigmoid. `has_bias`: a bias is added to the scores
    for the choice, and only for it. `num_groups`: experts are in so many equal groups, of which the `top_groups` best
    are left to choose from; a group is as good as its best expert (softmax), or its two best together (sigmoid).
    `norm_topk`: the k weights are divided by their sum. `scaling`: factor of the weights, after that.

    `shared_width`: width of the shared experts, taken together as one feed-forward that each token's owner computes;
    0: there are none. `shared_gate`: their output is multiplied by the sigmoid of a number that the token decides.
    """

    num_experts: int
    top_k: int
    expert_width: int
    norm_topk: bool
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    has_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0
    shared_width: int = 0
    shared_gate: bool = False


class WeightBlock(msgspec.Struct, frozen=True, array_like=True):
    """The part of a stored matrix that has one scale, in elements; the last one of a row or column may be cut off."""

    rows: int
    columns: int

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many blocks a matrix of this size has."""
        return -(-rows // self.rows), -(-columns // self.columns)


class ModelSpec(msgspec.Struct, frozen=True):
    """One model's geometry. `dense_layers` have an ordinary feed-forward of `dense_width` in place of experts.

    `max_positions`: the longest sequence that may be served. It is within the `sliding_window` (0: none), so that
    attention, which knows no windows, sees what the model would see. `tie_embeddings`: the head is the embedding.
    `weight_block`: of the weights that are stored in FP8; None: there are none.
    `embedding_factor`, `residual_factor` and `logits_factor` (Granite) multiply the embeddings, what each attention and
    each feed-forward adds to the residual, and the logits.
    `constants`: names and numbers of the family's own, which only its own code reads.
    `tp`: ranks that a replica's weights and KV are spread over (`sharding.sharded` sets it).
    """

    family: str
    architecture: str
    dtype: Dtype
    num_layers: int
    hidden: int
    vocab: int
    max_positions: int
    norm_eps: float
    tie_embeddings: bool
    attention: AttentionSpec | LatentAttentionSpec
    moe: MoeSpec
    dense_width: int = 0
    dense_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int = 0
    weight_block: WeightBlock | None = None
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logits_factor: float = 1.0
    constants: tuple[tuple[str, int], ...] = ()
    tp: int = 1

    @property
    def rank_attention(self) -> AttentionSpec | LatentAttentionSpec:
        """What one rank computes of the attention, and keeps of its KV."""
        return self.attention.of_rank(self.tp)

    @property
    def num_experts_by_layer(self) -> tuple[int, ...]:
        """Experts of each layer; 0 for dense layers."""
        dense = set(self.dense_layers)
        return tuple(0 if layer in dense else self.moe.num_experts for layer in range(self.num_layers))

    def kv_block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block of a rank: [layers, planes, heads, block_size, width] in the model's dtype,
        contiguous."""
        return self.num_layers * self.rank_attention.kv.elements * block_size * DTYPE_BYTES[self.dtype]


class RecordBuilder:
    """Lays tensors out in a record, each aligned to TENSOR_ALIGN_BYTES."""

    def __init__(self, key: RecordKey) -> None:
        self._key = key
        self._tensors: list[TensorSpec] = []
        self._end = 0

    def add(
        self, name: str, dtype: Dtype, *sources: Source, alternatives: tuple[tuple[Source, ...], ...] = ()
    ) -> RecordBuilder:
        """Append a tensor made of `sources` stacked along dim 0 (all other dims equal), or of those of one of the
        `alternatives`, which make the same shape."""
        rows = sum(source.shape[0] for source in sources)
        tensor = TensorSpec(name, (rows, *sources[0].shape[1:]), dtype, self._end, sources, alternatives)
        self._tensors.append(tensor)
        self._end = round_up(self._end + tensor.nbytes, TENSOR_ALIGN_BYTES)
        return self

    def build(self) -> RecordSpec:
        """The finished record."""
        return RecordSpec(self._key, tuple(self._tensors), self._end)


class KvGeometry(msgspec.Struct, frozen=True):
    """How KV blocks lie in page handles: `blocks_per_handle` blocks at `block_stride` fill `handle_bytes` exactly, so
    that handles mapped one after the other make one uniform array of blocks."""

    block_size: int
    block_bytes: int
    block_stride: int
    blocks_per_handle: int
    handle_bytes: int


def kv_geometry(spec: ModelSpec, block_size: int, granularity: int, handle_bytes_min: int) -> KvGeometry:
    """Choose the KV handle size: a multiple of `granularity`, at least `handle_bytes_min`, padding <= 3 % of a block.

    Blocks start at multiples of granularity / 2^m; m grows until the padding is small enough.
    """
    block_bytes = spec.kv_block_bytes(block_size)
    shift = 0
    while True:
        unit = granularity >> shift
        stride = round_up(block_bytes, unit)
        if (stride - block_bytes) * 100 <= 3 * block_bytes or unit <= TENSOR_ALIGN_BYTES:
            break
        shift += 1
    blocks = 1 << shift  # stride * 2^m is a multiple of the granularity
    while blocks * stride < handle_bytes_min:
        blocks *= 2
    return KvGeometry(block_size, block_bytes, stride, blocks, blocks * stride)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is >= `value`."""
    return -(-value // multiple) * multiple
