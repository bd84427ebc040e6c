"""The sampler: distributions, options, reproducibility, and rows that do not touch one another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elasticmoe.common.protocol.limits import LOGPROB_MIN
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.services.worker.backends import torch_sampling
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.choice import NEVER, Edits, Numbers, TokenChoice
from elasticmoe.services.worker.backends.factory import open_backend
from elasticmoe.services.worker.backends.torch import TorchBackend
from elasticmoe.services.worker.engine.sampler import Sampled, SamplingState, prompt_logprobs, sample, uniform
from tests.unit.backends import ON_CPU, QueuedBackend
from tests.unit.backends import draw as drawn
from tests.unit.npu_sampling import SAMPLERS, Float32Backend

VOCAB = 50
EDITS = Edits([(7, 1.0)], 1.1, [1, 2], [(3, 0.5)], [4])


USED: list[ComputeBackend] = []  # the last one


@pytest.fixture(autouse=True, scope="module", params=SAMPLERS)
def backend(request: pytest.FixtureRequest) -> Iterator[ComputeBackend]:
    """Every test runs once with each compute backend, and with one on a device without float64."""
    USED.append(SAMPLERS[request.param]())
    yield USED[-1]
    USED.pop()


def state(tokens: Sequence[int] = (1, 2), *, prompt: int = 2, seed: int = 1, **options: Any) -> SamplingState:
    """A sequence whose first `prompt` tokens are its prompt."""
    fields = {key: options.pop(key) for key in ("stop_token_ids", "min_tokens") if key in options}
    request = Submit("r", tuple(tokens[:prompt]), 100, Sampling(seed=seed, **options), **fields)
    return SamplingState(request, list(tokens))


def logits_of(seed: int = 0, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw(row: torch.Tensor, **options: Any) -> int:
    return sample(USED[-1], row[None].clone(), [state(**options)]).tokens[0]


def draws(row: torch.Tensor, count: int = 4000, **options: Any) -> Counter[int]:
    """Tokens of `count` positions under one seed."""
    tokens = list(range(count + 2))
    states = [state(tokens[: 2 + n], **options) for n in range(count)]
    return Counter(sample(USED[-1], row.repeat(count, 1), states).tokens)


def assert_distribution(got: Counter[int], want: torch.Tensor) -> None:
    """Within five standard deviations for each token, and nothing that has no probability."""
    total = sum(got.values())
    for token, p in enumerate(want.tolist()):
        assert abs(got[token] - total * p) <= 5 * math.sqrt(total * p * (1 - p)) + 1e-9, token


def test_greedy_takes_the_first_greatest() -> None:
    logits = torch.stack([logits_of(n) for n in range(4)])
    logits[2] = 1.0
    sampled = sample(USED[-1], logits.clone(), [state(temperature=0.0) for _ in range(4)])
    assert sampled == Sampled(
        [int(logits[0].argmax()), int(logits[1].argmax()), 0, int(logits[3].argmax())], [None] * 4, {}
    )


def test_the_same_position_gives_the_same_token_in_any_company() -> None:
    row = logits_of()
    states = [state(range(n + 2), seed=n % 3, temperature=1.3, top_p=0.9) for n in range(30)]
    together = sample(USED[-1], row.repeat(30, 1), states).tokens
    assert together == [sample(USED[-1], row[None].clone(), [one]).tokens[0] for one in states]
    assert len(set(together)) > 3


class SumsByCompany(TorchDispatchMode):
    """Sums of floats are made in an order that goes by the number of rows, as CUDA's are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See TorchDispatchMode."""
        name = func._schema.name
        if name not in ("aten::cumsum", "aten::sum", "aten::logsumexp") or not args[0].is_floating_point():
            return func(*args, **kwargs or {})
        ends = torch.zeros(*args[0].shape[:-1], 1, dtype=torch.float64, device=args[0].device)
        parts = []
        for part in args[0].split(100 + len(args[0]), dim=-1):
            parts.append(ends + part.double().cumsum(-1))
            ends = parts[-1][..., -1:]
        return torch.cat(parts, -1) if name == "aten::cumsum" else ends[..., 0]


def test_a_row_of_a_large_vocabulary_has_the_same_bits_in_any_company() -> None:
    """Drawn, cut and judged, wherever the order of a device's own sums goes by the number of rows."""
    logits = torch.randn(17, 151_936, generator=torch.Generator().manual_seed(5)) * 5
    options = [(0, 1.0), (0, 0.95), (40, 0.9)]
    asked = [
        TokenChoice(Sampling(seed=1, top_k=options[n % 3][0], top_p=options[n % 3][1]), n / 17, None, 3)
        for n in range(17)
    ]
    with SumsByCompany():
        together = USED[-1].choose(logits.clone(), asked)
        pairs = [USED[-1].choose(logits[n : n + 2].clone(), asked[n : n + 2]) for n in range(0, 16, 5)]
        alone = [USED[-1].choose(logits[n, None].clone(), asked[n : n + 1]) for n in range(17)]
        judged = USED[-1].judge(logits, [0] * 17, 3)
        assert judged == [USED[-1].judge(logits[n, None], [0], 3)[0] for n in range(17)]
    assert all(one.error is None and one.judged is not None for one in together)
    assert [one for (one,) in alone] == together
    assert pairs == [together[n : n + 2] for n in range(0, 16, 5)]


@pytest.mark.parametrize("vocab", [1, 63, 64, 4096, 4097, 151_936])
def test_no_token_is_drawn_that_has_no_share(vocab: int) -> None:
    """Sums are rounded, and none of that falls on a token beside the one that is meant."""
    row = torch.full((vocab,), NEVER)
    row[vocab // 3 :: 7] = logits_of(1, len(row[vocab // 3 :: 7]))
    weights = torch.softmax(row.double(), 0)
    ends = weights.cumsum(0)
    edges = [0.0, math.nextafter(1.0, 0.0), *(min(float(end), 1 - 2**-53) for end in ends[:: max(1, vocab // 20)])]
    numbers = [near for edge in edges for near in (edge, max(0.0, math.nextafter(edge, 0.0)))]
    asked = [TokenChoice(Sampling(seed=1), number, None, -1) for number in numbers]
    for number, chosen in zip(numbers, USED[-1].choose(row.repeat(len(asked), 1), asked), strict=True):
        assert weights[chosen.token] > 0
        assert float(ends[chosen.token] - weights[chosen.token]) - 1e-6 <= number <= float(ends[chosen.token]) + 1e-6


def test_random_numbers_are_uniform_and_independent() -> None:
    values = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == 4000
    assert abs(sum(values) / 4000 - 0.5) < 0.03
    lag = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(values)) / 4000
    assert abs(lag) < 0.01
    assert uniform(7, 9) == uniform(7, 9) != uniform(9, 7)


def test_plain_sampling_follows_the_softmax() -> None:
    row = logits_of()
    assert_distribution(draws(row), torch.softmax(row, 0))
    assert_distribution(draws(row, temperature=0.5), torch.softmax(row / 0.5, 0))


def test_large_vocabulary() -> None:
    row = logits_of(vocab=1000)
    got = draws(row, temperature=0.7)
    want = torch.softmax(row / 0.7, 0)
    assert_distribution(Counter({token // 100: 0 for token in got}) + fold(got), want.view(10, 100).sum(1))


def fold(got: Counter[int]) -> Counter[int]:
    """Counts by hundreds of tokens."""
    folded: Counter[int] = Counter()
    for token, count in got.items():
        folded[token // 100] += count
    return folded


def keep(row: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Softmax over these tokens only."""
    masked = torch.full_like(row, -math.inf)
    masked[list(tokens)] = row[list(tokens)]
    return torch.softmax(masked, 0)


def test_top_k_top_p_and_min_p() -> None:
    row = logits_of()
    order = row.argsort(descending=True).tolist()
    p = torch.softmax(row, 0)
    assert_distribution(draws(row, top_k=4), keep(row, order[:4]))
    assert set(draws(row, top_k=1)) == {order[0]}
    cumulative = p[order].cumsum(0)
    count = int((cumulative < 0.8).sum()) + 1  # the fewest that reach it
    assert_distribution(draws(row, top_p=0.8), keep(row, order[:count]))
    assert set(draws(row, top_p=1e-6)) == {order[0]}
    assert_distribution(draws(row, min_p=0.2), keep(row, [i for i in order if p[i] >= 0.2 * p[order[0]]]))
    # In this order: min-p, then top-k, then top-p of what they leave.
    left = keep(row, order[:6])[order].cumsum(0)
    assert_distribution(draws(row, top_k=6, top_p=0.7), keep(row, order[: int((left < 0.7).sum()) + 1]))


def test_top_p_over_a_flat_large_vocabulary() -> None:
    """Of equals the lower ids stay, the last of them too. Which token a number falls on is known: no need to draw many
    with the slow backend."""
    row, half = torch.zeros(5000), Sampling(seed=1, top_p=0.5)
    for token in (0, 1, 1249, 1250, 2498, 2499):
        assert drawn(USED[-1], row, half, (token + 0.5) / 2500) == token
    assert drawn(USED[-1], row, half, math.nextafter(1.0, 0.0)) == 2499
    count = 4000 if USED[-1].name == "host" else 400
    tokens = draws(row, count, top_p=0.5)
    expected = 2500 * (1 - math.exp(-count / 2500))  # different ones
    assert abs(len(tokens) - expected) < 5 * math.sqrt(expected)
    assert max(tokens) == 2499 if count == 4000 else max(tokens) <= 2499


def test_bias_bans_and_penalties() -> None:
    row = logits_of()
    best = int(row.argmax())
    second = int(row.argsort(descending=True)[1])
    assert draw(row, temperature=0.0, logit_bias=((7, 100.0), (VOCAB + 3, 1.0))) == 7
    assert draw(row, temperature=0.0, logit_bias=((best, -100.0),)) == second
    stops = {"stop_token_ids": (best,), "min_tokens": 2, "temperature": 0.0}
    assert draw(row, tokens=[1, 2, 3], **stops) == second
    assert draw(row, tokens=[1, 2, 3, 4], **stops) == best
    gap = float(row[best] - row[second])
    once, twice = [1, 2, best], [1, 2, best, best]
    assert draw(row, tokens=once, temperature=0.0, presence_penalty=gap * 0.9) == best
    assert draw(row, tokens=once, temperature=0.0, presence_penalty=gap * 1.1) == second
    assert draw(row, tokens=once, temperature=0.0, frequency_penalty=gap * 0.6) == best
    assert draw(row, tokens=twice, temperature=0.0, frequency_penalty=gap * 0.6) == second
    # Presence and frequency count output only, repetition counts the prompt too.
    assert draw(row, tokens=[best, best, 3], temperature=0.0, frequency_penalty=2.0) == best
    assert draw(row, tokens=[best, best, 3], temperature=0.0, repetition_penalty=10.0) != best


def test_a_steps_choices_are_waited_for_once() -> None:
    """Whatever is asked for: greedy, drawn, cut, changed and judged rows, and one that is not finite; on a device the
    numbers travel once each way. Nothing in between looks at a value: there is none."""
    states = [
        *(state(range(n + 2), seed=n, temperature=1.3, top_p=0.9, top_k=n, logprobs=n) for n in range(4)),
        state(temperature=0.0),
        state(temperature=0.0, logprobs=2, logit_bias=((7, 100.0),), presence_penalty=1.0, repetition_penalty=1.1),
        state([1, 2, 3], stop_token_ids=(3,), min_tokens=5),
        state(logprobs=1),
    ]
    logits = torch.stack([logits_of(n) for n in range(len(states))])
    logits[-1, 4] = float("inf")
    for has_float64, same in ((True, TorchBackend()), (False, open_backend("host"))):
        backend = QueuedBackend()
        backend.has_float64, backend.sampler = has_float64, open_backend("host")
        sampled = sample(backend, logits.clone(), states)
        assert backend.num_fences == 1
        want = sample(same, logits.clone(), states)
        assert (sampled.tokens, sampled.logprobs) == (want.tokens, want.logprobs)
        assert set(sampled.errors) == {len(states) - 1}
        prompt_logprobs(backend, logits[:3], [1, 2, 3], 2)
        assert backend.num_fences == 2


@pytest.mark.parametrize("has_float64", [True, False])
def test_what_lies_on_the_device_is_of_dtypes_that_it_has(has_float64: bool) -> None:
    """Whole numbers travel as whole numbers, and a device without float64 never sees any."""
    allowed = bits([1, 7, 31])
    asked = [
        TokenChoice(Sampling(seed=1, top_k=3), 0.5, EDITS, 2, allowed),
        TokenChoice(Sampling(seed=1), None, None, -1),
    ]
    sent: list[dict[str, torch.dtype]] = []

    def send(fields: Mapping[str, Numbers]) -> dict[str, torch.Tensor]:
        there = {name: torch.from_numpy(values).to("meta") for name, values in fields.items()}
        sent.append({name: values.dtype for name, values in there.items()})
        return there

    def fetch(*there: torch.Tensor) -> list[torch.Tensor]:
        assert all(tensor.device.type == "meta" for tensor in there)
        assert torch.float64 not in {tensor.dtype for tensor in there}
        return [torch.zeros_like(tensor, device="cpu") for tensor in there]

    logits = torch.empty(2, VOCAB, device="meta")
    if has_float64:
        chosen = torch_sampling.choose(logits, asked, send, lambda words: fetch(words)[0].numpy())
    else:
        chosen = torch_sampling.choose_on_host(logits, asked, send, fetch, open_backend("host"))
    (dtypes,) = sent
    assert [len(one.judged.top) if one.judged else None for one in chosen] == [2, None]
    assert {dtypes[name] for name in ("drawn", "judged", "masked", "biased", "seen", "penalized", "banned")} == {
        torch.int64
    }
    assert dtypes["words"] == torch.int32
    assert {name for name, dtype in dtypes.items() if dtype == torch.float64} == (
        {"top_p", "uniform"} if has_float64 else set()
    )


def test_which_devices_have_no_float64() -> None:
    for kind, has_float64 in (("cpu", True), ("cuda", True), ("npu", False)):
        device: Any = type("Device", (), {"type": kind})()
        backend = open_backend("torch", None, device)
        assert isinstance(backend, TorchBackend)
        assert (backend.has_float64, backend.sampler is None) == (has_float64, has_float64)
    alone = TorchBackend()  # as nobody opens one
    alone.has_float64 = False
    with pytest.raises(RuntimeError, match="no sampler on the host"):
        alone.judge(torch.zeros(1, 5), [0], 1)


def test_tokens_of_a_device_without_float64_are_those_of_the_host() -> None:
    """Bit by bit, at the very edges of tokens too, of a vocabulary whose sums float32 cannot hold."""
    row = logits_of(vocab=100_000)
    ends = torch.softmax(row.double(), 0).cumsum(0)
    edges = [float(end) for end in ends[:: len(ends) // 40]]
    choices = [
        TokenChoice(Sampling(seed=1, top_k=top_k, top_p=top_p), uniform, None, 3)
        for uniform in [0.0, *edges, *(math.nextafter(edge, 0.0) for edge in edges)]
        for top_k, top_p in ((0, 1.0), (0, 0.95), (9_000, 0.7))
    ]
    got, want = (
        open_one().choose(row.repeat(len(choices), 1), choices) for open_one in (Float32Backend, ON_CPU["host"])
    )
    assert got == want


def test_places_beyond_what_float32_counts() -> None:
    """An odd place behind 2^24, of the last token of the last row."""
    vocab = 1 << 20
    logits = torch.zeros(17, vocab)
    edits = Edits([(vocab - 1, 5.0)], 1.0, (), (), (vocab - 3,))
    greedy = TokenChoice(Sampling(seed=1), None, None, -1)
    chosen = USED[-1].choose(logits, [greedy] * 16 + [greedy._replace(edits=edits)])
    assert [one.token for one in chosen] == [0] * 16 + [vocab - 1]
    assert torch.equal(logits[16, -4:], torch.tensor([0.0, NEVER, 0.0, 5.0]))
    assert not logits[:16].any()


def test_places_of_edits_are_of_their_own_row() -> None:
    """Ids beyond the vocabulary are ignored: they would be the next row's."""
    edits = Edits([(VOCAB, 5.0), (-1, 5.0), (3, 1.0), (3, 1.0)], 2.0, [VOCAB + 1, 4], [(VOCAB + 2, 1.0)], [VOCAB, 5])
    greedy = TokenChoice(Sampling(seed=1), None, None, -1)
    logits = torch.ones(3, VOCAB)
    USED[-1].choose(logits, [greedy, greedy._replace(edits=edits), greedy])
    want = torch.ones(3, VOCAB)
    want[1, 3:6] = torch.tensor([3.0, 0.5, NEVER])
    assert torch.equal(logits, want)


def bits(allowed: Sequence[int], vocab: int = VOCAB) -> bytearray:
    """A mask of these tokens."""
    return bytearray(np.packbits([token in allowed for token in range(vocab)], bitorder="little").tobytes())


def test_a_mask_leaves_what_is_allowed() -> None:
    """As sampling from a model that knows no other tokens, whatever the edits would have; others' rows are as ever."""
    for vocab in (VOCAB, 64, 65):
        row = logits_of(3, vocab)
        allowed = sorted({1, 7, 8, 31, 32, 33, vocab - 1} - {vocab})
        few = torch.full_like(row, NEVER)
        few[allowed] = row[allowed]
        for options in (
            {"temperature": 0.0},
            {"temperature": 1.5, "top_p": 0.8},
            {"top_k": 2, "min_p": 0.1},
            {"repetition_penalty": 3.0, "presence_penalty": 1.0, "logit_bias": ((2, 100.0), (7, -100.0))},
        ):
            states = [state(range(n + 2), seed=n, **options) for n in range(20)]
            masked = [each._replace(allowed=bits(allowed, vocab)) for each in states]
            got = sample(USED[-1], row.repeat(20, 1), masked)
            assert got.tokens == sample(USED[-1], few.repeat(20, 1), states).tokens
            assert set(got.tokens) <= set(allowed)
            mixed = [masked[n] if n % 3 else states[n] for n in range(20)]
            plain = sample(USED[-1], row.repeat(20, 1), states).tokens
            want = [got.tokens[n] if n % 3 else plain[n] for n in range(20)]
            assert sample(USED[-1], row.repeat(20, 1), mixed).tokens == want


def test_what_is_told_of_a_masked_row_is_of_what_is_allowed() -> None:
    row = logits_of()
    asked = state(logprobs=4, temperature=0.0, logit_bias=((9, 5.0),))._replace(allowed=bits([4, 9, 40]))
    (told,) = sample(USED[-1], row[None].clone(), [asked]).logprobs
    assert told is not None
    want = torch.log_softmax(row[[4, 9, 40]], 0).tolist()
    assert dict(told.top[:3]) == pytest.approx(dict(zip((4, 9, 40), want, strict=True)), abs=1e-5)
    assert told.top[3][1] == LOGPROB_MIN


def test_a_row_of_which_nothing_may_come_fails_alone() -> None:
    """The grammar leaves only what ends the answer, and that may not come yet."""
    row = logits_of()
    barred = state([1, 2, 3], stop_token_ids=(3,), min_tokens=5)._replace(allowed=bits([3]))
    got = sample(USED[-1], row.repeat(3, 1), [state(), barred, state()._replace(allowed=bits([]))])
    assert got.tokens[0] == sample(USED[-1], row[None].clone(), [state()]).tokens[0]
    assert {number: error.code for number, error in got.errors.items()} == {1: "bad_logits", 2: "bad_logits"}


def test_repetition_penalty_works_on_both_signs() -> None:
    row = torch.tensor([2.0, 1.5, -1.0, -1.5])
    sample(USED[-1], row[None], [state([0, 2], temperature=0.0, repetition_penalty=2.0)])
    assert row.tolist() == [1.0, 1.5, -2.0, -1.5]


def test_a_bad_row_fails_alone() -> None:
    logits = torch.stack([logits_of(n) for n in range(6)])
    options = [{"temperature": 0.0}, {"temperature": 1.0}, {"logprobs": 2}] * 2
    want = sample(USED[-1], logits.clone(), [state(**o) for o in options])
    logits[0, 3], logits[1, 49], logits[5, 0] = float("nan"), float("inf"), float("-inf")
    got = sample(USED[-1], logits.clone(), [state(**o) for o in options])
    assert sorted(got.errors) == [0, 1, 5]
    assert {error.code for error in got.errors.values()} == {"bad_logits"}
    assert [got.tokens[n] for n in (0, 1, 5)] == [-1, -1, -1]
    assert [got.tokens[n] for n in (2, 3, 4)] == [want.tokens[n] for n in (2, 3, 4)]
    assert got.logprobs[2] == want.logprobs[2] is not None


def test_logprobs_are_of_the_raw_logits() -> None:
    row = logits_of()
    raw = torch.log_softmax(row.double(), 0)
    order = row.argsort(descending=True).tolist()
    sampled = sample(USED[-1], row[None].clone(), [state(temperature=0.0, logprobs=3, logit_bias=((7, 100.0),))])
    logprob = sampled.logprobs[0]
    assert sampled.tokens == [7]
    assert logprob is not None
    assert logprob.token == pytest.approx(float(raw[7]), abs=1e-5)
    assert [token for token, _ in logprob.top] == order[:3]
    assert [value for _, value in logprob.top] == pytest.approx(raw[order[:3]].tolist(), abs=1e-5)
    only = sample(USED[-1], row[None].clone(), [state(logprobs=0)]).logprobs[0]
    assert only is not None
    assert only.top == ()


def test_prompt_logprobs() -> None:
    logits = torch.stack([logits_of(n) for n in range(3)])
    result = prompt_logprobs(USED[-1], logits, [4, 0, 49], 2)
    for row, token, logprob in zip(logits, (4, 0, 49), result, strict=True):
        raw = torch.log_softmax(row.double(), 0)
        assert logprob.token == pytest.approx(float(raw[token]), abs=1e-5)
        assert [i for i, _ in logprob.top] == row.argsort(descending=True)[:2].tolist()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        sample(USED[-1], torch.zeros(2, 5), [state()])
    with pytest.raises(ValueError, match="float32"):
        sample(USED[-1], torch.zeros(1, 5, dtype=torch.float64), [state()])
    with pytest.raises(ValueError, match="strides"):
        sample(USED[-1], torch.zeros(5, 2).T[:1], [state()])
