"""From valid options and prompts to running streams: one HTTP request's generations, accepted all or not at all."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from elasticmoe.common.protocol.errors import ContextLengthExceeded, InvalidRequest, Overloaded, Unavailable
from elasticmoe.common.protocol.limits import PROMPT_TOKENS_MAX
from elasticmoe.common.protocol.rank import Submit
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.options import Options
from elasticmoe.services.router.api.request_trace import Caller
from elasticmoe.services.router.dispatch.admission import Permit, check_price, price
from elasticmoe.services.router.dispatch.streams import Ending, Stream
from elasticmoe.services.router.grammar.structure import Thought
from elasticmoe.services.router.text.detokenizer import TextStream

PIECE_TOKENS = 65_536  # of prompts that are submitted in one go


class Generation:
    """The streams of one request, in the order of their choices: all of the first prompt, then the next one's.

    The request owns it and closes it, whatever happens: then whatever still runs is cancelled.
    """

    def __init__(self, front: Front, prompts: Sequence[Sequence[int]], num_choices: int) -> None:
        self.prompts = prompts
        self.num_choices = num_choices
        self.streams: list[Stream] = []
        self.wake = asyncio.Event()
        self.is_abandoned = False
        self.turns = front.turns
        self._dispatcher = front.dispatcher

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each once."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(stream.num_tokens for stream in self.streams)

    def abandon(self) -> None:
        """The client left."""
        self.is_abandoned = True
        self.close()
        self.wake.set()

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        for stream in self.streams:
            self._dispatcher.cancel(stream)


async def start(
    front: Front,
    permit: Permit,
    caller: Caller,
    options: Options,
    prompts: Sequence[Sequence[int]],
    *,
    kind: str,
    is_echo: bool = False,
    kept: frozenset[int] = frozenset(),
) -> Generation:
    """Submit every choice of every prompt. `kind`: `chatcmpl`, `cmpl`, `resp` or `msg`. `is_echo`: the prompts
    are told too, with their log probabilities where the output's are. `kept`: special tokens that are a part of the
    text all the same.

    Raises InvalidRequest for a prompt that does not fit, Overloaded without permits, Unavailable without replicas; then
    nothing runs.
    """
    limit = front.dispatcher.max_model_len()
    max_tokens = [_max_tokens(len(prompt), options, limit) for prompt in prompts]
    prompt_logprobs = is_echo and options.sampling.logprobs >= 0
    _admit(front, permit, options, prompts, max_tokens, is_echo=is_echo)
    caller.tokenized(prompts)
    now = time.monotonic()
    name = f"{kind}-{secrets.token_hex(12)}"
    generation = Generation(front, prompts, options.num_choices)
    try:
        num_sent = 0
        for ids, most in zip(map(tuple, prompts), max_tokens, strict=True):
            for choice in range(options.num_choices):
                num_sent += len(ids)
                if num_sent > PIECE_TOKENS:
                    num_sent = 0
                    await front.turns.wait()
                submit = Submit(
                    request_id=f"{name}-{len(generation.streams)}",
                    prompt=ids,
                    max_tokens=max(1, most),
                    sampling=options.sampling_of(choice),
                    stop_token_ids=options.stop_token_ids,
                    min_tokens=min(options.min_tokens, most),
                    deadline_s=front.config.request_seconds_max,
                    priority=options.priority,
                    prompt_logprobs=prompt_logprobs and choice == 0,  # of all choices they are the same
                    origin=caller.origin,
                )
                text, is_prompt_only = _text_stream(front, options, kept), options.max_tokens == 0
                stream = Stream(
                    submit.request_id, submit, text, generation.wake, now=now, is_prompt_only=is_prompt_only
                )
                stream.trail = caller.trail()
                stream.on_end = lambda ended: permit.end_one(front.answers, ended.num_tokens)
                if stream.is_prompt_only and not submit.prompt_logprobs:
                    stream.end(Ending("finish", "length"))  # there is nothing to compute
                else:
                    front.dispatcher.open(stream, now)
                generation.streams.append(stream)
    except BaseException as error:
        if isinstance(error, Unavailable):  # `open` counted the choice that found no replica, and not those behind it
            num = len(prompts) * options.num_choices
            front.dispatcher.windows.refused(num - len(generation.streams) - 1)
        generation.close()
        raise
    return generation


def _text_stream(front: Front, options: Options, kept: frozenset[int]) -> TextStream:
    return TextStream(
        front.model.table,
        stops=options.stops,
        skip_special=options.skip_special,
        kept=kept,
        min_tokens=options.min_tokens,
    )


async def with_grammar(front: Front, options: Options, thought: Thought | None, client: str) -> Options:
    """The options with the grammar that what is asked for makes. `thought`: what comes before the answer. Raises
    InvalidRequest, Overloaded, Unavailable."""
    if options.structure is None:
        return options
    grammar = await front.structures.compile(options.structure, thought, client)
    return options._replace(sampling=msgspec.structs.replace(options.sampling, grammar=grammar))


@contextmanager
def counting_refusals(front: Front, num: int) -> Iterator[None]:
    """Where the texts of `num` generations are read: who finds no room or no worker there is demand too, that no rank
    has seen."""
    try:
        yield
    except (Overloaded, Unavailable):
        front.dispatcher.windows.refused(num)
        raise


def _admit(
    front: Front,
    permit: Permit,
    options: Options,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    *,
    is_echo: bool,
) -> None:
    """Hold what the answer may need. Raises InvalidRequest for what is never free, Overloaded for what is not now."""
    lengths = [len(prompt) for prompt in prompts]
    choices, logprobs = options.num_choices, options.sampling.logprobs
    cost = price(lengths, max_tokens, num_choices=choices, num_logprobs=logprobs, is_echo=is_echo)
    most = front.config.answer_bytes_max
    check_price(lengths, cost, most, num_choices=choices, num_logprobs=logprobs, is_echo=is_echo)
    num = len(prompts) * options.num_choices
    try:
        permit.widen(num)
        permit.hold(front.answers, cost.held)
    except Overloaded:
        front.dispatcher.windows.refused(num)
        raise


def _max_tokens(num_prompt: int, options: Options, limit: int) -> int:
    """Tokens that may be generated after a prompt. Raises InvalidRequest when prompt and output do not fit: a rank has
    to have room for one token, also where none is asked for."""
    limit = min(limit, PROMPT_TOKENS_MAX)
    if num_prompt == 0:
        raise InvalidRequest("there are no tokens in the prompt", param="prompt")
    asked = options.max_tokens
    if num_prompt + (asked or 1) > limit:
        param = "max_tokens" if asked and num_prompt < limit else "prompt"
        raise ContextLengthExceeded(limit, num_prompt, asked or 0, param=param)
    if asked is not None:
        return asked
    return min(limit - num_prompt, options.default_tokens or limit)
