"""The choice of tokens of backends that compute with tensors, with the native kernels' rules
(native/src/kernels/sampling.cpp): all rows at once, where the logits lie, and one transfer each way. Sums are float64:
where a device has none, rows that are drawn or judged are brought to the host, and its kernels do that
(`choose_on_host`).

A row's place among others changes no bit: exponentials are of rows that are padded to whole vectors, and sums run along
a row from its first token to its last. Shape suffixes: B sequences, V vocabulary, D rows that are drawn, J rows that
are judged, L a padded row.
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

_VECTOR: Final = 64  # elements: rows begin at multiples
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
    ends_DL = weights_DL.double().cumsum(1)
    tokens_D = (ends_DL <= draws.uniform * ends_DL[:, -1:]).sum(1)
    ids_L = torch.arange(weights_DL.shape[1], device=weights_DL.device)
    last_D = torch.where(weights_DL > 0, ids_L, 0).amax(1)  # rounding may carry it past the end
    return torch.minimum(tokens_D, last_D)


def _greatest_only(weights_DL: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The `top_k` greatest, and of these the fewest that make up `top_p` of them, one at least; others become 0. Of
    equals the lower ids stay."""
    sorted_DL, order_DL = torch.sort(weights_DL, dim=1, descending=True, stable=True)
    at_L = torch.arange(weights_DL.shape[1], device=weights_DL.device)
    sorted_DL = torch.where(at_L < top_k, sorted_DL, 0.0)
    sums_DL = sorted_DL.double().cumsum(1)
    kept_D1 = (sums_DL < top_p * sums_DL[:, -1:]).sum(1, keepdim=True) + 1
    sorted_DL = torch.where((at_L < kept_D1) | (top_p >= 1), sorted_DL, 0.0)
    return torch.zeros_like(weights_DL).scatter_(1, order_DL, sorted_DL)


def _exponentials(logits_DV: torch.Tensor, factor_D1: torch.Tensor) -> torch.Tensor:
    """Weights relative to the greatest logit's, which has 1."""
    logits_DL = pad(logits_DV, (0, -logits_DV.shape[1] % _VECTOR), value=-torch.inf)
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
    totals_J = _exponentials(raw_JV, ones_J1).double().cumsum(1)[:, -1].log() + raw_JV.amax(1).double()
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
