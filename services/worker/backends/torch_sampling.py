"""The choice of tokens of backends that compute with tensors, with the native kernels' rules
(native/src/kernels/sampling.cpp): all rows at once, where the logits lie, and one transfer each way. Sums are float64:
where a device has none, rows that are drawn or judged are brought to the host, and its kernels do that
(`choose_on_host`).

A row's place among others, and their number, change no bit on any device:

- What is computed of single elements, exponentials and logarithms among it, is the element's own. Rows are padded to
  whole blocks: none is the rest of a vector, which some CPU might compute by other instructions.
- The greatest and the least, stable sorting, copies by index and all in whole numbers are exact: whatever way a device
  takes there, by the number of rows or not, there is one result.
- Sums of float64 are rounded, and torch's own (`cumsum`, `sum`) go by an order that devices choose by the number of
  rows, CUDA for a single row by chance. So they are made of additions of single elements, whose order the length of a
  row decides alone (`_halved`, `_ends`).

Shape suffixes: B sequences, V vocabulary, D rows that are drawn, J rows that are judged, L a padded row, N blocks of
it, K elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.choice import (
    Chosen,
    Judged,
    Numbers,
    TokenChoice,
    apply_edits,
    apply_masks,
    check_draw,
    edit_fields,
    mask_fields,
)

_VECTOR: Final = 64  # elements: no CPU's vectors have more
_JUDGED: Final = 16  # rows at once: sorting takes several times their memory

_DRAWN: Final = {  # of Draws
    "inverse_temperature": np.float32,
    "min_p": np.float32,
    "top_k": np.int64,
    "top_p": np.float64,
    "uniform": np.float64,
}
SENT: Final = (torch.int32, torch.int64, torch.float32, torch.float64)  # what fields are of; where there is float64

Words = npt.NDArray[np.int32]
SendFields = Callable[[Mapping[str, Numbers]], dict[str, torch.Tensor]]
FetchWords = Callable[[torch.Tensor], Words]
FetchTensors = Callable[..., list[torch.Tensor]]
Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Draws(NamedTuple):
    """How rows are drawn, [D, 1] each. `top_k`: V where all may come; `is_cut`: whether any row's is not all."""

    inverse_temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    uniform: torch.Tensor
    is_cut: bool


def choose(
    logits_BV: torch.Tensor, choices: Sequence[TokenChoice], send: SendFields, fetch: FetchWords
) -> list[Chosen]:
    """See ComputeBackend. `send` brings fields to the logits, `fetch` words of 4 bytes back: each is called once."""
    vocab = logits_BV.shape[1]
    rows = _Rows.of(choices)
    sent = send(
        _draw_fields([choices[row] for row in rows.drawn], vocab) | rows.fields() | _edit_fields(choices, vocab)
    )
    is_finite_B, raw_JV = _change(logits_BV, sent)
    tokens_B = _first_greatest(logits_BV)
    if rows.drawn:
        is_cut = any(_is_cut(choices[row]) for row in rows.drawn)
        draws = Draws(**{name: sent[name][:, None] for name in _DRAWN}, is_cut=is_cut)
        tokens_B.index_copy_(0, sent["drawn"], draw_rows(logits_BV.index_select(0, sent["drawn"]), draws))
    parts = [torch.where(is_finite_B, tokens_B, -1).int()]
    if rows.judged:
        parts += _judge(raw_JV, tokens_B.index_select(0, sent["judged"]), rows.num_top(choices, vocab))
    words = fetch(torch.cat([part.view(torch.int32) for part in parts]))
    tokens, rest = words[: len(choices)].tolist(), words[len(choices) :]
    return rows.told(choices, tokens, _told(rest, len(rows.judged), rows.num_top(choices, vocab)))


def choose_on_host(
    logits_BV: torch.Tensor, choices: Sequence[TokenChoice], send: SendFields, fetch: FetchTensors, host: ComputeBackend
) -> list[Chosen]:
    """The same without float64: rows are changed, and the greatest taken, where they lie; `host` draws and judges
    copies. What is sent are whole numbers and float32. `fetch` brings tensors to the host: it is called once."""
    vocab = logits_BV.shape[1]
    rows = _Rows.of(choices)
    sent = send(rows.fields() | _edit_fields(choices, vocab))
    is_finite_B, raw_JV = _change(logits_BV, sent)
    greatest_B = torch.where(is_finite_B, _first_greatest(logits_BV), -1).int()
    greatest_B, rows_DV, raw_JV = fetch(greatest_B, logits_BV.index_select(0, sent["drawn"]), raw_JV)
    tokens = greatest_B.tolist()
    draws = [choices[row]._replace(edits=None, num_top=-1, allowed=None) for row in rows.drawn]
    for row, chosen in zip(rows.drawn, host.choose(rows_DV, draws), strict=True):
        rows.errors[row] = chosen.error
        if tokens[row] >= 0:
            tokens[row] = chosen.token
    judged = host.judge(raw_JV, [max(tokens[row], 0) for row in rows.judged], rows.num_top(choices, vocab))
    return rows.told(choices, tokens, judged)


def judge(
    logits_NV: torch.Tensor, tokens: Sequence[int], num_top: int, send: SendFields, fetch: FetchWords
) -> list[Judged]:
    """See ComputeBackend."""
    count = min(num_top, logits_NV.shape[1])
    tokens_N = send({"tokens": np.array(tokens, dtype=np.int64)})["tokens"]
    judged = [part.view(torch.int32) for part in _judge(logits_NV, tokens_N, count)]
    return _told(fetch(torch.cat(judged)), len(tokens), count)


class _Rows(NamedTuple):
    """Which rows are drawn and which are judged, and what the choices of others raise."""

    drawn: list[int]
    judged: list[int]
    errors: list[Exception | None]

    @classmethod
    def of(cls, choices: Sequence[TokenChoice]) -> _Rows:
        """Of a step's choices."""
        errors = [_error_of(choice) for choice in choices]
        drawn = [row for row, choice in enumerate(choices) if choice.uniform is not None and errors[row] is None]
        return cls(drawn, [row for row, choice in enumerate(choices) if choice.num_top >= 0], errors)

    def fields(self) -> dict[str, Numbers]:
        """To be sent."""
        return {"drawn": np.array(self.drawn, dtype=np.int64), "judged": np.array(self.judged, dtype=np.int64)}

    def num_top(self, choices: Sequence[TokenChoice], vocab: int) -> int:
        """How many of the best any row asks for."""
        return min(vocab, max((choices[row].num_top for row in self.judged), default=0))

    def told(self, choices: Sequence[TokenChoice], tokens: list[int], judged: list[Judged]) -> list[Chosen]:
        """All rows, of what was made of some."""
        by_row = dict(zip(self.judged, judged, strict=True))
        return [
            Chosen(tokens[row], _shortened(by_row.get(row), choice.num_top), self.errors[row])
            for row, choice in enumerate(choices)
        ]


def _edit_fields(choices: Sequence[TokenChoice], vocab: int) -> dict[str, Numbers]:
    """All that rows are changed by."""
    return mask_fields(choices, vocab) | edit_fields(choices, vocab)


def _change(logits_BV: torch.Tensor, sent: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Change logits in place. Which rows are finite, and copies of those that are judged, as they came."""
    is_finite_B = torch.isfinite(logits_BV).all(1)
    apply_masks(logits_BV, sent)
    raw_JV = logits_BV.index_select(0, sent["judged"])
    apply_edits(logits_BV, sent)
    return is_finite_B, raw_JV


def draw_rows(logits_DV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """int64 [D]: see TokenChoice. Of rows that are not finite any number."""
    weights_DL = _exponentials(logits_DV, draws.inverse_temperature)
    weights_DL = torch.where(weights_DL < draws.min_p, 0.0, weights_DL)
    if draws.is_cut:
        weights_DL = _greatest_only(weights_DL, draws.top_k, draws.top_p)
    return _place_of(weights_DL, draws.uniform, torch.gt)


def _greatest_only(weights_DL: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The `top_k` greatest, and of these the fewest that make up `top_p` of them, one at least; others become 0. Of
    equals the lower ids stay."""
    sorted_DL, order_DL = torch.sort(weights_DL, dim=1, descending=True, stable=True)
    at_L = torch.arange(weights_DL.shape[1], device=weights_DL.device)
    sorted_DL = torch.where(at_L < top_k, sorted_DL, 0.0)
    kept_D1 = _place_of(sorted_DL, top_p, torch.ge)[:, None] + 1
    sorted_DL = torch.where((at_L < kept_D1) | (top_p >= 1), sorted_DL, 0.0)
    return torch.zeros_like(weights_DL).scatter_(1, order_DL, sorted_DL)


def _block(length: int) -> int:
    """Elements of a block of a row of that length, padded or not: a power of two, about as many as there are blocks."""
    return max(_VECTOR, 1 << ((length - 1).bit_length() + 1) // 2)


def _blocks(values_DL: torch.Tensor) -> torch.Tensor:
    """[D, N, K], of padded rows."""
    num_rows, length = values_DL.shape
    return values_DL.view(num_rows, length // _block(length), _block(length))


def _place_of(weights_DL: torch.Tensor, share_D1: torch.Tensor, is_past: Compare) -> torch.Tensor:
    """int64 [D]: of the places that have a weight the first one at which the sum of all up to it `is_past` that share
    of the whole; the last of them where rounding keeps it from any. In the block in which that happens, by sums of
    blocks, it is looked for."""
    blocks_DNK = _blocks(weights_DL)
    block = blocks_DNK.shape[2]
    sums_DN = _halved(blocks_DNK)
    ends_DN = _ends(sums_DN)
    goal_D1 = share_D1 * ends_DN[:, -1:]
    block_D1 = _first(is_past(ends_DN, goal_D1), sums_DN > 0)
    before_D1 = pad(ends_DN, (1, 0)).gather(1, block_D1)
    weights_DK = blocks_DNK.gather(1, block_D1[:, :, None].expand(-1, -1, block))[:, 0]
    ends_DK = before_D1 + _ends(weights_DK.double())
    return (block_D1 * block + _first(is_past(ends_DK, goal_D1), weights_DK > 0))[:, 0]


def _first(is_it_DN: torch.Tensor, may_be_DN: torch.Tensor) -> torch.Tensor:
    """int64 [D, 1]: the first place of a row that is it of those that may be, else the last that may be, else 0."""
    count = is_it_DN.shape[1]
    places_N = torch.arange(count, device=is_it_DN.device)
    first_D1 = torch.where(is_it_DN & may_be_DN, places_N, count).amin(1, keepdim=True)
    last_D1 = torch.where(may_be_DN, places_N, 0).amax(1, keepdim=True)
    return torch.minimum(first_D1, last_D1)


def _halved(values_DNK: torch.Tensor) -> torch.Tensor:
    """float64 [D, N]: sums of blocks. One half of a block is added to the other until one element is left."""
    while half := values_DNK.shape[-1] // 2:
        values_DNK = values_DNK[..., :half].double() + values_DNK[..., half:]
    return values_DNK[..., 0]


def _ends(values_DN: torch.Tensor) -> torch.Tensor:
    """[D, N]: at each place the sum of all up to it. What was added up is added to itself, moved on by 1, 2, 4 and so
    on: of what ends at a place, the earlier half to the later one."""
    moved = 1
    while moved < values_DN.shape[1]:
        values_DN = values_DN + pad(values_DN[:, :-moved], (moved, 0))
        moved *= 2
    return values_DN


def _exponentials(logits_DV: torch.Tensor, factor_D1: torch.Tensor) -> torch.Tensor:
    """Weights relative to the greatest logit's, which has 1."""
    logits_DL = pad(logits_DV, (0, -logits_DV.shape[1] % _block(logits_DV.shape[1])), value=-torch.inf)
    shifted_DL = (logits_DL - logits_DL.amax(1, keepdim=True)) * factor_D1
    return torch.where(shifted_DL < -87.0, 0.0, shifted_DL.exp())


def _first_greatest(logits_BV: torch.Tensor) -> torch.Tensor:
    """int64 [B]. argmax may take any of equals."""
    ids_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    is_greatest_BV = logits_BV == logits_BV.amax(1, keepdim=True)
    return torch.where(is_greatest_BV, ids_V, logits_BV.shape[1] - 1).amin(1)


def _judge(raw_JV: torch.Tensor, tokens_J: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Log totals (float64) and the tokens' logits [J], then ids (int32) and logits of the best [J x count]."""
    parts = zip(torch.split(raw_JV, _JUDGED), torch.split(tokens_J, _JUDGED), strict=True)
    some = [_judge_some(raw, tokens, count) for raw, tokens in parts]
    return [torch.cat(parts) for parts in zip(*some, strict=True)]


def _judge_some(raw_JV: torch.Tensor, tokens_J: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    ones_J1 = torch.ones((len(raw_JV), 1), device=raw_JV.device)
    weights_JL = _exponentials(raw_JV, ones_J1)
    totals_J = _ends(_halved(_blocks(weights_JL)))[:, -1].log() + raw_JV.amax(1).double()
    totals_J = torch.where(torch.isfinite(raw_JV).all(1), totals_J, torch.nan)
    own_J = raw_JV.gather(1, tokens_J[:, None])[:, 0]
    best_JV = torch.sort(raw_JV, dim=1, descending=True, stable=True)
    ids, logits = (part[:, :count].reshape(-1) for part in (best_JV.indices, best_JV.values))
    return totals_J, own_J, ids.int(), logits


def _told(words: Words, num_rows: int, count: int) -> list[Judged]:
    """What `_judge` has made, on the host."""
    totals, own, ids, logits = np.split(words, np.cumsum([2 * num_rows, num_rows, num_rows * count]))
    return [
        Judged(total, token, list(zip(best_ids, best_logits, strict=True)))
        for total, token, best_ids, best_logits in zip(
            totals.view(np.float64).tolist(),
            own.view(np.float32).tolist(),
            ids.reshape(num_rows, count).tolist(),
            logits.view(np.float32).reshape(num_rows, count).tolist(),
            strict=True,
        )
    ]


def _shortened(judged: Judged | None, num_top: int) -> Judged | None:
    return None if judged is None else judged._replace(top=judged.top[:num_top])


def _error_of(choice: TokenChoice) -> Exception | None:
    if choice.uniform is None:
        return None
    try:
        check_draw(choice.sampling, choice.uniform)
    except ValueError as error:
        return error
    return None


def _is_cut(choice: TokenChoice) -> bool:
    return choice.sampling.top_k > 0 or choice.sampling.top_p < 1


def _draw_fields(choices: Sequence[TokenChoice], vocab: int) -> dict[str, Numbers]:
    """What Draws are made of; nothing where no row is drawn."""
    columns = [
        (1.0 / c.sampling.temperature, c.sampling.min_p, c.sampling.top_k or vocab, c.sampling.top_p, c.uniform or 0.0)
        for c in choices
    ]
    return dict(zip(_DRAWN, map(np.array, zip(*columns, strict=True), _DRAWN.values()), strict=False))
