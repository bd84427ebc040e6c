"""A raw request to valid options: everything that chat and completions share, checked once. Only options go on."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.services.router.api.sampling_defaults import OPENAI, SamplingDefaults
from elasticmoe.services.router.api.schemas import GenerateRequest, StreamOptions
from elasticmoe.services.router.api.words import WORDS, Word, asked_for
from elasticmoe.services.router.grammar.asked import structure_of
from elasticmoe.services.router.grammar.structure import Structure
from elasticmoe.services.router.text.tokenizer import ServedModel

SEED_MASK = (1 << 63) - 1


class UsageChunks(NamedTuple):
    """Whether a stream tells its usage in a chunk of its own at the end, and in every chunk so far."""

    at_end: bool = False
    always: bool = False


class Options(NamedTuple):
    """How to generate. `max_tokens` None: not said; then up to `default_tokens`, or what the context has room for.
    `stop_token_ids` include the model's own ends of sequence, unless they are to be ignored. `as_ids`: tokens are named
    by their ids. `usage`: which chunks of a stream tell it. `structure`: what the answer has to look like."""

    sampling: Sampling
    num_choices: int
    max_tokens: int | None
    default_tokens: int | None
    min_tokens: int
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    skip_special: bool
    priority: int
    is_stream: bool
    as_ids: bool
    usage: UsageChunks
    structure: Structure | None = None

    def sampling_of(self, choice: int) -> Sampling:
        """Each choice has a seed of its own, derived from the request's."""
        if choice == 0:
            return self.sampling
        seed = (self.sampling.seed + choice) & SEED_MASK
        fields = {name: getattr(self.sampling, name) for name in Sampling.__struct_fields__}
        return Sampling(**(fields | {"seed": seed}))


def options_of(
    raw: GenerateRequest,
    model: ServedModel,
    *,
    max_tokens: int | None,
    logprobs: int,
    default_tokens: int | None = None,
    defaults: SamplingDefaults = OPENAI,
    allow_priority: bool = False,
) -> Options:
    """Check what depends on other fields or on the model. `max_tokens` as it was asked for, `default_tokens` where it
    was not. Raises InvalidRequest."""
    refuse_words(raw, WORDS)
    if raw.priority and not allow_priority:
        raise unsupported("priority", f"got {raw.priority}, and the setting allow_priority is off")
    if raw.stream_options is not None and not raw.stream:
        raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
    min_tokens, most = raw.min_tokens or 0, default_tokens if max_tokens is None else max_tokens
    if most is not None and min_tokens > most:
        raise InvalidRequest(f"min_tokens {min_tokens} exceeds max_tokens {most}", param="min_tokens")
    stop_ids = dict.fromkeys(raw.stop_token_ids or ())
    if not raw.ignore_eos:
        stop_ids |= dict.fromkeys(model.eos_ids)
    check_ids(tuple(stop_ids), model, "stop_token_ids")
    check_ids(tuple(raw.logit_bias or ()), model, "logit_bias")
    if min_tokens and len(stop_ids) >= model.vocab:
        raise InvalidRequest(
            f"min_tokens is {min_tokens}, and all {model.vocab} tokens of the vocabulary end the sequence",
            param="min_tokens",
        )
    stops = (raw.stop,) if isinstance(raw.stop, str) else tuple(dict.fromkeys(raw.stop or ()))
    return Options(
        sampling=_sampling(raw, logprobs, defaults),
        num_choices=raw.n or 1,
        max_tokens=max_tokens,
        default_tokens=default_tokens,
        min_tokens=min_tokens,
        stops=stops,
        stop_token_ids=tuple(stop_ids),
        skip_special=raw.skip_special_tokens is not False,
        priority=raw.priority or 0,
        is_stream=bool(raw.stream),
        as_ids=bool(raw.return_tokens_as_token_ids),
        usage=_usage(raw.stream_options),
        structure=structure_of(raw),
    )


def _sampling(raw: GenerateRequest, logprobs: int, defaults: SamplingDefaults) -> Sampling:
    """What the request says, else what the model's maker recommends, else OpenAI's default."""
    seed = raw.seed if raw.seed is not None else secrets.randbits(63)
    return Sampling(
        seed=seed & SEED_MASK,
        temperature=_first(raw.temperature, defaults.temperature, 1.0),
        top_p=_first(raw.top_p, defaults.top_p, 1.0),
        top_k=int(max(0, _first(raw.top_k, defaults.top_k, 0))),
        min_p=_first(raw.min_p, defaults.min_p, 0.0),
        presence_penalty=_first(raw.presence_penalty, 0.0),
        frequency_penalty=_first(raw.frequency_penalty, 0.0),
        repetition_penalty=_first(raw.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=tuple((raw.logit_bias or {}).items()),
        logprobs=logprobs,
    )


def _first(*values: float | None) -> float:
    """The first that is given; the last is."""
    return next(value for value in values if value is not None)


def _usage(options: StreamOptions | None) -> UsageChunks:
    """As in vLLM, the usage in every chunk is for those who want it at the end."""
    if options is None or not options.include_usage:
        return UsageChunks()
    return UsageChunks(True, bool(options.continuous_usage_stats))


def refuse_words(struct: msgspec.Struct, words: Mapping[str, Word], where: str = "") -> None:
    """Raises InvalidRequest for the first of `words` that `struct` asks something with. `where`: its path in the body,
    with a dot."""
    for name, word, value in asked_for(struct, words):
        raise unsupported(f"{where}{name}", f"{word.reason}; got {value}")


def check_ids(ids: tuple[int, ...] | list[int], model: ServedModel, param: str) -> None:
    """Raises InvalidRequest unless all are token ids of the model: an id outside would poison the engine."""
    if not ids:
        return
    least, greatest = min(ids), max(ids)
    if least < 0 or greatest >= model.vocab:
        wrong = least if least < 0 else greatest
        raise InvalidRequest(f"token id {str(wrong)[:40]} is not in [0, {model.vocab})", param=param)


def unsupported(param: str, what: str) -> InvalidRequest:
    """The refusal of a field that OpenAI has and this server does not."""
    return InvalidRequest(f"{param} is not supported: {what}", code="unsupported", param=param)
