"""Sampling parameters at and beyond their bounds, over any logits: a token of the vocabulary, or one typed error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from elasticmoe.common.protocol.errors import InvalidRequest, RequestFailed
from elasticmoe.common.protocol.limits import LOGIT_BIAS_MAX, LOGPROB_MIN, LOGPROBS_MAX, STOP_TOKEN_IDS_MAX, VOCAB_MAX
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Logprob
from elasticmoe.native import kernels
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.schemas import ChatRequest, CompletionRequest, GenerateRequest
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.choice import NEVER, Chosen, Judged, TokenChoice
from elasticmoe.services.worker.engine.sampler import SamplingState, prompt_logprobs, sample
from tests.unit.backends import draw
from tests.unit.npu_sampling import SAMPLERS

FLOAT_MAX = torch.finfo(torch.float32).max
TINY = 5e-324  # the least double above 0


USED: list[ComputeBackend] = []  # the last one


@pytest.fixture(autouse=True, scope="module", params=SAMPLERS)
def backend(request: pytest.FixtureRequest) -> Iterator[ComputeBackend]:
    """Every test runs once with each compute backend, and with one on a device without float64."""
    USED.append(SAMPLERS[request.param]())
    yield USED[-1]
    USED.pop()


def between(low: float, high: float, *special: float) -> st.SearchStrategy[float]:
    """Bounds, their neighbours, the least numbers, and anything else."""
    edges = {low, high, math.nextafter(low, high), math.nextafter(high, low), *special}
    edges |= {value for value in (0.0, -0.0, TINY, -TINY, 1e-300, 1e-40, 1e-9, 1.0) if low <= value <= high}
    return st.sampled_from(sorted(edges)) | st.floats(low, high)


@st.composite
def samplings(draw: st.DrawFn, vocab: int) -> Sampling:
    tokens = st.integers(0, vocab - 1) | st.integers(0, VOCAB_MAX - 1)
    bias = st.tuples(tokens, between(-100.0, 100.0))
    return Sampling(
        seed=draw(st.sampled_from([0, 1, (1 << 63) - 1]) | st.integers(0, (1 << 63) - 1)),
        temperature=draw(between(0.0, 10.0, 1e-5, 9.9e-6)),
        top_p=draw(between(0.0, 1.0)),
        top_k=draw(st.sampled_from([0, 1, 2, vocab, VOCAB_MAX])),
        min_p=draw(between(0.0, 1.0)),
        presence_penalty=draw(between(-2.0, 2.0)),
        frequency_penalty=draw(between(-2.0, 2.0)),
        repetition_penalty=draw(between(0.01, 10.0)),
        logit_bias=tuple(draw(st.lists(bias, max_size=6) | st.just([(0, 100.0)] * LOGIT_BIAS_MAX))),
        logprobs=draw(st.sampled_from([-1, 0, 1, LOGPROBS_MAX])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], SamplingState]:
    """A row of any float32 numbers, most of them finite, and a sequence."""
    vocab = draw(st.sampled_from([1, 2, 3, 17, 40]))
    finite = st.floats(-FLOAT_MAX, FLOAT_MAX, width=32) | st.sampled_from([FLOAT_MAX, -FLOAT_MAX, 3e38, -3e38, 0.0])
    plain = st.floats(-30, 30, width=32)
    kind = draw(st.sampled_from([plain, finite, finite, st.floats(width=32), st.just(draw(finite))]))
    row = draw(st.lists(kind, min_size=vocab, max_size=vocab))
    tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=12))
    num_prompt = draw(st.integers(1, len(tokens)))
    stops = draw(st.lists(st.integers(0, vocab - 1) | st.just(VOCAB_MAX - 1), max_size=STOP_TOKEN_IDS_MAX))
    fields = {"stop_token_ids": tuple(stops), "min_tokens": draw(st.sampled_from([0, 0, 1, 1_000]))}
    request = Submit("r", tuple(tokens[:num_prompt]), 100, draw(samplings(vocab)), **fields)
    return row, SamplingState(request, tokens)


def is_sound(logprob: Logprob) -> bool:
    values = [logprob.token, *(value for _, value in logprob.top)]
    return all(LOGPROB_MIN <= value <= 0.0 for value in values)


@settings(max_examples=800)
@given(cases())
def test_any_logits_and_options_give_a_token_or_one_error(case: tuple[list[float], SamplingState]) -> None:
    row, state = case
    vocab, request = len(row), state.request
    other = torch.linspace(-1.0, 1.0, vocab)
    neighbour = SamplingState(Submit("n", (0,), 9, Sampling(seed=4, logprobs=1)), [0])
    logits = torch.stack([other, torch.tensor(row, dtype=torch.float32), other])
    alone = sample(USED[-1], other[None].clone(), [neighbour])
    first, again = (sample(USED[-1], logits.clone(), [neighbour, state, neighbour]) for _ in range(2))
    assert first.tokens == again.tokens
    assert first.logprobs == again.logprobs
    assert [first.tokens[n] for n in (0, 2)] == alone.tokens * 2
    assert [first.logprobs[n] for n in (0, 2)] == alone.logprobs * 2
    is_finite = all(math.isfinite(value) for value in row)
    is_early = len(state.tokens) - len(request.prompt) < request.min_tokens
    banned = {token for token in request.stop_token_ids if is_early}
    if not is_finite or banned >= set(range(vocab)):
        assert set(first.errors) == {1}
        assert first.errors[1].code == "bad_logits"
        assert first.tokens[1] == -1
        return
    if 1 in first.errors:  # only where nothing that may come is greater than what may not
        assert banned
        assert min(row) < NEVER
        return
    assert first.errors == {}
    assert 0 <= first.tokens[1] < vocab
    assert first.tokens[1] not in banned
    logprob = first.logprobs[1]
    assert (logprob is not None) == (request.sampling.logprobs >= 0)
    if logprob is not None:
        assert len(logprob.top) == min(vocab, request.sampling.logprobs)
        assert is_sound(logprob)
        (prompt,) = prompt_logprobs(USED[-1], torch.tensor([row], dtype=torch.float32), [first.tokens[1]], 3)
        assert is_sound(prompt)


@pytest.mark.parametrize("kernels_of", kernels.instruction_sets())
def test_kernels_stay_within_the_row(kernels_of: str) -> None:
    if USED[-1].name != "host" and kernels_of != kernels.instruction_sets()[0]:
        return  # it has no instruction sets: once is enough

    @settings(max_examples=300)
    @given(case=cases())
    def check(case: tuple[list[float], SamplingState]) -> None:
        row, state = case
        logits, options = torch.tensor([row], dtype=torch.float32), state.request.sampling
        for temperature in (1e-6, max(1e-6, options.temperature), 1e6):
            for uniform in (0.0, 1.0 - 2.0**-53):
                sampling = msgspec.structs.replace(options, temperature=temperature)
                token = draw(USED[-1], logits[0], sampling, uniform)
                is_finite = all(math.isfinite(value) for value in row)
                assert 0 <= token < len(row) if is_finite else token == -1

    kernels.use_instruction_set(kernels_of)
    try:
        check()
    finally:
        kernels.use_instruction_set(kernels.instruction_sets()[0])


@pytest.mark.parametrize(
    "options",
    [(math.nan, 0, 1.0, 0.0, 0.5), (math.inf, 0, 1.0, 0.0, 0.5), (1e-300, 0, 1.0, 0.0, 0.5), (0.0, 0, 1.0, 0.0, 0.5)]
    + [(1.0, 0, share, 0.0, 0.5) for share in (math.nan, -TINY, 1.1)]
    + [(1.0, 0, 1.0, share, 0.5) for share in (math.nan, -TINY, 1.1)]
    + [(1.0, 0, 1.0, 0.0, uniform) for uniform in (math.nan, -TINY, 1.0)]
    + [(1.0, -1, 1.0, 0.0, 0.5)],
)
def test_the_draw_refuses_what_it_cannot_compute(options: tuple[float, int, float, float, float]) -> None:
    temperature, top_k, top_p, min_p, uniform = options
    sampling = Sampling(seed=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with pytest.raises(ValueError, match=r"must|top_k"):
        draw(USED[-1], torch.zeros(8), sampling, uniform)


def test_a_penalty_that_overflows_does_not_end_the_row() -> None:
    """The least penalty over the greatest logit; before the bounds were closed, 1e-300 over any."""
    row = torch.tensor([FLOAT_MAX, 1.0, -FLOAT_MAX])
    for tokens in ([0, 1, 2], [2, 2, 2]):
        for penalty in (0.01, 10.0):
            options = {"repetition_penalty": penalty, "frequency_penalty": -2.0, "presence_penalty": -2.0}
            state = SamplingState(Submit("r", (0,), 9, Sampling(seed=1, **options)), tokens)  # type: ignore[arg-type]
            sampled = sample(USED[-1], row[None].clone(), [state])
            assert (sampled.tokens, sampled.errors) == ([0], {})


def test_a_share_of_nothing_is_the_most_probable_token() -> None:
    row = torch.tensor([0.0, 3.0, 3.0, 2.9])
    for seed in range(50):
        state = SamplingState(Submit("r", (0,), 9, Sampling(seed=seed, top_p=0.0)), [0])
        assert sample(USED[-1], row[None].clone(), [state]).tokens == [1]


def test_what_may_not_come_does_not_come_by_a_penalty() -> None:
    """A repetition penalty below 1 makes what was seen more probable, also what is banned: bans stand last."""
    row = torch.full((4,), -2e38)
    options = Sampling(seed=1, temperature=0.0, repetition_penalty=0.01, logit_bias=((0, 100.0),))
    request = Submit("r", (0,), 9, options, stop_token_ids=(0,), min_tokens=5)
    assert sample(USED[-1], row[None].clone(), [SamplingState(request, [0, 0])]).tokens == [1]


def test_a_row_whose_choice_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> list[Chosen]:
        error = IndexError("index 9 of 5 at 0x7f00")
        chosen = choose(logits, choices)
        return [
            Chosen(-1, None, error) if choice.sampling.top_k == 7 else one
            for choice, one in zip(choices, chosen, strict=True)
        ]

    choose = USED[-1].choose
    monkeypatch.setattr(USED[-1], "choose", broken)
    states = [SamplingState(Submit("r", (0,), 9, Sampling(seed=1, top_k=top_k)), [0]) for top_k in (3, 7, 3)]
    sampled = sample(USED[-1], torch.zeros(3, 5), states)
    assert set(sampled.errors) == {1}
    assert isinstance(sampled.errors[1], RequestFailed)
    assert "0x7f00" not in sampled.errors[1].message
    assert sampled.tokens[1] == -1
    assert sampled.tokens[0] == sampled.tokens[2] >= 0


@pytest.mark.parametrize("token", [-1, 5, 2**40])
def test_a_choice_outside_the_vocabulary_is_none(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    judged = Judged(0.0, 0.0, [])
    monkeypatch.setattr(USED[-1], "choose", lambda *_: [Chosen(token, judged)])
    sampled = sample(
        USED[-1], torch.zeros(1, 5), [SamplingState(Submit("r", (0,), 9, Sampling(seed=1, logprobs=2)), [0])]
    )
    assert (sampled.tokens, sampled.logprobs, sampled.errors[0].code) == ([-1], [None], "bad_logits")


def test_what_a_row_cannot_be_drawn_by_is_its_own_error() -> None:
    """Bounds are checked before; where they are not, the others have their tokens all the same."""
    good, bad = (TokenChoice(Sampling(seed=1, top_p=top_p), 0.5, None, 1) for top_p in (1.0, math.nan))
    first, second, third = USED[-1].choose(torch.zeros(3, 5), [good, bad, good])
    assert isinstance(second.error, ValueError)
    assert (first.token, first.error) == (third.token, third.error) == (2, None)


def test_want_of_memory_is_not_a_rows_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(USED[-1], "choose", lambda *_: [Chosen(-1, None, MemoryError())])
    with pytest.raises(MemoryError):
        sample(USED[-1], torch.zeros(1, 5), [SamplingState(Submit("r", (0,), 9, Sampling(seed=1)), [0])])


# ---- bounds --------------------------------------------------------------------------------------------------------


def numbers_of(kind: inspect.Type, path: str) -> dict[str, inspect.IntType | inspect.FloatType]:
    """All numbers of a message, by path."""
    if isinstance(kind, inspect.Metadata):
        return numbers_of(kind.type, path)
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return {path: kind}
    found: dict[str, inspect.IntType | inspect.FloatType] = {}
    if isinstance(kind, inspect.StructType):
        for field in kind.fields:
            found |= numbers_of(field.type, f"{path}.{field.name}")
    elif isinstance(kind, inspect.UnionType):
        for one in kind.types:
            found |= numbers_of(one, path)
    elif isinstance(kind, inspect.TupleType):
        for one in kind.item_types:
            found |= numbers_of(one, f"{path}[]")
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType):
        found |= numbers_of(kind.item_type, f"{path}[]")
    elif isinstance(kind, inspect.DictType):
        found |= numbers_of(kind.key_type, f"{path}{{}}") | numbers_of(kind.value_type, f"{path}[]")
    return found


@pytest.mark.parametrize("message", [Submit, GenerateRequest])
def test_every_number_of_a_request_has_two_finite_closed_bounds(message: type[msgspec.Struct]) -> None:
    """A bound that is open towards zero lets 1e-300 in. Whole numbers may end below a bound."""
    numbers = numbers_of(inspect.type_info(message), "")
    assert len(numbers) > 12
    for path, kind in numbers.items():
        low, high = kind.ge, kind.le if isinstance(kind, inspect.FloatType) or kind.le is not None else kind.lt
        assert low is not None, path
        assert high is not None, path
        assert math.isfinite(low), path
        assert math.isfinite(high), path


FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@pytest.mark.parametrize("field", FIELDS)
def test_both_sides_have_the_same_bounds_and_name_them(field: str) -> None:
    wire = numbers_of(inspect.type_info(Sampling), "")[f".{field}"]
    assert wire.ge is not None
    assert wire.le is not None
    for decoder, base in (
        (msgspec.json.Decoder(CompletionRequest), {"prompt": "x"}),
        (msgspec.json.Decoder(ChatRequest), {"messages": [{"role": "user", "content": "x"}]}),
    ):
        for value in (float(wire.ge), float(wire.le)):
            assert getattr(parse(decoder, msgspec.json.encode({**base, field: value})), field) == value
            assert msgspec.msgpack.decode(msgspec.msgpack.encode({"seed": 1, field: value}), type=Sampling)
        below, above = math.nextafter(wire.ge, -math.inf), math.nextafter(wire.le, math.inf)
        least, most = f"at least {float(wire.ge):g};", f"at most {float(wire.le):g};"
        for value, bound in ((below, least), (above, most), (-1e300, least)):
            with pytest.raises(InvalidRequest) as caught:
                parse(decoder, msgspec.json.encode({**base, field: value}))
            assert (caught.value.code, caught.value.param) == ("invalid_request", field)
            assert bound in caught.value.message
            assert f"it is {value}"[:20] in caught.value.message
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(msgspec.msgpack.encode({"seed": 1, field: value}), type=Sampling)
        for no_number in (math.nan, math.inf):
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(msgspec.msgpack.encode({"seed": 1, field: no_number}), type=Sampling)


@pytest.mark.parametrize("text", ["1e-300", "5e-324", "0", "0.0099999", "-1", "1e300", "10.1", "NaN", "Infinity"])
def test_the_penalty_that_ended_ranks_is_refused(text: str) -> None:
    body: Any = f'{{"prompt":"hello","max_tokens":4,"repetition_penalty":{text}}}'.encode()
    with pytest.raises(InvalidRequest):
        parse(msgspec.json.Decoder(CompletionRequest), body)
