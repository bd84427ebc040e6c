"""Ten thousand requests with extreme sampling parameters, from their bodies to their tokens, on two ranks: each is
served with finite numbers or refused with one clear error, and no step fails of any."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from elasticmoe.cli.models import make_model
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.limits import LOGPROB_MIN
from elasticmoe.common.protocol.rank import Submit
from elasticmoe.common.protocol.router import Logprob
from elasticmoe.services.router.api.options import options_of
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.schemas import CompletionRequest
from elasticmoe.services.router.text.tokenizer import ServedModel
from tests.extremes import draw
from tests.unit.crew import Crew
from tests.unit.ranks import Ranks

pytestmark = pytest.mark.slow

DRAWS, BATCH = 10_000, 250
COMPLETION = msgspec.json.Decoder(CompletionRequest)


def submit_of(name: str, body: str, model: ServedModel) -> Submit | InvalidRequest:
    """What the router makes of a body, as it comes over the wire, or its refusal."""
    try:
        raw = parse(COMPLETION, body.encode())
        logprobs = -1 if raw.logprobs is None else raw.logprobs
        options = options_of(raw, model, max_tokens=raw.max_tokens, logprobs=logprobs)
    except InvalidRequest as error:
        return error
    assert isinstance(raw.prompt, list)
    prompt = tuple(token for token in raw.prompt if isinstance(token, int))
    submit = Submit(
        name,
        prompt,
        raw.max_tokens or 1,
        options.sampling_of(0),
        options.stop_token_ids,
        options.min_tokens,
        prompt_logprobs=bool(raw.echo) and logprobs >= 0,
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=Submit)


def check(logprob: Logprob) -> None:
    values = [logprob.token, *(value for _, value in logprob.top)]
    assert all(LOGPROB_MIN <= value <= 0.0 for value in values)


def test_ten_thousand_draws(tmp_path: Path) -> None:
    rng = random.Random(20261126)
    directory = make_model("tiny-mixtral", tmp_path / "model")
    served, ranks = ServedModel(directory, "m"), Ranks(directory, 2, max_tokens=64)
    num_served = num_refused = 0
    crew = Crew(ranks, sequences_max=32, tokens_max=64)
    for first in range(0, DRAWS, BATCH):
        wanted: dict[str, Submit] = {}
        for number in range(first, first + BATCH):
            name, made = f"r{number}", draw(rng, served.vocab, max_tokens=rng.choice((1, 2, 3)))
            submit = submit_of(name, made.body, served)
            if isinstance(submit, InvalidRequest):
                assert submit.param in (made.wrong or ("min_tokens",)), made.body  # with max_tokens
                assert (submit.code, bool(submit.message)) == ("invalid_request", True)
                num_refused += 1
                continue
            assert not made.wrong, made.body
            wanted[name] = submit
            crew.members[number % 2].take(submit)
        crew.run()
        for member in crew.members:
            assert member.failed == {}
            for name, tokens in member.tokens.items():
                num_served += 1
                assert member.finish[name] in ("stop", "length")
                assert all(0 <= token < served.vocab for token in tokens)
                if wanted[name].sampling.logprobs >= 0:
                    assert len(member.logprobs[name]) == len(tokens)
                for logprob in (*member.logprobs[name], *member.noted.get(name, ())):
                    check(logprob)
            member.forget_all()
    assert num_served + num_refused == DRAWS
    assert min(num_served, num_refused) > 1_000
    assert (crew.num_ended, [member.num_deaths for member in crew.members]) == (0, [0, 0])
