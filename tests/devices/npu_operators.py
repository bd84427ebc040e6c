"""The operators of torch_npu that the product calls, without an NPU: declared by the vendor's own list (of the wheel,
which is taken apart and never installed), and computed by plain torch as the vendor's pages say (the wheel has them in
its module of docstrings). What those pages forbid is refused here.

Shape suffixes: B sequences, X heads, S rows of a sequence, L keys, Y elements of a head, T tokens of a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.devices import vendor

INT32_MAX = 2**31 - 1
ATTENDED = [torch.float16, torch.bfloat16]  # dtypes
MASK_SIZE = 2048


class Refused(RuntimeError):
    """An argument that the vendor's page forbids."""


class Float32Only(TorchDispatchMode):
    """What would be float64 is float32, whatever makes it. torch_npu does so where a tensor of an NPU is brought to
    another dtype (`_to_copy`), and says it in one warning; its other ways to float64 end in kernels of
    the NPU's small processor, or in errors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See TorchDispatchMode."""
        return tree_map_only(torch.Tensor, _narrowed, func(*args, **kwargs or {}))


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _ask(is_right: bool, rule: str) -> None:
    if not is_right:
        raise Refused(rule)


def declarations(wheel: vendor.Headers = vendor.OPERATORS[0]) -> dict[str, str]:
    """Schemas by name, with the overload's. Skips the test where the wheel cannot be fetched."""
    (path,) = vendor.headers(wheel)
    found = {}
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"\s*(?:- )?func: (.+)", line):
            text = match[1].strip()
            schema = text[1:-1].replace("''", "'") if text.startswith("'") else text
            found[schema.partition("(")[0]] = schema
    return found


def define() -> torch.library.Library:
    """Let torch have the operators that are computed here, as they are declared, for tensors of the CPU: as long as
    there is what is returned. Skips the test as `declarations` does."""
    known = declarations()
    library = torch.library.Library("npu", "FRAGMENT")
    for name, function in COMPUTED.items():
        library.define(known[name])
        library.impl(name, _with_defaults(known[name], function), "CPU")
    return library


@contextmanager
def defined() -> Iterator[None]:
    """torch has them meanwhile."""
    library = define()
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _with_defaults(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """torch leaves out what has the value that is declared."""
    arguments = torch._C.parse_schema(schema).arguments
    defaults = {each.name: each.default_value for each in arguments if each.kwarg_only and each.has_default_value()}
    return lambda *args, **options: function(*args, **defaults | options)


def _without_gaps(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        _ask(tensor is None or tensor.is_contiguous(), f"{name} must not have gaps")


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_rms_norm: y, and the reciprocal of the root."""
    _ask(x.dtype == gamma.dtype, "gamma's dtype is that of x")
    _ask(2 <= x.dim() <= 8, "x has 2 to 8 dimensions")
    reciprocal = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * reciprocal * gamma.float()).to(x.dtype), reciprocal


def swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """npu_swiglu: silu of the first half times the second."""
    first, second = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(first) * second).to(x.dtype)


def rotary_mul(
    x: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    """npu_rotary_mul, for SBND: one row of cosines for all heads."""
    _ask(x.dim() == 4 and x.shape[3] % 2 == 0 and x.shape[3] < 896, "x is 4-dimensional, its last one even and < 896")
    _ask(x.shape[1] * x.shape[2] < 1000, "B * N < 1000")
    _ask(rotate is None, "no matrix in this test")
    for part in (r1, r2):
        _ask(part.shape == (x.shape[0], 1, 1, x.shape[3]), "r1 and r2 are S11D for SBND")
        _ask(bool((part.abs() <= 1).all()), "r1 and r2 are in [-1, 1]")
    if rotary_mode == "half":
        first, second = x.chunk(2, -1)
        return r1 * x + r2 * torch.cat([-second, first], -1)
    _ask(rotary_mode == "interleave", "rotary_mode is half or interleave")
    return r1 * x + r2 * torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def scatter_nd_update_(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """npu_scatter_nd_update_, in place. With gaps it would be copied whole: what the page allows is too dear here."""
    _without_gaps(input=x)
    _ask(x.dtype == updates.dtype, "updates' dtype is that of the input")
    _ask(indices.dim() >= 2 and indices.shape[-1] <= x.dim(), "indices name leading dimensions")
    _ask(updates.shape == indices.shape[:-1] + x.shape[indices.shape[-1] :], "updates are what indices name")
    x[tuple(indices.long().unbind(-1))] = updates
    return x


def grouped_matmul(
    x: Sequence[torch.Tensor], weight: Sequence[torch.Tensor], *, group_list: Sequence[int], **rest: Any
) -> list[torch.Tensor]:
    """npu_grouped_matmul with a list: one x, several weights, one y."""
    _ask(rest.pop("split_item") in (2, 3), "one y is split_item 2 or 3")
    _ask(all(value in (None, 0) for value in rest.values()), f"not in this test: {rest}")
    _ask(1 < len(weight) <= 128 and len(group_list) == len(weight), "2 to 128 weights, as many groups")
    _ask(all(a <= b for a, b in zip([0, *group_list], group_list, strict=False)), "group_list does not fall")
    (rows,) = x
    _ask(group_list[-1] == len(rows), "the last group ends with the rows")
    for each in weight:
        _ask(each.dim() == 2 and each.dtype == rows.dtype, "weights are matrices of x's dtype")
        _ask(each.is_contiguous() or each.t().is_contiguous(), "weights may be transposed, but have no gaps")
        _ask(each.shape[1] == weight[0].shape[1], "weights have one N")
        _ask(max(rows.shape[1], each.shape[0]) < 65_536, "the inner dimension is below 65536")
    starts = [0, *group_list[:-1]]
    parts = [rows[a:b] @ each for a, b, each in zip(starts, group_list, weight, strict=True)]
    return [torch.cat(parts)]


def fused_infer_attention_score(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_fused_infer_attention_score: BNSD, without quantization, padding, prefixes and shifts."""
    _ask(options["input_layout"] == "BNSD", "BNSD in this test")
    for part in (query, key, value):
        _ask(part.dtype in ATTENDED, "dtypes of 16 bits")
        _ask(part.numel() <= INT32_MAX, "a tensor has at most 2^31 - 1 elements")
    _without_gaps(query=query, key=key, value=value, **{name: options[name] for name in ("query_rope", "key_rope")})
    _ask(key.shape == value.shape, "keys and values have one shape")
    batch, heads, rows, dim = query.shape
    kv_heads = options["num_key_value_heads"] or options["num_heads"]
    _ask(options["num_heads"] == heads and heads % kv_heads == 0 and heads // kv_heads <= 64, "up to 64 heads to one")
    _ask(key.shape[1] == kv_heads and dim <= 512 and dim % 16 == 0 and heads <= 256, "sizes of heads")
    lengths = options["actual_seq_lengths_kv"]
    _ask(lengths is not None and len(lengths) == batch, "lengths of keys, one for each sequence")
    if options["query_rope"] is not None:
        _ask_latent(query, key, options)
        query, key = torch.cat([query, options["query_rope"]], -1), torch.cat([key, options["key_rope"]], -1)
    if options["block_table"] is not None:
        _ask_pages(key, lengths, rows, options)
        key, value = (_of_pages(part, options["block_table"]) for part in (key, value))
    else:
        _ask(len(key) == batch, "keys of each sequence")
    is_causal = options["sparse_mode"] == 3
    _ask(is_causal or (options["sparse_mode"] == 0 and options["atten_mask"] is None), "no mask, or the triangle")
    if is_causal:
        mask = options["atten_mask"]
        _ask(mask is not None and mask.shape == (MASK_SIZE, MASK_SIZE), "the triangle is 2048 x 2048")
        _ask(bool(torch.equal(mask.bool(), torch.ones_like(mask).bool().triu(1))), "ones above the diagonal")
        _ask(rows == 1 or options["actual_seq_lengths"] == [rows] * batch, "lengths of queries")
    _ask(rows == 1 or is_causal, "several rows see keys after their own")
    outs = [
        _attended(query[at], key[at, :, :length], value[at, :, :length], options["scale"], is_causal)
        for at, length in enumerate(lengths)
    ]
    return torch.stack(outs).to(value.dtype), torch.zeros(1)


def _ask_latent(query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> None:
    batch, heads, rows, dim = query.shape
    _ask(dim == 512 and heads in (32, 64, 128) and rows <= 16, "latents: 512 wide, 32, 64 or 128 heads, 16 rows")
    _ask(options["query_rope"].shape == (batch, heads, rows, 64), "64 rotating elements")
    _ask(options["key_rope"].shape == (*key.shape[:3], 64) and key.shape[1] == 1, "one key for all heads")
    _ask(options["block_table"] is not None and options["block_size"] in (16, 128), "pages of 16 or 128 tokens")
    _ask(rows == 1 or options["sparse_mode"] == 3, "several rows have the triangle")


def _ask_pages(key: torch.Tensor, lengths: Sequence[int], rows: int, options: dict[str, Any]) -> None:
    size, table = options["block_size"], options["block_table"]
    _ask(size == key.shape[2] and 0 < size <= 512 and size % 16 == 0, "pages of multiples of 16 up to 512 tokens")
    _ask(rows == 1 or size % 128 == 0 or options["query_rope"] is not None, "several rows: pages of 128 tokens")
    needed = [-(-length // size) for length in lengths]
    _ask(len(key) >= sum(needed), "no fewer pages than all sequences together have")
    _ask(table.dtype == torch.int32 and table.shape[0] == len(lengths), "a row of int32 for each sequence")
    _ask(table.shape[1] >= max(needed), "a column for each page of the longest sequence")
    _ask(bool(((table >= 0) & (table < len(key))).all()), "pages that are there")


def _of_pages(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[B, X, L, Y]."""
    return pages[table.long()].transpose(1, 2).flatten(2, 3)


def _attended(
    q_XSY: torch.Tensor, k_XLY: torch.Tensor, v_XLY: torch.Tensor, scale: float, is_causal: bool
) -> torch.Tensor:
    group = len(q_XSY) // len(k_XLY)
    k_XLY, v_XLY = (part.float().repeat_interleave(group, 0) for part in (k_XLY, v_XLY))
    scores_XSL = q_XSY.float() @ k_XLY.transpose(1, 2) * scale
    if is_causal:  # the last row sees the last key
        rows, keys = scores_XSL.shape[1:]
        scores_XSL = scores_XSL.masked_fill(torch.ones(rows, keys).triu(keys - rows + 1).bool(), float("-inf"))
    return torch.softmax(scores_XSL, -1) @ v_XLY


COMPUTED: dict[str, Callable[..., Any]] = {
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu_grouped_matmul.List": grouped_matmul,
    "npu_rms_norm": rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_scatter_nd_update_": scatter_nd_update_,
    "npu_swiglu": swiglu,
}
