"""A raw request to valid options: everything that chat and completions share, checked once. Only options go on."""

from __future__ import annotations

import secrets
from typing import NamedTuple

from common.protocol.errors import InvalidRequest
from common.protocol.rank import Sampling
from services.router.api.schemas import GenerateRequest
from services.router.tokenizer import ServedModel

SEED_MASK = (1 << 63) - 1


class Options(NamedTuple):
    """How to generate. `max_tokens` None: whatever the caller's default is. `stop_token_ids` include the model's own
    ends of sequence, unless they are to be ignored."""

    sampling: Sampling
    num_choices: int
    max_tokens: int | None
    min_tokens: int
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    skip_special: bool
    priority: int
    is_stream: bool
    include_usage: bool

    def sampling_of(self, choice: int) -> Sampling:
        """Each choice has a seed of its own, derived from the request's."""
        if choice == 0:
            return self.sampling
        seed = (self.sampling.seed + choice) & SEED_MASK
        fields = {name: getattr(self.sampling, name) for name in Sampling.__struct_fields__}
        return Sampling(**(fields | {"seed": seed}))


def options_of(raw: GenerateRequest, model: ServedModel, *, max_tokens: int | None, logprobs: int) -> Options:
    """Check what depends on other fields or on the model. Raises InvalidRequest."""
    if raw.response_format is not None and raw.response_format.type != "text":
        raise unsupported("response_format", f"type {raw.response_format.type[:40]!r}; supported: text")
    if raw.stream_options is not None and not raw.stream:
        raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
    min_tokens = raw.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens {min_tokens} exceeds max_tokens {max_tokens}", param="min_tokens")
    stop_ids = dict.fromkeys(raw.stop_token_ids or ())
    if not raw.ignore_eos:
        stop_ids |= dict.fromkeys(model.eos_ids)
    check_ids(tuple(stop_ids), model, "stop_token_ids")
    check_ids(tuple(raw.logit_bias or ()), model, "logit_bias")
    stops = (raw.stop,) if isinstance(raw.stop, str) else tuple(dict.fromkeys(raw.stop or ()))
    return Options(
        sampling=_sampling(raw, logprobs),
        num_choices=raw.n or 1,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stops=stops,
        stop_token_ids=tuple(stop_ids),
        skip_special=raw.skip_special_tokens is not False,
        priority=raw.priority or 0,
        is_stream=bool(raw.stream),
        include_usage=bool(raw.stream_options and raw.stream_options.include_usage),
    )


def _sampling(raw: GenerateRequest, logprobs: int) -> Sampling:
    seed = raw.seed if raw.seed is not None else secrets.randbits(63)
    return Sampling(
        seed=seed & SEED_MASK,
        temperature=_or(raw.temperature, 1.0),
        top_p=_or(raw.top_p, 1.0),
        top_k=max(0, raw.top_k or 0),
        min_p=_or(raw.min_p, 0.0),
        presence_penalty=_or(raw.presence_penalty, 0.0),
        frequency_penalty=_or(raw.frequency_penalty, 0.0),
        repetition_penalty=_or(raw.repetition_penalty, 1.0),
        logit_bias=tuple((raw.logit_bias or {}).items()),
        logprobs=logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def check_ids(ids: tuple[int, ...] | list[int], model: ServedModel, param: str) -> None:
    """Raises InvalidRequest unless all are token ids of the model: an id outside would poison the engine."""
    if ids and not (min(ids) >= 0 and max(ids) < model.vocab):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < model.vocab)
        raise InvalidRequest(f"token id {str(wrong)[:40]} is not in [0, {model.vocab})", param=param)


def unsupported(param: str, what: str) -> InvalidRequest:
    """The refusal of a field that OpenAI has and this server does not."""
    return InvalidRequest(f"{param} is not supported: {what}", code="unsupported", param=param)
