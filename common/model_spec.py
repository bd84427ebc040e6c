"""Geometry of a model: layers, heads, experts, and the records that its weights are stored in.

`common/families` makes a ModelSpec from a checkpoint. From then on nothing in the system reads config.json: the HMM
sizes and fills records by it, the planner counts bytes by it, the ranks build their tensors by it.

A *record* is what one page handle holds. Weights are final in it: fused, in the served dtype, never touched again.
Shape suffixes: H hidden, I expert width, E experts, V vocabulary, Q query width (heads x head_dim), K kv width.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

RecordKind = Literal["expert", "layer", "base"]
Dtype = Literal["bfloat16", "float32"]

DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}
TENSOR_ALIGN_BYTES = 256  # every tensor starts on its own cache lines, and on what device kernels ask for


class RecordKey(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Names a record: `expert` (layer, expert), `layer` (layer, -1), `base` (-1, -1): embeddings, final norm, head."""

    kind: RecordKind
    layer: int = -1
    expert: int = -1

    def __str__(self) -> str:
        return ".".join([self.kind, *(str(n) for n in (self.layer, self.expert) if n >= 0)])


class Source(msgspec.Struct, frozen=True):
    """One checkpoint tensor, or one of the equal parts along its first dim, that a tensor of ours is made of.

    `shape` is that of what is taken. With `parts`, the checkpoint's tensor has the shape (parts, *shape), and the one
    numbered `part` is taken; its bytes are contiguous. Sources are stacked along dim 0.
    """

    name: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole checkpoint tensor."""
        return (self.parts, *self.shape) if self.parts else self.shape


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


class RopeSpec(msgspec.Struct, frozen=True):
    """Rotary embedding of the half-split ("neox") kind over the whole head."""

    theta: float


class AttentionSpec(msgspec.Struct, frozen=True):
    """Grouped-query attention. `qk_norm`: RMS norm over each head before rotation (Qwen3)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    rope: RopeSpec

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return 1.0 / math.sqrt(self.head_dim)


class MoeSpec(msgspec.Struct, frozen=True):
    """Softmax top-k routing. `norm_topk`: the k weights are divided by their sum."""

    num_experts: int
    top_k: int
    expert_width: int
    norm_topk: bool


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
    `constants`: names and numbers of the family's own, which only its own code reads.
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
    attention: AttentionSpec
    moe: MoeSpec
    dense_width: int = 0
    dense_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int = 0
    weight_block: WeightBlock | None = None
    constants: tuple[tuple[str, int], ...] = ()

    @property
    def num_experts_by_layer(self) -> tuple[int, ...]:
        """Experts of each layer; 0 for dense layers."""
        dense = set(self.dense_layers)
        return tuple(0 if layer in dense else self.moe.num_experts for layer in range(self.num_layers))

    @property
    def kv_width(self) -> int:
        """Elements of one key (or value) of one token and layer."""
        return self.attention.num_kv_heads * self.attention.head_dim

    def kv_block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block: [layers, 2, kv heads, block_size, head_dim] in the model's dtype, contiguous."""
        return self.num_layers * 2 * self.kv_width * block_size * DTYPE_BYTES[self.dtype]


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
