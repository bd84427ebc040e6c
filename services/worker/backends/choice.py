"""The choice of tokens, as it is asked for: what each row is changed by, how it is chosen, and what is told of it.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from elasticmoe.common.protocol.rank import Sampling

if TYPE_CHECKING:
    from elasticmoe.common.grammar import Bits

LARGEST: Final = 3e38  # of a logit that was changed, either sign
NEVER: Final = -3.4e38  # the logit of a token that may not come: finite, as all logits must be, less than any that may

TEMPERATURES: Final = (1e-6, 1e6)

Numbers = npt.NDArray[np.number[Any]]
"""One field of what is sent: rows, places and ids are int64, words of masks int32, what logits are changed by float32.
None is carried as a number of another kind, which some device might round."""


class Edits(NamedTuple):
    """What is changed of a row's logits, in this order. `biases`: added; `repetition`: what logits of `seen` tokens are
    divided by, or multiplied with below 0; `penalties`: taken away; `banned`: may not come. Token ids beyond the
    vocabulary are ignored."""

    biases: Sequence[tuple[int, float]]
    repetition: float
    seen: Iterable[int]
    penalties: Sequence[tuple[int, float]]
    banned: Sequence[int]


class TokenChoice(NamedTuple):
    """Of one row. `uniform`: in [0, 1), what the draw falls on; None: the greatest is taken. `num_top`: how many of the
    best are told of beside the chosen one; -1: no log probabilities. `allowed`: others may not come, whatever the edits
    are; None: all may."""

    sampling: Sampling
    uniform: float | None
    edits: Edits | None
    num_top: int
    allowed: Bits | None = None


class Judged(NamedTuple):
    """Logits of a row as the model gave them, NEVER where a token is not allowed: of its token, and ids and logits of
    the best, best first, of equals the lower id; `log_total`: log of the sum of e^logit, NaN where a logit is not
    finite."""

    log_total: float
    token: float
    top: list[tuple[int, float]]


class Chosen(NamedTuple):
    """A row's token, -1 where a logit is not finite; or what its choice raised, which touches no other row."""

    token: int
    judged: Judged | None = None
    error: Exception | None = None


def check_draw(sampling: Sampling, uniform: float) -> None:
    """Raises ValueError for what no token can be drawn by."""
    low, high = TEMPERATURES
    if not low <= sampling.temperature <= high or sampling.top_k < 0:
        raise ValueError(f"temperature {sampling.temperature} must be {low:g} to {high:g}, top_k at least 0")
    if not (0 <= sampling.top_p <= 1 and 0 <= sampling.min_p <= 1 and 0 <= uniform < 1):
        raise ValueError(f"top_p {sampling.top_p}, min_p {sampling.min_p}, uniform {uniform} must be 0 to 1")


def edit_fields(choices: Sequence[TokenChoice], vocab: int) -> dict[str, Numbers]:
    """All rows' edits as places in the logits and numbers for them; of kinds that nobody asks for, nothing."""
    places: dict[str, list[int]] = {"biased": [], "seen": [], "penalized": [], "banned": []}
    numbers: dict[str, list[float]] = {"biases": [], "repetitions": [], "penalties": []}
    for row, edits in enumerate(choice.edits for choice in choices):
        if edits is None:
            continue
        of_row: dict[str, Sequence[tuple[int, float]]] = {
            "biased": edits.biases,
            "seen": [(token, edits.repetition) for token in edits.seen] if edits.repetition != 1.0 else [],
            "penalized": edits.penalties,
            "banned": [(token, NEVER) for token in edits.banned],
        }
        for (place, pairs), number in zip(of_row.items(), (*numbers, None), strict=True):
            inside = [(token, value) for token, value in pairs if 0 <= token < vocab]
            places[place] += [row * vocab + token for token, _ in inside]
            if number is not None:
                numbers[number] += [value for _, value in inside]
    fields: dict[str, Numbers] = {name: np.array(values, dtype=np.int64) for name, values in places.items() if values}
    return fields | {name: np.array(values, dtype=np.float32) for name, values in numbers.items() if values}


def mask_fields(choices: Sequence[TokenChoice], vocab: int) -> dict[str, Numbers]:
    """Rows of which not all tokens are allowed, and 32 tokens of one in each number; nothing where there are none."""
    rows = [row for row, choice in enumerate(choices) if choice.allowed is not None]
    if not rows:
        return {}
    bits_RN = np.zeros((len(rows), 4 * -(-vocab // 32)), dtype=np.uint8)
    for bits_N, row in zip(bits_RN, rows, strict=True):
        bits_N[: -(-vocab // 8)] = np.frombuffer(choices[row].allowed or b"", dtype=np.uint8)
    return {"masked": np.array(rows, dtype=np.int64), "words": bits_RN.view("<i4").reshape(-1)}


def apply_masks(logits_BV: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> None:
    """Change logits in place by what `mask_fields` has made, where they lie."""
    if "masked" not in fields:
        return
    rows, vocab = fields["masked"], logits_BV.shape[1]
    words_RW = fields["words"].view(len(rows), -1)
    places = torch.arange(32, dtype=torch.int32, device=words_RW.device)
    allowed_RV = ((words_RW[:, :, None] >> places) & 1).bool().view(len(rows), -1)[:, :vocab]
    logits_BV.index_copy_(0, rows, torch.where(allowed_RV, logits_BV.index_select(0, rows), NEVER))


def mask_row(logits_V: torch.Tensor, allowed: Bits) -> None:
    """The same for one row in the memory of the host, in less time."""
    barred = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), count=len(logits_V), bitorder="little") == 0
    logits_V.masked_fill_(torch.from_numpy(barred), NEVER)


def apply_edits(logits_BV: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> None:
    """Change logits in place by what `edit_fields` has made, where they lie. What is changed stays finite."""
    flat = logits_BV.view(-1)

    def change(places: str, numbers: str, by: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        if places in fields:
            at = fields[places]
            changed = by(flat.index_select(0, at), fields[numbers])
            flat.index_copy_(0, at, changed.clamp_(-LARGEST, LARGEST))

    if "biased" in fields:  # a token may have several
        flat.index_add_(0, fields["biased"], fields["biases"])
    change("biased", "biases", lambda logits, _: logits)
    change("seen", "repetitions", lambda logits, by: torch.where(logits > 0, logits / by, logits * by))
    change("penalized", "penalties", lambda logits, by: logits - by)
    if "banned" in fields:
        flat.index_fill_(0, fields["banned"], NEVER)
