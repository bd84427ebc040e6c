"""Bodies of requests with extreme sampling parameters: bounds, their neighbours, the least and the greatest numbers."""

from __future__ import annotations

import random
from typing import NamedTuple

from elasticmoe.common.protocol.limits import LOGIT_BIAS_MAX

# Field -> (what is within its bounds, what is not), as JSON texts.
_TINY = ("0", "-0.0", "5e-324", "1e-310", "1e-300", "1e-45", "1e-38", "1e-7")
_HUGE = ("1e39", "1e300", "1.7976931348623157e308", "-1e300", "1" + "0" * 40)
NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "temperature": ((*_TINY, "9.99e-6", "1e-5", "0.01", "1", "9.999999", "10"), (*_HUGE, "-5e-324", "10.0000001")),
    "top_p": ((*_TINY, "0.5", "0.9999999999999999", "1"), (*_HUGE, "-5e-324", "1.0000000000000002")),
    "min_p": ((*_TINY, "0.5", "0.9999999999999999", "1"), (*_HUGE, "-5e-324", "1.0000000000000002")),
    "top_k": (("-1", "0", "1", "2", "5", "1048576"), ("-2", "1048577", *_HUGE)),
    "presence_penalty": ((*_TINY, "-2", "2", "-5e-324"), (*_HUGE, "2.0000000000000004", "-2.0000000000000004")),
    "frequency_penalty": ((*_TINY, "-2", "2", "-5e-324"), (*_HUGE, "2.0000000000000004", "-2.0000000000000004")),
    "repetition_penalty": (
        ("0.01", "0.010000000000000002", "0.99", "1", "1.0000000000000002", "9.999999999999998", "10"),
        (*_TINY, *_HUGE, "0.009999999999999998", "10.000000000000002", "-1"),
    ),
    "seed": (("0", "-1", "9223372036854775807", "-9223372036854775808"), ("9223372036854775808", "1e300")),
    "min_tokens": (("0", "1"), ("-1", "1048577")),
    "logprobs": (("0", "1", "20"), ("-1", "21")),
}
BIASES = ("-100", "100", "5e-324", "-1e-300", "99.99999999999999", "0")


class Draw(NamedTuple):
    """A body for /v1/completions. `wrong`: the fields that break their bounds."""

    body: str
    wrong: tuple[str, ...]


def draw(rng: random.Random, vocab: int, *, max_tokens: int) -> Draw:
    """A random one; one in five breaks a bound."""
    fields = {"max_tokens": str(max_tokens)}
    wrong = []
    for name, (good, bad) in NUMBERS.items():
        chance = rng.random()
        if chance < 0.03:
            fields[name] = rng.choice(bad)
            wrong.append(name)
        elif chance < 0.6:
            fields[name] = rng.choice(good)
    fields["prompt"] = str([rng.randrange(vocab) for _ in range(rng.choice((1, 2, 9)))])
    if rng.random() < 0.4:
        num = rng.choice((1, 3, vocab, LOGIT_BIAS_MAX)) if rng.random() < 0.2 else 2
        ids = rng.sample(range(vocab), min(num, vocab))
        fields["logit_bias"] = "{" + ",".join(f'"{token}":{rng.choice(BIASES)}' for token in ids) + "}"
    if rng.random() < 0.3:
        fields["stop_token_ids"] = str(rng.sample(range(vocab), min(vocab, rng.choice((1, 32)))))
    if rng.random() < 0.3:
        fields["ignore_eos"] = "true"
    if rng.random() < 0.1:
        fields["echo"] = "true"
    return Draw("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}", tuple(wrong))
